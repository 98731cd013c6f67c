"""The governor's settings."""
