"""Looking at runs: what several of them say together."""
