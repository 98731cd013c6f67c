"""Continues a network in throw-away copies, with one seed and without it: what would the host have learned by itself?

    base = the network put aside            (copy of model, moments; at the tick after the continuation was asked for)
    for each order of batches, for each of {with, without}
        copy of the base  ->  n1 steps  ->  losses of the probe  ->  n2 - n1 steps  ->  losses  ->  dropped

Both copies of a pair take the same batches under the same random stream. The steps are taken in pieces, one a tick:
`esper.accord.evidence.continuing` says how many there are, and when it is over. No rank talks to another: every rank
takes the same steps and then judges its own share of the probe, so copies cost no gradient reduction. Weights, moments,
statistics and random streams of the network that trains are left as they are. Two copies of the model and its moments
live at a time, the base and the one that is trained.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.accord.config import Baseline, EvidencePolicy, GateConfig
from esper.accord.evidence.continuing import steps_due
from esper.accord.evidence.lasting import COPIES, SPENT, marks_of
from esper.accord.state import Continuing, RunState
from esper.kasmina.export.copying import computed_tensors
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.phases import Phase
from esper.kasmina.streams import Streams, cuda_devices, read_streams, set_streams, undisturbed
from esper.leyline.errors import CheckpointError, one_line
from esper.leyline.plain import from_plain, to_plain
from esper.nissa.lane import say
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.lasting import lasting_sums
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.growth.planting import load_weights


def copy_owner(owner: ParameterOwner) -> ParameterOwner:
    """A copy of an optimizer's owner with its model; regions that were compiled run eagerly in it."""
    made = copy.deepcopy(owner, computed_tensors(owner.grown.model))
    for holder in made.grown.slots.values():
        holder.region = None
    return made


def describe_copies(grown: Grown, gates: GateConfig) -> str:
    """What continuations hold in memory at most, in words; empty if there are none."""
    if gates.baseline is not Baseline.CONTINUED or gates.evidence is not EvidencePolicy.ENFORCE:
        return ""
    tensors = (*grown.model.parameters(), *grown.model.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6
    return f"2 of the network, {size:.3g} MB each and their moments, on every rank while a seed is continued"


@dataclass(frozen=True, slots=True)
class Base:
    """The network that copies are made of.

    Fields:
        owner: a copy of the one that trains.
        record: the agreed state that the network followed when it was put aside.
        step: optimizer steps done.
    """

    owner: ParameterOwner
    record: RunState
    step: int

    @classmethod
    def take(cls, owner: ParameterOwner, record: RunState, step: int) -> "Base":
        """Copies the network, with the alphas of optimizer step ``step``."""
        made = copy_owner(owner)
        for entry in record.slots:
            made.grown.slots[entry.slot].set_alpha(entry.alpha(step), entry.fade(step))
        return cls(made, record, step)

    def serves(self, asked: Continuing) -> bool:
        """Whether it was put aside for this continuation."""
        own = self.record.continuing
        return own is not None and (own.slot, own.tick) == (asked.slot, asked.tick)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lessons:
    """What copies learn from and are judged by.

    Fields:
        batch: the batch of a further step, from 0; the second order takes them backwards.
        learn: the training loss of each sample of a batch, [B], by a model that is in train().
        judge: the loss of each probe sample of this rank, [N].
        clusters: number of each of these samples' cluster, from 0, int64 [N]; None: each sample is one.
        seed: of the random streams in both copies of a pair.
        scale: factor of the loss in backward, for half precision.
    """

    batch: Callable[[int], Any]
    learn: Callable[[Grown, Any], Tensor]
    judge: Callable[[Grown], Tensor]
    clusters: Tensor | None
    seed: int
    scale: float = 1.0


class Continuation:
    """The copies of one seed, trained piece by piece.

    Args:
        base: the network.
        slot: the slot that holds the seed.
        lessons: batches, losses, random streams.
        steps: further steps n of each copy.

    Fields:
        done: steps that all copies together have taken.
        losses: of each copy that was judged, at both marks; float64 [N] each.
    """

    def __init__(self, base: Base, slot: str, lessons: Lessons, steps: int) -> None:
        self.base, self.slot, self.lessons, self.steps = base, slot, lessons, steps
        self.done, self.losses = 0, [[] for _ in range(COPIES)]  # type: tuple[int, list[list[Tensor]]]
        self._made: ParameterOwner | None = None
        self._streams: Streams | None = None

    def advance(self, until: int) -> dict[str, float]:
        """Trains copies until they have taken ``until`` steps together; returns `SPENT`, this rank's samples."""
        spent = dict.fromkeys(SPENT, 0.0)
        while self.done < until:
            number, index = divmod(self.done, self.steps)
            if self._made is None:
                self._made = self._copy(keep=number % 2 == 0)
            last = min(self.steps, index + until - self.done)
            trained, judged = self._train(self._made, number, range(index, last))
            which = "kept" if number % 2 == 0 else "without"
            spent[f"trained_{which}"] += trained
            spent[f"judged_{which}"] += judged
            self.done += last - index
            if last == self.steps:
                self._made = self._streams = None
        return spent

    def sums(self) -> dict[str, float]:
        """`lasting_sums`, once all steps are taken."""
        with_1, without_1, with_2, without_2 = (torch.stack(marks) for marks in self.losses)
        return lasting_sums([(with_1, without_1), (with_2, without_2)], self.lessons.clusters)

    def _copy(self, *, keep: bool) -> ParameterOwner:
        made = copy_owner(self.base.owner)
        if not keep:
            made.release(self.slot)
            made.grown.slots[self.slot].uproot()
        for other, holder in made.grown.slots.items():
            if holder.seed is not None and holder.phase is Phase.OFF:  # it learns in shadows, which copies do without
                made.set_learning(other, False)
        return made

    def _train(self, made: ParameterOwner, number: int, steps: range) -> tuple[int, int]:
        """Takes some steps of a copy; returns the samples that it was trained on, and those that it was judged on."""
        grown, lessons, trained, judged = made.grown, self.lessons, 0, 0
        devices = cuda_devices(grown.model)
        learn_steps = {entry.slot: entry.learn_step for entry in self.base.record.slots}
        with undisturbed(grown.model, seed=lessons.seed):
            if self._streams is not None:
                set_streams(self._streams, devices)
            for index in steps:
                losses_B = lessons.learn(grown, lessons.batch(index if number < 2 else self.steps - 1 - index))
                made.set_lr(self.base.step + index, learn_steps)
                (losses_B.mean() * lessons.scale).backward()
                if lessons.scale != 1.0:
                    for parameter in grown.model.parameters():
                        if parameter.grad is not None:
                            parameter.grad.div_(lessons.scale)
                made.step()
                trained += len(losses_B)
                if index + 1 in marks_of(self.steps):
                    losses_N = lessons.judge(grown).double().cpu()
                    self.losses[number].append(losses_N)
                    judged += len(losses_N)
            self._streams = read_streams(devices)
        return trained, judged


class Copies:
    """The continuation that is under way on this rank, if there is one."""

    def __init__(self) -> None:
        self._base: Base | None = None
        self._course: Continuation | None = None

    def drop(self) -> None:
        """Lets go of all copies."""
        self._base = self._course = None

    def take_piece(
        self,
        state: RunState,
        owner: ParameterOwner,
        gates: GateConfig,
        step: int,
        teach: Callable[[Base], Lessons],
    ) -> dict[str, float]:
        """Takes the next piece of the continuation that the agreed state asks for; without one, lets go of copies.

        Args:
            state: agreed at the last tick.
            owner: of the network that trains.
            gates: say how long it is, and how large a piece.
            step: optimizer steps done.
            teach: what copies of a base learn from.

        Returns:
            This rank's sums: `SPENT`, and after the last piece `lasting_sums`; empty if none is asked for. An error of
            the copies is told, and is no evidence on any rank.
        """
        asked = state.continuing
        if asked is None or state.continued_slot() is None:
            self.drop()
            return {}
        try:
            if self._base is None or not self._base.serves(asked):
                self.drop()
                self._base = Base.take(owner, state, step)
            if self._course is None:
                self._course = Continuation(self._base, asked.slot, teach(self._base), gates.continue_steps)
                self._course.advance(asked.done)  # after a resume; what it costs is on the account already
            spent = self._course.advance(steps_due(asked, gates))
            if self._course.done < COPIES * gates.continue_steps:
                return spent
            spent |= self._course.sums()
        except Exception as error:  # of the model, the optimizer or memory: copies are no reason to end a run
            say(f"a network could not be continued in copies ({one_line(error)}); gates.baseline=standing does without")
            spent = {"nonfinite": 1.0}
        self.drop()
        return spent

    def saved(self) -> dict[str, Any]:
        """The base, for a checkpoint, equal on all ranks: plain data and tensors that do not change; empty without."""
        base = self._base
        if base is None:
            return {}
        return {
            "run_state": to_plain(base.record),
            "step": base.step,
            "model": dict(base.owner.grown.model.state_dict()),
            "optimizer": base.owner.state_by_name(copies=False),
        }

    def rebuild(self, saved: Mapping[str, Any], growth: Growth, where: str) -> None:
        """Takes up the base of a checkpoint. The network that trains is what the base was then, until it is restored.

        Args:
            saved: by `saved`.
            growth: of the network that trains.
            where: the checkpoint, for an error.

        Raises:
            CheckpointError: it does not fit this model.
        """
        try:
            record = from_plain(RunState, saved["run_state"], "continuation.run_state")
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        growth.clear()
        growth.plant_record(record)
        load_weights(growth.grown, saved["model"], where)
        growth.owner.load_by_name(saved["optimizer"])
        growth.seat(record)
        self.drop()
        self._base = Base.take(growth.owner, record, int(saved["step"]))
