"""Rooms of launch/soak.py."""
