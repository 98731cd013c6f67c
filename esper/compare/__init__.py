"""Arms beside each other: which runs a comparison needs, and running them."""
