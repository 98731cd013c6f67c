"""One tick: the two collectives, and what stands around them."""
