"""Checkpoints: collecting, copying, writing whole, reading back."""
