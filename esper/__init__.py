"""Esper trains neural networks that grow while they train, on many processes in lockstep."""

__version__ = "0.1.0"
