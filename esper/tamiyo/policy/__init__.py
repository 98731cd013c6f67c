"""A learned controller: what it sees, what it may choose, its network, and the agent that training code drives."""
