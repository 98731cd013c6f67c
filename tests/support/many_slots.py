"""A session on a host of many tensors and many slots, of which some are live, and what its ticks and steps cost."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from tests.support.sessions import GATES
from tests.support.tiny import act

WIDTH, EVERY = 6, 3
BORN = 6  # ticks until all seeds are blended


class Many(nn.Module):
    """A chain of sites, and as many further tensors as are asked for."""

    def __init__(self, slots: int, tensors: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.sites = nn.ModuleList(nn.Tanh() for _ in range(slots))
        self.further = nn.ParameterList(nn.Parameter(torch.zeros(2)) for _ in range(tensors - 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for site in self.sites:
            x = site(x)
        return self.head(x) + torch.stack(list(self.further)).sum()


def batch(number: int) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(number)
    return torch.randn(8, WIDTH, generator=stream), torch.randint(0, 3, (8,), generator=stream)


def ask(model: Any, given: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(given[0]), given[1], reduction="none")


@dataclass(frozen=True)
class Cost:
    """Function calls, of Python's and of C's, and processor seconds of this thread: the least of several runs."""

    calls: int
    seconds: float

    def __sub__(self, other: "Cost") -> "Cost":
        return Cost(self.calls - other.calls, self.seconds - other.seconds)


class Crowded:
    """A session with ``live`` blended seeds among ``slots``.

    Args:
        slots: of the host.
        live: of them with a seed, the first ones.
        tensors: parameters of the host.
    """

    def __init__(self, slots: int, live: int, tensors: int) -> None:
        torch.manual_seed(0)
        model = Many(slots, tensors)
        names = [f"r{row}c0" for row in range(slots)]
        grown = esper.attach(model, {slot: f"sites.{i}" for i, slot in enumerate(names)}, batch(0)[0], layout="BC")
        born = [act(1, slot, "GERMINATE", blueprint="lora", ticks=0) for slot in names[:live]]
        self.session = esper.Session(
            grown,
            torch.optim.SGD(model.parameters(), lr=0.01),
            controller={"kind": "schedule", "actions": [*born, *(act(3, slot, "ADVANCE") for slot in names[:live])]},
            loss=ask,
            probe=[batch(1000 + index) for index in range(4)],
            every=EVERY,
            gates=GATES | {"birth_k_se": 1e9, "look_every": 10_000},
            slots={"incubation": "immediate", "max_live": None, "max_parameters": None},
        )
        self.number = 0
        while self.session.state.tick < BORN:
            self.step()
        stages = [self.session.state.slot(slot).stage.name for slot in names]
        assert stages == ["BLENDING"] * live + ["EMPTY"] * (slots - live), stages

    def step(self) -> None:
        """One step; each third one ends in a tick."""
        self.session.loss(batch(self.number)).backward()
        self.session.step()
        self.number += 1

    def costs(self, rounds: int = 3) -> tuple[Cost, Cost]:
        """Of the session's call after backward without a tick, and of the tick that follows every third one.

        The first step after a tick samples the health of gradients, so the second one is taken.
        """
        found: dict[tuple[bool, bool], list[float]] = {}
        for count in [True] * 2 + [False] * rounds:
            assert self.number % EVERY == 0
            self.step()
            for ticks in (False, True):
                self.session.loss(batch(self.number)).backward()
                self.number += 1
                found.setdefault((ticks, count), []).append(measure(self.session.step, count=count))
        step, both = (Cost(int(min(found[ticks, True])), min(found[ticks, False])) for ticks in (False, True))
        return step, both - step


def measure(action: Callable[[], Any], *, count: bool) -> float:
    """Function calls of one run, or its processor seconds."""
    calls = 0

    def note(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before, began = sys.getprofile(), time.thread_time()
    if count:
        sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return calls if count else time.thread_time() - began
