"""PPO for any agent of `esper.tamiyo.policy.agent` in any vector environment whose observations are dicts of arrays."""
