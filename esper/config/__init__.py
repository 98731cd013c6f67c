"""Every setting of a run in one tree, read strictly and checked whole."""
