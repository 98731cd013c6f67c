"""The axes of a host's features: which holds samples, positions and channels, found by forwards of a varied example."""
