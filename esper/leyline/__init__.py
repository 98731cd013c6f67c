"""Contracts that every room shares: stages, slots, actions, alpha, evidence, observations, events. Standard library only."""
