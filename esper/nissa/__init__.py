"""Telemetry out: typed events to JSON lines, wandb and the screen."""
