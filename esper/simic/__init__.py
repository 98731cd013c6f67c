"""Learning a controller: growth as an environment, and PPO over many of them on many ranks."""
