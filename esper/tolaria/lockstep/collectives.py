"""The two collectives of a tick, and the diagnosis when ranks have parted.

Rank 0 decides; every rank, rank 0 included, follows the same commit. The vectors hold numbers whose position is a
function of the agreed state. When a digest differs, every rank sees it in the same reduced vector; then all ranks enter
one diagnostic all-gather, of tensors a few more, and stop with the same text. On a healthy tick there are only the two
all-reduces.
"""

import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from esper.accord.effects import Veto
from esper.accord.lifecycle import SlotState
from esper.accord.state import RunState
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.phases import Phase
from esper.leyline.commands import Command
from esper.leyline.errors import LockstepError
from esper.leyline.orders.verbs import NO_ORDER, RunOrder
from esper.leyline.plain import digest62
from esper.tolaria.lockstep.buffers import own_names
from esper.tolaria.lockstep.differing import find_differing, name_tensors
from esper.tolaria.lockstep.wire import MAY_DIFFER, NOTHING, Agreed, CommitLayout, Failure, ObserveLayout, RankWord
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.ranks.world import World

RUN_DIGESTS = ("tick", "step", "registry", "state", "observation", "parameters", "buffers")
SLOT_DIGESTS = ("record", "alpha", "weights", "newborn")


NEWBORN = " (the new seed computes something else there: is it the same copy of the blueprint's code?)"


def _usual(values: Sequence[int]) -> tuple[int, bool]:
    """The most common value and False; in a tie the value of the first rank that has one and True."""
    present = [value for value in values if value != NOTHING]
    counts = Counter(present).most_common(2)
    tie = len(counts) > 1 and counts[0][1] == counts[1][1]
    return (present[0] if tie else counts[0][0]), tie


def describe_parting(names: Sequence[str], rows: Sequence[Sequence[int]], differing: Sequence[str]) -> str:
    """Names tick, step, fields and ranks; a rank is odd if its value is not the most common one.

    In a tie between values, the odd ranks are those that differ from rank 0.

    Args:
        names: names of all digests.
        rows: values of each rank, in the order of ``names``.
        differing: digests on which the ranks disagree.
    """
    columns = {name: [row[index] for row in rows] for index, name in enumerate(names)}
    parts = []
    for name in differing:
        usual, tie = _usual(columns[name])
        odd = [str(rank) for rank, value in enumerate(columns[name]) if value not in (usual, NOTHING)]
        against = f" from rank {columns[name].index(usual)}" if tie else ""
        advice = NEWBORN if name.endswith(" newborn") else ""
        parts.append(f"{name} differs on rank {', '.join(odd)}{against}{advice}")
    # Not this rank's own tick and step: they may be what differs, and every rank must raise the same text.
    tick, step = _usual(columns["tick"])[0], _usual(columns["step"])[0]
    return f"ranks parted before tick {tick}, step {step}: {'; '.join(parts)}"


class Lockstep:
    """Observe and commit for one run.

    Args:
        world: the ranks.
        slots: slot ids, row-major.
        names: the agreed catalogue of blueprints.
        registry: digest of that catalogue.
        average: names of buffers, with * and ?, that are averaged beside running statistics.
        attribute: whether some ticks carry an attribution.

    Fields:
        local: names of the host's buffers that were found to differ between ranks; no digest covers them.
        news: those of them that nobody was told of yet.

    The layouts of both vectors are fixed by the slot ids, the catalogue and the world size.
    """

    def __init__(
        self,
        world: World,
        slots: Sequence[str],
        names: Sequence[str],
        registry: int,
        *,
        average: Sequence[str] = (),
        attribute: bool = False,
        columns: Sequence[str] = (),
    ) -> None:
        self.world, self.registry = world, registry
        self.slots = list(slots)
        self.digests = [*RUN_DIGESTS, *(f"slot {slot} {field}" for slot in slots for field in SLOT_DIGESTS)]
        self.observe_layout = ObserveLayout(slots, worth=attribute, columns=columns)
        self.commit_layout = CommitLayout(slots, self.digests, names, world.size)
        self._observed = 0
        self._records: dict[str, tuple[SlotState, Phase, int]] = {}
        self._grown: Grown | None = None
        self.average = tuple(average)
        self.local: list[str] = []
        self.news: list[str] = []

    def split_tensors(self, grown: Grown) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What must be equal on all ranks, and the buffers that may turn out to be a rank's own; by name."""
        tensors = grown.model.state_dict()
        own = [name for name in self.may_differ(grown) if name not in self.local]
        equal = {name: tensor for name, tensor in tensors.items() if name not in own and name not in self.local}
        return equal, {name: tensors[name] for name in own}

    def may_differ(self, grown: Grown) -> list[str]:
        """Names of the host's buffers that each rank may fill by itself."""
        return own_names(grown.model, self.average)

    def find_local(self, grown: Grown) -> None:
        """Leaves out of every digest, from now on and on every rank, the buffers that differ; all ranks call it."""
        found = find_differing(self.world, self.split_tensors(grown)[1])
        self.local += found
        self.news += found

    def observe(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums this rank's measurements over all ranks in ONE all-reduce(SUM); returns the agreed sums."""
        vector = self.observe_layout.encode(values, self.world.rank)
        self.world.all_reduce(vector, dist.ReduceOp.SUM, what="observe")
        self._observed = digest_tensors([("observation", vector)])
        return self.observe_layout.decode(vector)

    def digests_of(self, state: RunState, grown: Grown, *, parameters: bool) -> dict[str, int | None]:
        """Digests of this rank's real tensors and real state, by name.

        Args:
            state: agreed state, this tick's evidence included.
            grown: the model.
            parameters: digest all parameters and buffers too, not only live seeds.
        """
        self._grown = grown
        equal, own = self.split_tensors(grown) if parameters else ({}, {})
        records = [self._digest_record(entry, grown.slots[entry.slot].phase) for entry in state.slots]
        digests: dict[str, int | None] = {
            "tick": state.tick,
            "step": state.step,
            "registry": self.registry,
            "state": digest62([replace(state, slots=()), records]),
            "observation": self._observed,
            "parameters": digest_tensors(equal.items()),
            "buffers": digest_tensors(own.items()),
        }
        for entry, record in zip(state.slots, records, strict=True):
            digests[f"slot {entry.slot} record"], digests[f"slot {entry.slot} newborn"] = record, None
            holder = grown.slots[entry.slot]
            seed = holder.seed
            at_rest = holder.phase is Phase.OFF and holder.level == float(holder.alpha) == 0.0
            if seed is None and at_rest:  # it computes nothing
                digests[f"slot {entry.slot} alpha"] = digests[f"slot {entry.slot} weights"] = 0
                continue
            alpha = struct.unpack("<i", struct.pack("<f", float(holder.alpha)))[0] & 0xFFFFFFFF
            ramp = [struct.unpack("<q", struct.pack("<d", x))[0] for x in (holder.level, holder.fade_level)]
            joined = [int(holder.operator), holder.fades_from]
            digests[f"slot {entry.slot} alpha"] = digest62([alpha, ramp, joined])
            live = seed is not None and (entry.stage.is_live or parameters)
            digests[f"slot {entry.slot} weights"] = digest_tensors(holder.state_dict().items()) if live else 0
        return digests

    def _digest_record(self, entry: SlotState, phase: Phase) -> int:
        """Digest of a slot's record; computed anew only when the record or the phase is another object than before."""
        known = self._records.get(entry.slot)
        if known is None or known[0] is not entry or known[1] is not phase:
            known = self._records[entry.slot] = entry, phase, digest62([entry, phase.value])
        return known[2]

    def newborn_digests(self, newborns: Mapping[str, int | None]) -> dict[str, int | None]:
        """Digests by name of what staged seeds compute, as `Growth` has them by slot."""
        return {f"slot {slot} newborn": digest for slot, digest in newborns.items()}

    def commit(
        self,
        state: RunState,
        commands: Mapping[str, Command] | None,
        digests: Mapping[str, int | None],
        vetoes: Mapping[str, Veto],
        word: RankWord,
        failure_text: str = "",
        order: RunOrder = NO_ORDER,
    ) -> Agreed:
        """Sends commands, digests and vetoes in ONE all-reduce(MAX); returns the agreed commit.

        Args:
            state: names the tick in an error.
            commands: one per slot on rank 0, None elsewhere.
            digests: from `digests_of`, with `newborn_digests`.
            vetoes: this rank's vetoes by slot.
            word: this rank's word.
            failure_text: what failed here, if ``word.failure`` is set.
            order: the order to the whole run, on rank 0.

        Raises:
            LockstepError: ranks differ, or one of them failed; every rank raises the same text.
        """
        vector = self.commit_layout.encode(self.world.rank, commands, digests, vetoes, word, order)
        self.world.all_reduce(vector, dist.ReduceOp.MAX, what="commit")
        agreed = self.commit_layout.decode(vector)
        failed = [rank for rank, other in enumerate(agreed.ranks) if other.failure is not Failure.NONE]
        if failed:
            texts = self.world.gather_text(failure_text, what="diagnosis")
            parts = [f"rank {rank} failed in {agreed.ranks[rank].failure.name}: {texts[rank]}" for rank in failed]
            raise LockstepError(f"tick {state.tick}, step {state.step}: {'; '.join(parts)}")
        parted = [name for name in agreed.differing if name not in MAY_DIFFER]
        if parted:
            own = [digests[name] for name in self.digests]
            row = torch.tensor([NOTHING if digest is None else digest for digest in own], dtype=torch.int64)
            rows = [other.tolist() for other in self.world.all_gather(row, what="diagnosis")]
            text = describe_parting(self.digests, rows, parted)
            if self._grown is not None:
                skipped = {*self.split_tensors(self._grown)[1], *self.local}
                text += name_tensors(self.world, self._grown, parted, but=skipped)
            raise LockstepError(text)
        if agreed.differing and self._grown is not None:
            self.find_local(self._grown)
        return agreed
