"""Lives of hosts, by the engine and stepped together: the same scripts, and what must be equal after each tick.

A script maps a tick (1 at the first) to what is done at it: commands, and slots whose seed is poisoned with NaN once
the tick's commands are committed.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.accord.state import RunState
from esper.config.tree import EsperConfig
from esper.kasmina.slots.grown import HOST
from esper.leyline.commands import Command
from esper.leyline.events import BirthVetoed, CommandRefused, StageChanged
from esper.leyline.evidence import Reading
from esper.leyline.protocols import Ending
from esper.run.trials.parts import TrialMaker
from esper.run.trials.recipe import make_recipe
from esper.simic.batched import BatchedTrials
from esper.simic.batched.recipe import Recipe
from esper.simic.batched.weights import GATE, Key, Weights
from esper.tamiyo.scripted import Scripted
from esper.tolaria.lockstep.observers import Observer, Turn
from tests.support.rounding import adam_rounding, gate_rounding, moment_rounding, noting_gates, skew_rounding
from tests.support.tiny import events, make_engine

SUMS = ("total", "total_sq", "total_cube", "cross", "cross_sq", "cross_size")
SAMPLES = 64
NORMS = ("host_norm", "gradient_norm")
GRADIENT = 10.0  # times the tolerance of a weight: a gradient is a sum over B T positions of terms of either sign
EPS_DOUBLE = torch.finfo(torch.float64).eps
RICH = 10**15  # FLOPs that no life here spends


@dataclass
class Script:
    """What is done in a life, by tick."""

    commands: dict[int, list[Command]] = field(default_factory=dict)
    poison: dict[int, list[str]] = field(default_factory=dict)


@dataclass
class Seen:
    """One tick of a life.

    Fields:
        state: the record before the commit.
        weights: of all parts after the step before, by owner and name.
        moments: first, second and steps of the same.
        gates: what the terms of gates' gradients add up to, by name, in the step since the tick before with the most.
    """

    state: RunState
    weights: dict[str, Tensor]
    moments: dict[str, dict[str, Any]]
    gates: dict[str, Tensor]


class Eye(Observer):
    """Keeps the state before the commit."""

    name = "eye"
    state: RunState

    def before_commit(self, turn: Turn) -> None:
        self.state = turn.state


class PlainLife:
    """A life by the engine, tick by tick."""

    def __init__(self, config: EsperConfig, folder: Path) -> None:
        self.eye, self.controller = Eye(), Scripted()
        self.engine = make_engine(config, folder, controller=self.controller, observers=[self.eye])
        self.engine.begin(None)
        self.seen: list[Seen] = []

    def tick(self, script: Script, decide: Any = None) -> Seen:
        """Trains to the next tick, notes what is there, and commits what the script says."""
        engine = self.engine
        with noting_gates() as noted:
            while True:
                engine.train_step()
                if engine.tick_due():
                    break
        number = engine.state.tick + 1
        before, gates = self._parts(), {}
        for slot, module in engine.grown.slots.items():
            terms = {} if module.gate is None else noted.get(module.gate, {})
            gates |= {name_of((slot, GATE), name): value for name, value in terms.items()}
        if decide is not None:
            self.controller.decide = lambda seen: script.commands.setdefault(number, list(decide(seen)))  # type: ignore[method-assign]
        else:
            self.controller.commands = script.commands.get(number, [])
        engine.tick()
        self.seen.append(Seen(self.eye.state, *before, gates))
        return self.seen[-1]

    def poison(self, slots: Iterable[str]) -> None:
        """Fills the seeds of these slots with NaN."""
        with torch.no_grad():
            for slot in slots:
                for parameter in self.engine.grown.slots[slot].parameters():
                    parameter.fill_(math.nan)

    def told(self) -> Counter[str]:
        """How often a command was refused, a birth was vetoed (by reason), and a stage was left (by cause)."""
        sink = events(self.engine)
        return Counter(
            ["refused"] * len(sink.of(CommandRefused))
            + [event.reason for event in sink.of(BirthVetoed)]
            + [event.cause for event in sink.of(StageChanged)]
        )

    def _parts(self) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
        named = {name: p for pairs in self.engine.grown.owner_parameters().values() for name, p in pairs}
        return {name: p.detach().clone() for name, p in named.items()}, self.engine.owner.state_by_name(copies=True)


def name_of(key: Key, name: str) -> str:
    """The name in the engine's model of a tensor in a row of weights."""
    owner, part = key
    if owner == HOST:
        return name
    return f"esper_slots.{owner}.{'gate' if part == GATE else 'seed'}.{name}"


MAKER = TrialMaker(lambda config, _: config)


def recipe_of(config: EsperConfig, _seed: int) -> Recipe:
    """The recipe of a trial of this config, which no budget ends."""
    parts = MAKER.trial(config, config.seed)
    steps = config.trainer.total_steps(parts.plan.steps_per_epoch)
    task = replace(parts.task, terms=replace(parts.task.terms, total_steps=steps), budget=RICH)
    return make_recipe(replace(parts, task=task))


def trials_of(configs: Sequence[EsperConfig]) -> BatchedTrials[EsperConfig]:
    """Trials of these configs, begun."""
    trials = BatchedTrials[EsperConfig](len(configs), recipe_of)
    trials.begin_many([(place, config, config.seed) for place, config in enumerate(configs)])
    return trials


def weights_of(trials: BatchedTrials[Any], place: int) -> Weights:
    """The weights among which those of a net lie."""
    band = trials.bands[place]
    assert band is not None
    return band.weights


def keep_going(trials: BatchedTrials[Any]) -> None:
    """Lets trials go on that would be over, as a run does whose poisoned seed is about to be removed."""
    for net in trials.nets:
        if net is not None and net.report is not None:
            net.report = replace(net.report, ending=Ending.RUNNING)


def poison(trials: BatchedTrials[Any], place: int, slots: Iterable[str]) -> None:
    """Fills the seeds of these slots with NaN."""
    for slot in slots:
        for key in weights_of(trials, place).named(place):
            if key[0] == slot:
                block = weights_of(trials, place).blocks[key]
                block.theta[block.nets.index(place)].fill_(math.nan)


def differences(
    mine: Any, theirs: Any, where: str = "", *, rel: float, abs_: float, eps: float = EPS_DOUBLE
) -> list[str]:
    """Where two records differ by more than a tolerance.

    Sums of paired differences, each a small number between two large ones, have more of it: it is meant for a sample.
    What their skewness may be apart follows from how losses are rounded, see `skew_rounding`; a gradient's norm may be
    as far apart as the gradient, see `compare`.
    """
    if isinstance(mine, Reading) and isinstance(theirs, Reading) and None not in (mine.skew, theirs.skew, mine.se):
        off, most = abs(mine.skew - theirs.skew), max(abs_, rel * abs(theirs.skew)) + skew_rounding(theirs, eps)  # type: ignore[operator,arg-type]
        lines = [f"{where}.skew: {mine.skew} {theirs.skew}, more than {most:.3g} apart"] if off > most else []
        mine, theirs = replace(mine, skew=None), replace(theirs, skew=None)
        return lines + differences(mine, theirs, where, rel=rel, abs_=abs_, eps=eps)
    name = where.rpartition(".")[2]
    if name in SUMS:
        abs_ *= SAMPLES
    if name in NORMS:  # | |g| - |g'| | <= |g - g'|
        rel, abs_ = GRADIENT * rel, GRADIENT * abs_
    if isinstance(mine, float) or isinstance(theirs, float):
        if mine is None or theirs is None:
            return [] if mine is theirs else [f"{where}: {mine} {theirs}"]
        same = mine == theirs or (math.isnan(mine) and math.isnan(theirs))
        return [] if same or math.isclose(mine, theirs, rel_tol=rel, abs_tol=abs_) else [f"{where}: {mine} {theirs}"]
    if is_dataclass(mine):
        if type(mine) is not type(theirs):
            return [f"{where}: {mine} {theirs}"]
        pairs: Iterable[tuple[Any, Any, Any]] = [
            (entry.name, getattr(mine, entry.name), getattr(theirs, entry.name)) for entry in fields(mine)
        ]
    elif isinstance(mine, Mapping):
        if set(mine) != set(theirs):
            return [f"{where}: {sorted(mine)} {sorted(theirs)}"]
        pairs = [(name, mine[name], theirs[name]) for name in mine]
    elif isinstance(mine, tuple | list):
        if len(mine) != len(theirs):
            return [f"{where}: {mine} {theirs}"]
        pairs = [(place, a, b) for place, (a, b) in enumerate(zip(mine, theirs, strict=True))]
    else:
        return [] if mine == theirs else [f"{where}: {mine} {theirs}"]
    return [line for name, a, b in pairs for line in differences(a, b, f"{where}.{name}", rel=rel, abs_=abs_, eps=eps)]


def compare(
    trials: BatchedTrials[Any],
    place: int,
    seen: Seen,
    *,
    rel: float,
    abs_: float,
    eps: float = EPS_DOUBLE,
    lr: float = 0.0,
    steps: int = 0,
) -> list[str]:
    """Where a net's record, weights and moments differ from those of a life by the engine, at the same tick.

    Moments are gradients, sums of many numbers of either sign: they may be `GRADIENT` times as far apart as weights.
    With ``lr`` and ``steps``, weights may be as far apart as follows from that, see `adam_rounding`. The gradient of a
    gate is a sum that nearly cancels while its seed does little: it may be off as its terms are, see `gate_rounding`.
    """
    net = trials.nets[place]
    assert net is not None
    lines = differences(net.state, seen.state, "state", rel=rel, abs_=abs_, eps=eps)
    named = {
        name_of(key, name): (key, name, tensor)
        for key, tensors in weights_of(trials, place).named(place).items()
        for name, tensor in tensors.items()
    }
    if set(named) != set(seen.weights):
        return [*lines, f"parts: {sorted(set(named) ^ set(seen.weights))}"]
    for full, (key, name, tensor) in named.items():
        block = weights_of(trials, place).blocks[key]
        at, moments = block.nets.index(place), seen.moments.get(full, {})
        gate = gate_rounding(seen.gates[full], eps) if full in seen.gates else 0.0
        off = adam_rounding(moments, GRADIENT * rel, lr, steps, gate)
        lines += _unequal(full, tensor, seen.weights[full], rel, abs_ + off)
        for flat, kinds in ((block.first, ("exp_avg", "momentum_buffer")), (block.second, ("exp_avg_sq",))):
            mine = block.unpack(flat[at : at + 1])[name][0]
            for kind in kinds:
                theirs = moments.get(kind)
                if theirs is not None:
                    off = moment_rounding(kind, float(theirs.abs().nan_to_num().max()), gate, steps)
                    lines += _unequal(f"{full} {kind}", mine, theirs, GRADIENT * rel, 1e-9 * rel + off)
        if "step" in moments and int(moments["step"]) != block.steps[at]:
            lines.append(f"{full}: {block.steps[at]} updates, {moments['step']}")
    return lines


def _unequal(name: str, mine: Tensor, theirs: Tensor, rel: float, abs_: Tensor | float) -> list[str]:
    largest = theirs.abs().nan_to_num().max().item() if theirs.numel() else 0.0
    off, most = (mine - theirs.to(mine)).abs(), rel * largest + torch.as_tensor(abs_).nan_to_num(0.0).to(mine)
    if bool(((off <= most) | (mine == theirs) | (mine.isnan() & theirs.isnan())).all()):
        return []
    return [f"{name}: {(mine - theirs).abs().max().item():.3g} apart, largest {theirs.abs().max().item():.3g}"]


def take_over(trials: BatchedTrials[Any], place: int, life: PlainLife) -> None:
    """Sets a net's weights, moments and record to those of a life by the engine, after the same commit."""
    weights, moments = life._parts()
    net = trials.nets[place]
    assert net is not None
    net.state = life.engine.state
    for key in list(weights_of(trials, place).named(place)):
        names = list(weights_of(trials, place).blocks[key].shapes)
        fulls = [name_of(key, name) for name in names]
        states = [moments.get(full, {}) for full in fulls]
        zeros = [torch.zeros_like(weights[full]) for full in fulls]
        first = [s.get("exp_avg", s.get("momentum_buffer", zero)) for s, zero in zip(states, zeros, strict=True)]
        second = [s.get("exp_avg_sq", zero) for s, zero in zip(states, zeros, strict=True)]
        steps = max([int(s.get("step", 0)) for s in states], default=0)
        first = [zero if value is None else value for value, zero in zip(first, zeros, strict=True)]
        weights_of(trials, place).write(key, place, [weights[full] for full in fulls], first, second, steps)
