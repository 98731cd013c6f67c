"""Distributed training: process groups, lockstep, optimizer ownership, engine, checkpoints, data."""
