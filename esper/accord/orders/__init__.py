"""The agreed part of people's orders."""
