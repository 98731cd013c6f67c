"""A trained policy as the controller of a run: at most one command a tick, with its probability as the reason.

It decides on rank 0 in float32 on the CPU. What it remembers, the state of its core and what its features need of
earlier ticks, is in its state, so a resumed run decides bit for bit as the uninterrupted one. Draws are a hash of
(seed, tick): there is no generator whose state could be lost.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esper.leyline.commands import Command
from esper.leyline.observation import Observation
from esper.leyline.plain import from_plain, to_plain
from esper.tamiyo.common import check_observation
from esper.tamiyo.policy.agent import Decision
from esper.tamiyo.policy.arrays import arrays_of, stack, to_batch
from esper.tamiyo.policy.checkpoint import load_policy
from esper.tamiyo.policy.config import Mode, PolicyConfig
from esper.tamiyo.policy.memory import Memory
from esper.tamiyo.policy.options import to_commands


@dataclass(slots=True, kw_only=True)
class PolicyState:
    """What the controller remembers.

    Fields:
        weights: digest of the policy that decides.
        core: state of its core, [2H].
        memory: what its features need of earlier ticks.
    """

    weights: str
    core: tuple[float, ...]
    memory: Memory


SHIPPED = Path(__file__).parent / "shipped.pt"
"""The policy that comes with this package; RESULTS.md says how it was made, and how good it is."""


def find_policy(config: PolicyConfig) -> tuple[Path, str]:
    """The file of the policy that settings name, and what errors call it."""
    if config.checkpoint is None:
        return SHIPPED, "controller.checkpoint = null (the policy of this package)"
    return Path(config.checkpoint).expanduser(), f"controller.checkpoint = {config.checkpoint!r}"


def _draws(seed: int, tick: int) -> torch.Generator:
    word = hashlib.blake2b(f"policy/{seed}/{tick}".encode(), digest_size=8).digest()
    return torch.Generator(device="cpu").manual_seed(int.from_bytes(word, "big") >> 1)


class PolicyController:
    """Lets a trained policy decide."""

    name = "policy"

    def __init__(self, config: PolicyConfig, *, slots: tuple[str, ...], seed: int) -> None:
        self._agent, _, digest = load_policy(*find_policy(config))
        self._slots, self._seed, self._sampled = slots, seed, config.mode is Mode.SAMPLED
        self._state = PolicyState(weights=digest, core=(0.0,) * (2 * self._agent.hidden), memory=Memory())

    def state_dict(self) -> dict[str, Any]:
        """Returns `PolicyState` as plain data."""
        return to_plain(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that ``state_dict`` returned.

        Raises:
            ValueError: a field is missing or unknown, or another policy saved it.
        """
        loaded = from_plain(PolicyState, state)
        if loaded.weights != self._state.weights or len(loaded.core) != len(self._state.core):
            raise ValueError(
                f"PolicyState.weights = {loaded.weights}: controller.checkpoint holds another policy now "
                f"({self._state.weights}); put the file back with which the run began"
            )
        self._state = loaded

    def decide(self, observation: Observation) -> list[Command]:
        """Returns at most one legal command, with its probability and the expected return as the reason."""
        check_observation(observation, self._slots)
        state, agent = self._state, self._agent
        state.memory.note(observation)
        arrays = arrays_of(observation, state.memory, layout=agent.layout, options=agent.options)
        core = torch.tensor([state.core], dtype=torch.float32, device="cpu")
        generators = [_draws(self._seed, observation.tick)] if self._sampled else None
        decision = agent.act(to_batch(stack([arrays])), core, generators=generators)
        state.core = tuple(decision.state[0].tolist())
        choice = {head: int(option[0]) for head, option in decision.actions.items()}
        return to_commands(observation, choice, agent.options, self._explain(decision, choice))

    def _explain(self, decision: Decision, choice: dict[str, int]) -> str:
        op = self._agent.options.ops[choice["op"]].name
        chances = {head: float(log[0].exp()) for head, log in decision.log_probs.items()}
        told = [f"{op} {chances['op']:.0%}", f"slot {chances['slot']:.0%}"]
        if op == "GERMINATE":
            told.append(f"blueprint {chances['blueprint']:.0%}")
        return f"{', '.join(told)}; value {float(decision.value[0]):.3g}"
