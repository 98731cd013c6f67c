"""One rank of a drill: the shipped `Cycle` over a model that is never trained, and the faults that strike it.

    measure   rank-dependent whole numbers in the place of losses and probes, so that their sums are exact in any order
    observe, commit, follow   as shipped: encoder, all-reduce, absorb, controller, digests, decoder, reducer, growth

A fault strikes one rank at one tick. Forgeries change what that rank holds, as a flipped bit would: its record, its
clock, a weight. What comes of it is read off the outcome, never told to the protocol.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import nn

from esper.accord.config import GateConfig, SlotsConfig
from esper.accord.effects import Veto
from esper.accord.state import RunState, Terms
from esper.drill.bus import Lost
from esper.kasmina.attach import attach, attach_described
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import Site
from esper.leyline.alpha import Operator
from esper.leyline.commands import Command
from esper.leyline.observation import Observation
from esper.leyline.plain import digest62
from esper.leyline.protocols import Controller, EventSink
from esper.leyline.stages import Stage
from esper.tamiyo.scripted import Scripted
from esper.tolaria.growth.config import OptimConfig
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.growth.terms import build_terms
from esper.tolaria.lockstep.collectives import Lockstep
from esper.tolaria.lockstep.narrate import Narrator
from esper.tolaria.lockstep.observers import Observer, Turn
from esper.tolaria.lockstep.tick import Cycle, Measured
from esper.tolaria.lockstep.window import Window
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.world import World

DIM = 4
STEPS = 10  # optimizer steps between ticks
OPERATORS = (Operator.ADD, Operator.MULTIPLY, Operator.GATE)


class FaultKind(StrEnum):
    """What can happen to a rank in a tick; the first three take it away."""

    LOST_BEFORE_OBSERVE = "lost before observe"
    LOST_BEFORE_COMMIT = "lost between observe and commit"
    LOST_AFTER_COMMIT = "lost after commit"
    MEASURE = "failure in measure"
    DECIDE = "failure in the controller"
    STAGE = "forged stage"
    TICK = "forged tick"
    STEP = "forged step"
    ALPHA = "forged alpha"
    WEIGHT = "forged seed weight"
    HOST = "forged host weight"

    @property
    def loses(self) -> bool:
        """It takes the rank away."""
        return self in (FaultKind.LOST_BEFORE_OBSERVE, FaultKind.LOST_BEFORE_COMMIT, FaultKind.LOST_AFTER_COMMIT)


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """One fault: what, on which rank, at which tick."""

    kind: FaultKind
    rank: int
    tick: int


class ChainHost(nn.Module):
    """A host with a site behind each of its layers; features BC."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, DIM]."""
        for layer in self.layers:
            x = layer(x)
        return x


def build_chain(layers: int, sites: Mapping[str, Site] | None = None) -> Grown:
    """The host with empty slots r0c0, r1c0, ...; given sites of an earlier one, without a dry run."""
    torch.manual_seed(0)
    host = ChainHost(layers)
    if sites is not None:
        return attach_described(host, sites)
    return attach(host, {f"r{row}c0": f"layers.{row}" for row in range(layers)}, torch.ones(2, DIM))


def terms_for(
    sites: Mapping[str, Site],
    ranks: int,
    slots: SlotsConfig,
    gates: GateConfig,
    *,
    tick_steps: int = STEPS,
    names: tuple[str, ...] | None = None,
    max_skips: int = 3,
) -> Terms:
    """Terms of a drill; ``names`` are the blueprints on offer, all that fit without."""
    return build_terms(
        sites,
        slots,
        gates,
        class_logits=False,
        total_steps=1_000_000,
        tick_steps=tick_steps,
        max_skips=max_skips,
        world_size=ranks,
        costs=None,
        names=names,
        operators=OPERATORS,
    )


class Replica:
    """A rank that takes ticks.

    Args:
        world: its place on the bus, or a real one. grown: its own model. terms, control: the same on all ranks.
        controller: on rank 0, None elsewhere. sink: of events. growth: of its model; None: the shipped one.
        seed: of the numbers it measures.
    """

    def __init__(
        self,
        world: World,
        grown: Grown,
        terms: Terms,
        control: ControlConfig,
        *,
        controller: Controller | None,
        sink: EventSink,
        growth: Growth | None = None,
        seed: int = 0,
    ) -> None:
        self.world, self.grown, self.terms, self.control, self.seed = world, grown, terms, control, seed
        if growth is None:
            owner = ParameterOwner(grown, OptimConfig(), terms.total_steps)
            growth = Growth(grown, owner, world, terms, run_seed=1, dtype=torch.float32)
        self.growth = growth
        lockstep = Lockstep(world, list(grown.slots), terms.names, registry=digest62(list(terms.names)))
        assert world.heartbeat is not None
        self.cycle = Cycle(
            world,
            world.heartbeat,
            grown,
            growth,
            terms=terms,
            control=control,
            lockstep=lockstep,
            narrator=Narrator(sink, grown),
            window=Window(torch.device("cpu")),
            observers=[_Strike(self)],
        )
        self.kind: FaultKind | None = None
        self.vetoes: Mapping[str, Veto] = {}
        self.controller = controller
        self.state = RunState(slots=terms.first_slots())
        self.step = 0

    def tick(
        self, *, fault: InjectedFault | None = None, vetoes: Mapping[str, Veto] | None = None, **values: float
    ) -> RunState:
        """One tick, as the engine takes it.

        Args:
            fault: strikes if it is this rank's. vetoes: what this rank says of its staged seeds.
            values: entries of the observe vector in the place of what would be measured, ``r0c0__nonfinite=1``.
        """
        kind = self.kind = fault.kind if fault is not None and fault.rank == self.world.rank else None
        self.vetoes = vetoes or {}
        self.step += self.terms.tick_steps
        for entry in self.state.slots:
            self.grown.slots[entry.slot].set_alpha(entry.alpha(self.step), entry.fade(self.step))
        self._forge(kind)
        self.lose(FaultKind.LOST_BEFORE_OBSERVE)
        given = {key.replace("__", "."): value for key, value in values.items()}
        controller = self.controller
        if kind is FaultKind.DECIDE and controller is not None:
            controller = _Broken()
        self.cycle.window.first_skipped = self.step
        turn = self.cycle.tick(
            self.state, lambda: self._measure(kind, given), controller, step=self.step, epoch=1, lr=0.0
        )
        self.state = turn.state
        return self.state

    def say_vetoes(self, state: RunState) -> None:
        """Makes this rank's vetoes those of this tick: what was not ready is by now, unless said again."""
        for slot, veto in list(self.growth.vetoes.items()):
            if veto is Veto.NOT_READY:
                del self.growth.vetoes[slot]
        self.growth.vetoes.update({s: v for s, v in self.vetoes.items() if state.slot(s).staged is not None})

    def lose(self, here: FaultKind) -> None:
        """Takes this rank away if that is its fault and its place."""
        if self.kind is here:
            raise Lost

    def _measure(self, kind: FaultKind | None, values: Mapping[str, float]) -> Measured:
        if kind is FaultKind.MEASURE:
            raise RuntimeError(f"no data on rank {self.world.rank}")
        return {**self.measured(), **values}, 0

    def measured(self) -> dict[str, float]:
        """What a healthy rank sends: sums of whole numbers, other ones on each rank."""
        draw = random.Random(f"{self.seed}/{self.world.rank}/{self.state.tick}")
        losses = [draw.randint(1, 9) for _ in range(8)]
        found: dict[str, float] = {
            "train_loss": sum(losses),
            "train_count": 8,
            "train_samples": 8,
            "train_correct": draw.randint(0, 8),
            "host_norm": draw.randint(1, 9),
            "host_norm_steps": 1,
        }
        for entry in self.state.slots:
            slot = entry.slot
            if not entry.stage.has_seed:
                continue
            found |= {f"{slot}.finite": 1, f"{slot}.owned": 1}
            found |= {f"{slot}.norm": draw.randint(1, 9), f"{slot}.norm_steps": 1, f"{slot}.health_steps": 1}
            if entry.request is not None:
                gains = [draw.randint(0, 3) for _ in range(4)]
                for name, power in (("sum", 1), ("sum_sq", 2), ("sum_cube", 3)):
                    found[f"{slot}.probe_{name}"] = sum(gain**power for gain in gains)
                found[f"{slot}.probe_count"] = len(gains)
        return found

    def _forge(self, kind: FaultKind | None) -> None:
        living = [entry.slot for entry in self.state.slots if entry.stage.is_live]
        living = [slot for slot in living if self.grown.seed_parameters(slot) > 0]
        if kind is FaultKind.STAGE:
            first = self.state.slots[0]
            other = Stage.EMBARGOED if first.stage is not Stage.EMBARGOED else Stage.PRUNED
            self.state = self.state.with_slots({first.slot: replace(first, stage=other)})
        elif kind is FaultKind.TICK:
            self.state = replace(self.state, tick=self.state.tick + 1)
        elif kind is FaultKind.STEP:
            self.step += 1
        elif kind is FaultKind.ALPHA:
            self.grown.slots[self.state.slots[0].slot].alpha.fill_(0.625)
        elif kind in (FaultKind.WEIGHT, FaultKind.HOST):
            module = self.grown.model
            if kind is FaultKind.WEIGHT:
                if not living:
                    raise ValueError("no living seed whose weight could be forged")
                module = self.grown.slots[living[0]]
            with torch.no_grad():
                next(module.parameters()).view(-1)[0] += 1e-3


class _Broken(Scripted):
    """A controller that fails."""

    name = "broken"

    def decide(self, observation: Observation) -> list[Command]:
        raise RuntimeError("out of ideas")


class _Strike(Observer):
    """Strikes a rank between observe and commit, and after the commit; says its vetoes."""

    name = "strike"

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    def after_observe(self, turn: Turn) -> None:
        """Takes the rank away, or has it say its vetoes."""
        self.replica.lose(FaultKind.LOST_BEFORE_COMMIT)
        self.replica.say_vetoes(turn.before)

    def after_commit(self, turn: Turn) -> None:
        """Takes the rank away."""
        self.replica.lose(FaultKind.LOST_AFTER_COMMIT)
