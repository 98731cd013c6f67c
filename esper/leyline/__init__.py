"""Contracts that every room shares: stages, slots, alpha, evidence, observations, events. Standard library only."""
