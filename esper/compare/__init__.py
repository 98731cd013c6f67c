"""Comparisons of arms: derives the runs that one needs, runs them and collects the results."""
