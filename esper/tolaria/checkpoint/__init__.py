"""Checkpoints: collected, copied, written whole, read back."""
