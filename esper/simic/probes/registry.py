"""Probes by name, with the heads that their agents pick from."""

from collections.abc import Callable
from functools import partial

from esper.leyline.errors import ConfigError
from esper.simic.probes.agent import FlatAgent, Head
from esper.simic.probes.base import ProbeEnv
from esper.simic.probes.cartpole import CartPole
from esper.simic.probes.dac import Luby, Sigmoid
from esper.simic.probes.ladder import CutOff, LateReward, OneAction, SeenAction, SeenReward, TwoActions
from esper.simic.probes.memory import ACT, Gated, Identity, Recall

PROBES: dict[str, Callable[[int], ProbeEnv]] = {
    "one_action": OneAction,
    "seen_reward": SeenReward,
    "late_reward": LateReward,
    "two_actions": TwoActions,
    "seen_action": SeenAction,
    "cut_off": CutOff,
    "recall": Recall,
    "gated": Gated,
    "identity": Identity,
    "cartpole": CartPole,
    "cartpole_hidden": partial(CartPole, velocities=False),
    "luby": Luby,
    "sigmoid": Sigmoid,
}


def make_probe(name: str, envs: int) -> ProbeEnv:
    """Makes the N environments of a name.

    Raises:
        ConfigError: there is no such name.
    """
    if name not in PROBES:
        raise ConfigError(f"env.name = {name!r}: no such environment; there are {', '.join(PROBES)}")
    return PROBES[name](envs)


def make_probe_agent(env: ProbeEnv, *, width: int = 64, hidden: int = 0) -> FlatAgent:
    """Makes an agent for a probe; an ``argument`` matters with the op ACT alone."""
    inputs = env.observe()["x"].shape[1]
    heads = [Head(name, options, ("op", ACT) if name == "argument" else None) for name, options in env.heads.items()]
    return FlatAgent(inputs, heads, width=width, hidden=hidden)
