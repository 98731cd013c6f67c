"""Data that change: an old phase, then a new one in which a share of the old is replayed, each held out apart."""
