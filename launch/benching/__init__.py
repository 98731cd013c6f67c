"""Modules of `launch/bench.py`: the harness, and one module per benchmark with its ``PARTS``."""
