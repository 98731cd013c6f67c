"""One rank of a drill: the shipped `Cycle` over a model that is never trained, and the faults that strike it.

    measure   whole numbers that depend on the rank instead of losses and probes, so their sums are exact in any order
    observe, commit, follow   as shipped: encoder, all-reduce, absorb, controller, digests, decoder, reducer, growth

A fault strikes one rank at one tick. A forgery changes what that rank holds, as a flipped bit would: its record, its
clock, a weight. The protocol is never told of a fault; its outcome shows whether it noticed.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from esper.accord.config import GateConfig, SlotsConfig
from esper.accord.effects import Veto
from esper.accord.evidence.lasting import NAMES as CONTINUED
from esper.accord.evidence.lasting import SPENT
from esper.accord.evidence.plan import ProbePlan
from esper.accord.state import RunState, Terms
from esper.drill.answers import sums_of
from esper.drill.bus import Lost
from esper.drill.chain import DIM, ChainHost
from esper.drill.faults import FaultKind, InjectedFault
from esper.kasmina.attach import attach, attach_described
from esper.kasmina.axes.site import Site
from esper.kasmina.slots.grown import Grown
from esper.leyline.alpha import Operator
from esper.leyline.commands import Command
from esper.leyline.observation import HostInfo, Observation
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
from esper.tolaria.lockstep.tick import Cycle, Marks, Measured
from esper.tolaria.lockstep.window import Window
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.world import World

STEPS = 10  # optimizer steps between ticks
PROBE = ProbePlan(samples=1000, clusters=1000, looks=8, reserve=2)
OPERATORS = (Operator.ADD, Operator.MULTIPLY, Operator.GATE)


def build_chain(layers: int, sites: Mapping[str, Site] | None = None) -> Grown:
    """Builds the host with empty slots r0c0, r1c0, ...

    Args:
        layers: number of layers.
        sites: of an earlier host of the same size, which save a dry run; None to find them.
    """
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
    probe: ProbePlan = PROBE,
    tick_steps: int = STEPS,
    names: tuple[str, ...] | None = None,
    max_skips: int = 3,
) -> Terms:
    """The terms of a drill.

    Args:
        sites: by slot.
        ranks: number of ranks.
        slots: budgets.
        gates: thresholds.
        probe: the looks that the probe affords.
        tick_steps: optimizer steps between ticks.
        names: blueprints on offer; None for all that fit.
        max_skips: skipped steps in a row after which the newest blending seed is pruned.
    """
    return build_terms(
        sites,
        slots,
        gates,
        probe=probe,
        host=HostInfo(parameters=len(sites) * DIM * (DIM + 1), flops=None),
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
        world: its place on the bus, or a real world.
        grown: its own model.
        terms: the same on all ranks.
        control: the same on all ranks.
        controller: on rank 0, None elsewhere.
        sink: takes the events.
        growth: of its model; None for the shipped one.
        seed: decides the numbers that it measures.
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
        self.growth, self.owner, self.sink = growth, growth.owner, sink
        settle = growth.settle

        def settle_and_veto(check: Any) -> float:
            waited = settle(check)  # which forgets the vetoes of seeds that pass its check
            self.set_vetoes(self.state)
            return waited

        growth.settle = settle_and_veto  # type: ignore[method-assign]
        lockstep = Lockstep(world, list(grown.slots), terms.names, registry=digest62(list(terms.names)))
        assert isinstance(world.heartbeat, Heartbeat)
        self.heartbeat: Marks = world.heartbeat
        self.narrator, self.window = Narrator(sink, grown), Window(torch.device("cpu"))
        self.kind: FaultKind | None = None
        self.vetoes: Mapping[str, Veto] = {}
        self.controller = controller
        self.state = RunState(slots=terms.first_slots())
        self.step = 0
        self.cycle = Cycle(
            world,
            self.heartbeat,
            grown,
            growth,
            terms=terms,
            control=control,
            lockstep=lockstep,
            narrator=self.narrator,
            window=self.window,
            observers=self.build_observers(),
        )

    def build_observers(self) -> Sequence[Observer]:
        """The observers of its cycle."""
        return [_Strike(self)]

    def tick(
        self, *, fault: InjectedFault | None = None, vetoes: Mapping[str, Veto] | None = None, **values: float
    ) -> RunState:
        """Takes one tick, as the engine does.

        Args:
            fault: strikes if it is this rank's.
            vetoes: this rank's vetoes of its staged seeds.
            values: entries of the observe vector that replace measured ones, such as ``r0c0__nonfinite=1``.
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

    def set_vetoes(self, state: RunState) -> None:
        """Sets this rank's vetoes of this tick. A seed that was not ready before is ready now, unless vetoed again."""
        for slot, veto in list(self.growth.vetoes.items()):
            if veto is Veto.NOT_READY:
                del self.growth.vetoes[slot]
        self.growth.vetoes.update({s: v for s, v in self.vetoes.items() if state.slot(s).staged is not None})

    def lose(self, here: FaultKind) -> None:
        """Removes this rank if its fault is to be lost here."""
        if self.kind is here:
            raise Lost

    def _measure(self, kind: FaultKind | None, values: Mapping[str, float]) -> Measured:
        if kind is FaultKind.MEASURE:
            raise RuntimeError(f"no data on rank {self.world.rank}")
        return {**self.measure_healthy(), **values}, 0

    def measure_healthy(self) -> dict[str, float]:
        """The entries that a healthy rank sends: sums of whole numbers, different ones on each rank."""
        draw = random.Random(f"{self.seed}/{self.world.rank}/{self.state.tick}")
        losses = [draw.randint(1, 9) for _ in range(8)]
        entries: dict[str, float] = {
            "train_loss": sum(losses),
            "train_loss_sq": sum(loss * loss for loss in losses),
            "train_count": 8,
            "train_samples": 8,
            "train_correct": draw.randint(0, 8),
            "host_norm": draw.randint(1, 9),
            "host_norm_steps": 1,
        }
        for entry in self.state.slots:
            slot = entry.slot
            if entry.staged is not None:  # the size of the features that its seed is born to: an RMS of 1
                entries |= {f"{slot}.feature_count": 8, f"{slot}.feature_sq": 8}
            if not entry.stage.has_seed:
                continue
            entries |= {f"{slot}.finite": 1, f"{slot}.owned": 1}
            entries |= {f"{slot}.norm": draw.randint(1, 9), f"{slot}.norm_steps": 1, f"{slot}.health_steps": 1}
            if entry.request is not None:
                gains = [draw.randint(0, 3) for _ in range(4)]
                entries |= {f"{slot}.probe_{name}": value for name, value in sums_of(gains).items()}
        if self.state.continued_slot() is not None:
            entries |= {f"continued_{name}": draw.randint(1, 4) for name in (*CONTINUED, *SPENT)}
        return entries

    def _forge(self, kind: FaultKind | None) -> None:
        live = [entry.slot for entry in self.state.slots if entry.stage.is_live]
        live = [slot for slot in live if self.grown.seed_parameters(slot) > 0]
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
                if not live:
                    raise ValueError("no living seed whose weight could be forged")
                module = self.grown.slots[live[0]]
            with torch.no_grad():
                next(module.parameters()).view(-1)[0] += 1e-3


class _Broken(Scripted):
    """A controller that fails."""

    name = "broken"

    def decide(self, observation: Observation) -> list[Command]:
        raise RuntimeError("out of ideas")


class _Strike(Observer):
    """Strikes a rank between observe and commit, and after the commit; sets its vetoes."""

    name = "strike"

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    def after_observe(self, turn: Turn) -> None:
        """Removes the rank if that is its fault; otherwise sets its vetoes."""
        self.replica.lose(FaultKind.LOST_BEFORE_COMMIT)
        self.replica.set_vetoes(turn.before)

    def after_commit(self, turn: Turn) -> None:
        """Removes the rank if that is its fault."""
        self.replica.lose(FaultKind.LOST_AFTER_COMMIT)
