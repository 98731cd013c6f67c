"""Policies that nobody trained, in files."""

from pathlib import Path

import torch

from esper.tamiyo.policy.checkpoint import save_policy
from esper.tamiyo.policy.network import GrowthAgent

MADE = {"command": "a test", "seeds": [3], "code": "0" * 32}


def untrained_agent(seed: int = 3) -> GrowthAgent:
    """An agent whose heads are far from uniform."""
    torch.manual_seed(seed)
    agent = GrowthAgent()
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if "head" in name or "score" in name:
                parameter.mul_(30.0)
    return agent


def save_untrained(path: Path, seed: int = 3) -> Path:
    """Writes such an agent; returns the path."""
    save_policy(path, untrained_agent(seed), MADE)
    return path
