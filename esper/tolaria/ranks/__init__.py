"""The ranks of a run: how they meet, and how a missing one is named."""
