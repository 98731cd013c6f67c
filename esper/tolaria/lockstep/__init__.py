"""One tick: the two collectives, and what happens around them."""
