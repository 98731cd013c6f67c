"""Controllers: who decides what grows, from the agreed observation alone."""
