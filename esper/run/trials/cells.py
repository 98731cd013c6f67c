"""Trials under scripted or learned controllers, many at once: what arms of a comparison come to in tasks.

A *cell* is one arm in one task with one seed. Cells of one task and seed share first weights, data and its order, and
spend the same FLOPs by the record's account. Hosts of one shape are stepped together; which cells run beside one
changes none of its numbers.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from esper.leyline.commands import Command
from esper.leyline.protocols import Controller, Ending, Report, Trials
from esper.run.trials.config import trial_config
from esper.run.trials.parts import TrialMaker
from esper.run.trials.recipe import batched_trials
from esper.simic.env.tasks import GrowthTask
from esper.tamiyo.policy.arrays import arrays_of, stack, to_batch
from esper.tamiyo.policy.memory import Memory
from esper.tamiyo.policy.network import GrowthAgent
from esper.tamiyo.policy.options import to_commands
from esper.tamiyo.registry import build_controller


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What decides in a cell.

    Fields:
        controller: settings of a controller of a run, a trained policy, or a function that makes a controller of a
            host's slots and a seed; None never grows.
        planted: seeds that are there from the first step, blueprint by slot.
        sampled: a policy's decisions are drawn; else each is the likeliest.
    """

    controller: Any = None
    planted: Mapping[str, str] = field(default_factory=dict)
    sampled: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One trial of a comparison."""

    task: str
    seed: int
    arm: str


def draws_seed(cell: Cell) -> int:
    """Seed of what a cell's controller draws: by task as well, since one luck in all tasks would count as one draw."""
    return int.from_bytes(hashlib.sha256(f"{cell.seed} {cell.task}".encode()).digest()[:6], "big")


@dataclass(frozen=True, slots=True)
class Point:
    """One tick of a cell.

    Fields:
        flops: spent by then.
        spent: the same as a share of the budget.
        loss: validation loss, nats per sample; infinite where the host has come apart.
        size: parameters of the host and of every seed that is in it, relative to the bare host.
        births: seeds that have entered by then.
        prunes: seeds that have been pruned by then.
    """

    flops: int
    spent: float
    loss: float
    size: float
    births: int
    prunes: int


@dataclass(frozen=True, slots=True)
class Job:
    """A task with the seeds that are planted in its host; what trials are made of here."""

    task: GrowthTask
    planted: tuple[tuple[str, str], ...]

    def config(self, seed: int, settings: Mapping[str, Any]) -> Any:
        """The config of a trial."""
        planted: dict[str, Any] = {"slots.planted": dict(self.planted)} if self.planted else {}
        return trial_config(self.task, seed, {**settings, **planted})


class Deciders:
    """What decides in each place; policies of one agent decide for all their places at once."""

    def __init__(self, places: int) -> None:
        self._arms: list[Arm] = [Arm()] * places
        self._scripted: list[Controller | None] = [None] * places
        self._memory = [Memory() for _ in range(places)]
        self._core: list[torch.Tensor] = [torch.zeros(0)] * places
        self._draws = [torch.Generator() for _ in range(places)]

    def begin(self, place: int, arm: Arm, report: Report, seed: int) -> None:
        """A trial begins."""
        self._arms[place], self._scripted[place] = arm, None
        if isinstance(arm.controller, GrowthAgent):
            self._memory[place] = Memory()
            self._core[place] = arm.controller.begin(1)[0]
            self._draws[place] = torch.Generator().manual_seed(seed)
        elif arm.controller is not None:
            slots = tuple(view.slot for view in report.observation.slots)
            make = arm.controller if callable(arm.controller) else partial(build_controller, arm.controller)
            self._scripted[place] = make(slots=slots, seed=seed)

    def decide(self, reports: Mapping[int, Report]) -> dict[int, list[Command]]:
        """The commands for the hosts in these places."""
        said: dict[int, list[Command]] = {place: [] for place in reports}
        agents: dict[tuple[int, bool], list[int]] = {}
        for place, report in reports.items():
            scripted, arm = self._scripted[place], self._arms[place]
            if scripted is not None:
                said[place] = list(scripted.decide(report.observation))
            elif arm.controller is not None:
                self._memory[place].note(report.observation)
                agents.setdefault((id(arm.controller), arm.sampled), []).append(place)
        for chosen in agents.values():
            said |= self._let_policy(chosen, [reports[place] for place in chosen])
        return said

    def _let_policy(self, chosen: Sequence[int], reports: Sequence[Report]) -> dict[int, list[Command]]:
        arm = self._arms[chosen[0]]
        agent: GrowthAgent = arm.controller
        seen = [report.observation for report in reports]
        room = {
            "slots": max(len(one.slots) for one in seen),
            "entries": max(len(view.catalogue) for one in seen for view in one.slots),
        }
        rows = [
            arrays_of(one, self._memory[place], layout=agent.layout, options=agent.options, **room)
            for one, place in zip(seen, chosen, strict=True)
        ]
        core = torch.stack([self._core[place] for place in chosen])
        draws = [self._draws[place] for place in chosen] if arm.sampled else None
        decision = agent.act(to_batch(stack(rows)), core, generators=draws)
        said = {}
        for row, place in enumerate(chosen):
            self._core[place] = decision.state[row]
            choice = {head: int(option[row]) for head, option in decision.actions.items()}
            said[place] = to_commands(seen[row], choice, agent.options)
        return said


def make_batched(places: int, settings: Mapping[str, Any]) -> Trials[Job]:
    """Hosts that are stepped together."""
    return batched_trials(places, TrialMaker(lambda job, seed: job.config(seed, settings)))


def run_cells(
    cells: Sequence[Cell],
    arms: Mapping[str, Arm],
    tasks: Mapping[str, GrowthTask],
    *,
    places: int = 64,
    settings: Mapping[str, Any] | None = None,
    make_trials: Callable[[int, Mapping[str, Any]], Trials[Job]] = make_batched,
) -> Iterator[tuple[Cell, list[Point]]]:
    """Runs cells, ``places`` at a time, and yields each with its curve as soon as it ends.

    Args:
        cells: in the order in which they begin.
        arms: by name.
        tasks: by name.
        places: hosts at a time.
        settings: of every trial, by dotted path.
        make_trials: makes hosts.
    """
    places = min(places, len(cells))
    if not places:
        return
    trials, deciders = make_trials(places, settings or {}), Deciders(places)
    running: dict[int, Cell] = {}
    reports: dict[int, Report] = {}
    curves: dict[int, list[Point]] = {}
    waiting = list(cells)
    while waiting or running:
        free = [place for place in range(places) if place not in running]
        if waiting and (4 * len(free) >= places or not running):  # beginners train their first tick together
            begun = list(zip(free, waiting, strict=False))
            del waiting[: len(begun)]
            jobs = [(p, Job(tasks[c.task], tuple(sorted(arms[c.arm].planted.items()))), c.seed) for p, c in begun]
            for (place, cell), report in zip(begun, trials.begin_many(jobs), strict=True):
                running[place], reports[place], curves[place] = cell, report, [_point(report, None)]
                deciders.begin(place, arms[cell.arm], report, draws_seed(cell))
        said = deciders.decide({p: reports[p] for p in running if reports[p].ending is Ending.RUNNING})
        advanced = trials.advance([said.get(place, []) for place in range(places)])
        for place, cell in list(running.items()):
            if reports[place].ending is Ending.RUNNING:
                reports[place] = advanced[place]
                curves[place].append(_point(advanced[place], curves[place][-1]))
            if reports[place].ending is not Ending.RUNNING:
                del running[place]
                yield cell, curves[place]


def _point(report: Report, before: Point | None) -> Point:
    loss = report.validation_loss.value
    apart = loss is None or report.ending is Ending.DIVERGED
    births, prunes = (before.births, before.prunes) if before else (0, 0)
    return Point(
        report.flops,
        report.flops / report.budget,
        math.inf if apart or loss is None else loss,
        report.parameters / report.observation.host.parameters,
        births + report.births,
        prunes + report.prunes,
    )
