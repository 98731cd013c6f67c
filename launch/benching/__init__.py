"""Rooms of `launch/bench.py`: the harness, and one module per bench with its ``PARTS``."""
