"""Whether the parts of a run fit each other."""
