"""A growth environment without a network: slots that live by leyline's rules, observed by the policy's own features.

Two slots. In ``r0c0`` every seed helps, in ``r1c0`` every seed harms, and there a grown one stands from the beginning.
A tick pays the sum of alpha times worth over blended seeds, minus a price for each birth; an episode has `TICKS` ticks
and terminates. So the true value of every choice is known:

    never grow       the harmful seed stays             -TICKS * HARM
    prune at once    and nothing else                   0
    best known       germinate in r0c0, prune while it is built, advance it: (TICKS - 3) * HELP - HARM - PRICE
"""

from typing import Any, ClassVar

import numpy as np

from esper.leyline.commands import Command
from esper.leyline.observation import Observation
from esper.leyline.stages import Op, Stage
from esper.simic.probes import ProbeEnv
from esper.simic.probes.base import Arrays
from esper.tamiyo.policy.arrays import arrays_of, stack
from esper.tamiyo.policy.memory import Memory
from esper.tamiyo.policy.options import HEADS, OPTIONS, to_commands
from tests.support.observations import CATALOGUE, World

GOOD, BAD = "r0c0", "r1c0"
TICKS, HELP, HARM, PRICE = 10, 1.0, 0.3, 0.5


class _Paying(World):
    """A world that says what its seeds are worth now."""

    def __init__(self, seed: int) -> None:
        super().__init__((GOOD, BAD), lambda slot, name: worth(slot), total_ticks=TICKS + 1, seed=seed, enforce=False)
        grown = self.slots[BAD]
        grown.stage, grown.generation, grown.start, grown.target = Stage.HOLDING, 1, 1.0, 1.0
        grown.seed = Command(slot=BAD, op=Op.GERMINATE, blueprint="light", reason="from the beginning")
        self.history[BAD] = [Stage.HOLDING]

    def pay(self) -> float:
        return sum(self._alpha(state) * worth(slot) for slot, state in self.slots.items() if state.seed is not None)


def worth(slot: str) -> float:
    return HELP if slot == GOOD else -HARM


class GrowthWorld(ProbeEnv):
    """N worlds; observations and masks as a policy has them in a run."""

    heads: ClassVar[dict[str, int]] = {
        "op": len(OPTIONS.ops),
        "slot": 2,
        "blueprint": len(CATALOGUE),
        "operator": len(OPTIONS.operators),
        "tempo": len(OPTIONS.tempos),
        "target": len(OPTIONS.targets),
        "speed": len(OPTIONS.speeds),
        "curve": len(OPTIONS.curves),
    }

    def __init__(self, num_envs: int) -> None:
        self.worlds: list[_Paying] = [None] * num_envs  # type: ignore[list-item]
        self.seen: list[Observation] = [None] * num_envs  # type: ignore[list-item]
        self.rows: list[Arrays] = [{}] * num_envs
        self.memories = [Memory() for _ in range(num_envs)]
        self.births: dict[str, int] = {GOOD: 0, BAD: 0}
        self.prunes: dict[str, int] = {GOOD: 0, BAD: 0}
        super().__init__(num_envs)

    def begin(self, rows: np.ndarray) -> None:
        for row in rows.tolist():
            self.worlds[row] = _Paying(int(self.rngs[row].integers(2**31)))
            self.memories[row] = Memory()
            self._look(row)

    def _look(self, row: int) -> None:
        self.seen[row] = self.worlds[row].advance()
        self.memories[row].note(self.seen[row])
        self.rows[row] = arrays_of(self.seen[row], self.memories[row], slots=2, entries=len(CATALOGUE))

    def observe(self) -> Arrays:
        return stack(self.rows)

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        paid, done = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=bool)
        for row, world in enumerate(self.worlds):
            choice = {head: int(actions[head][row]) for head in HEADS}
            commands = to_commands(self.seen[row], choice, OPTIONS, "policy")
            world.apply(commands)  # asserts that each is legal
            for command in commands:
                paid[row] -= PRICE * (command.op is Op.GERMINATE)
                self.births[command.slot] += command.op is Op.GERMINATE
                self.prunes[command.slot] += command.op is Op.PRUNE
            self._look(row)
            paid[row] += world.pay()
            done[row] = world.tick > TICKS
        return paid, done, np.zeros(self.num_envs, dtype=bool)


def play_script(script: Any, env: GrowthWorld) -> np.ndarray:
    """Total rewards [N] of one episode under ``script(observation) -> command or None``, at most one command a tick."""
    env.reset(seed=3)
    totals = np.zeros(env.num_envs)
    for _ in range(TICKS):
        for row, world in enumerate(env.worlds):
            command = script(env.seen[row])
            world.apply([] if command is None else [command])
            totals[row] -= PRICE * (command is not None and command.op is Op.GERMINATE)
            env._look(row)
            totals[row] += world.pay()
    return totals
