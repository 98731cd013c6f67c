"""Typed, frozen events: what happened in a run, on explicit axes."""
