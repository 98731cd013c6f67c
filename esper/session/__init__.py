"""Growth in a user's own training loop."""
