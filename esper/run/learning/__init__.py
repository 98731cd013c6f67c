"""One training of a policy as a run: its settings, its parts, its ranks from beginning to end."""
