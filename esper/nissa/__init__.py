"""Telemetry: typed events go out to JSON lines, wandb and the screen."""
