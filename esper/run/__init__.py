"""One run: its directory, its parts, its ranks from beginning to end."""
