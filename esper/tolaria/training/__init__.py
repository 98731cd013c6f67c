"""The trainer's loop: steps, losses, evaluation, governor, result."""
