"""What is started ahead of a run: the process that will be torchrun's agent, and the one that forks its ranks."""
