"""The settings of a run: one tree, read strictly and checked as a whole."""
