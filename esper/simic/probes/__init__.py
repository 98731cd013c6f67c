"""Environments with known answers, small enough to be learned in seconds, and an agent for them.

Each of the ladder's asks one thing of a learner (after Jones, "Debugging RL, without the agonizing pain"): P1 the loss,
P2 the gradient, P3 the discount, P4 the advantage, P5 the batch, P6 the bootstrap; then memory, heads that matter for
some options only, masks, and problems from the literature whose optimum is known.
"""

from esper.simic.probes.agent import FlatAgent, Head
from esper.simic.probes.base import ProbeEnv
from esper.simic.probes.registry import PROBES, make_probe, make_probe_agent

__all__ = ["PROBES", "FlatAgent", "Head", "ProbeEnv", "make_probe", "make_probe_agent"]
