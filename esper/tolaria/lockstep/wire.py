"""The two vectors of a tick: names, layout, encoding.

observe   float64, SUM.  What each rank measured since the last tick. An entry is *additive* (each rank sends its part)
          or *replicated* (equal on all ranks by construction, sent by rank 0 alone). A term that is not finite is sent
          as 0 and counted, so that one NaN cannot hide the rest. Validation, each probe and each gate have a count of
          their own, so that a sum that failed is absent and never a zero.
commit    int64, MAX.    Rank 0's commands (the others send the smallest int64); pairs (d, -d) of every digest, so that
          max(d) = min(d) exactly where all ranks agree; a veto code per slot; a word per rank; four words of an
          order to the whole run, from rank 0. A rank that has nothing to compare sends the smallest int64 twice, and
          the others agree among themselves.

Both layouts are pure functions of the slot ids and the world size, because a mismatched all-reduce would return wrong
numbers without an error. Eight int64 words make a command: proposal, op, catalogue index, operator, curve, ticks, and
target and steepness as float64 bits. At 1,024 ranks and 12 slots: 3.3 KB observe + 10.0 KB commit = 13.3 KB a tick.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from esper.accord.effects import Veto
from esper.accord.evidence.lasting import NAMES as CONTINUED
from esper.accord.evidence.lasting import SPENT
from esper.accord.evidence.sums import NAMES as PROBE
from esper.leyline.commands import Command, wait
from esper.leyline.evidence import WORTH_PAIRS
from esper.leyline.orders.verbs import NO_ORDER, RunOrder, RunVerb
from esper.tolaria.lockstep.words import WAITING, WORDS, decode_command, encode_command

NOTHING = -(2**63)
MAY_DIFFER = frozenset({"buffers"})  # digests whose difference is told and ends nothing
ORDER_WORDS = 4

GLOBAL_ADDITIVE = (
    "train_loss",
    "train_loss_sq",
    "train_count",
    "train_correct",
    "train_samples",
    "validation_loss",
    "validation_loss_sq",
    "validation_correct",
    "validation_correct_sq",
    "validation_count",
    "validation_nonfinite",
    "stop",
    *(f"continued_{name}" for name in CONTINUED),
    *(f"continued_{name}" for name in SPENT),
    "continued_left_out",
    "continued_nonfinite",
    "nonfinite_terms",
)
HEALTH = (  # as in `OwnerHealth`
    *("vanishing", "exploding", "health_steps", "nans", "infs", "moved", "moved_steps"),
    *("numbers", "update_rms", "update_steps"),
)
GLOBAL_REPLICATED = (
    "host_norm",
    "host_norm_steps",
    "skipped",
    "skipped_in_row",
    "longest_row",
    *(f"host_{name}" for name in HEALTH),
)
SLOT_ADDITIVE = (
    *(f"probe_{name}" for name in PROBE),
    "probe_nonfinite",
    "probe_left_out",
    "finite",
    "owned",
    "degraded",
    "gate_count",
    "gate_sum",
    "gate_sum_sq",
    "gate_nonfinite",
    "feature_count",
    "feature_sq",
)
WORTH = ("count", "together", "together_sq", "nonfinite", "flops")
SLOT_WORTH = (
    *(f"{name}{power}" for name in ("solo", "without", "shapley") for power in ("", "_sq")),
    "nonfinite",
    *(f"pair{k}" for k in range(WORTH_PAIRS)),
)
SLOT_REPLICATED = ("norm", "norm_steps", "nonfinite", *HEALTH)


class Failure(IntEnum):
    """An exception on one rank that ends the run on every rank; 0 if there is none."""

    NONE = 0
    MEASURE = 1
    DECIDE = 2


class SaveWord(IntEnum):
    """The state of a rank's share of the save in flight."""

    NONE = 0
    WRITTEN = 1
    FAILED = 2
    WRITING = 3


@dataclass(frozen=True, slots=True)
class RankWord:
    """One rank's element of the commit vector: its failure, its save, and its number of non-finite losses (capped)."""

    failure: Failure = Failure.NONE
    save: SaveWord = SaveWord.NONE
    nonfinite_losses: int = 0

    def encode(self) -> int:
        """A non-negative int64."""
        return int(self.failure) << 40 | int(self.save) << 32 | min(self.nonfinite_losses, 2**31)

    @classmethod
    def decode(cls, word: int) -> "RankWord":
        """Inverse of `encode`."""
        return cls(Failure(word >> 40 & 0xFF), SaveWord(word >> 32 & 0xFF), word & 0xFFFFFFFF)


class ObserveLayout:
    """Names of the float64 vector, in order.

    Args:
        slots: slot ids, row-major.
        worth: whether the vector has places for attributions.
        columns: names of the task's further sums, of which there are those of training and of validation.
    """

    def __init__(self, slots: Sequence[str], *, worth: bool = False, columns: Sequence[str] = ()) -> None:
        self.additive = [*GLOBAL_ADDITIVE, *(f"{slot}.{name}" for slot in slots for name in SLOT_ADDITIVE)]
        if worth:
            self.additive += [f"worth_{name}" for name in WORTH]
            self.additive += [f"{slot}.worth_{name}" for slot in slots for name in SLOT_WORTH]
        self.additive += [f"{part}_sum_{name}" for part in ("train", "validation") for name in columns]
        self.replicated = [*GLOBAL_REPLICATED, *(f"{slot}.{name}" for slot in slots for name in SLOT_REPLICATED)]
        self.names = [*self.additive, *self.replicated]
        self._place = {name: index for index, name in enumerate(self.names)}

    def encode(self, values: Mapping[str, float], rank: int) -> Tensor:
        """The vector that this rank sends. Names it did not measure are 0; non-finite terms are counted here.

        Raises:
            KeyError: an unknown name.
        """
        unknown = values.keys() - self._place.keys()
        if unknown:
            raise KeyError(f"not in the observe layout: {', '.join(sorted(unknown))}")
        row, broken = [0.0] * len(self.names), []
        own = len(self.names) if rank == 0 else len(self.additive)
        for name, value in values.items():
            place = self._place[name]
            if place < own:
                row[place] = float(value)
                if not math.isfinite(row[place]):
                    row[place] = 0.0
                    broken.append(name)
        for name in broken:
            for counter in ("nonfinite_terms", f"{name.split('_')[0]}_nonfinite"):
                if counter in self._place:
                    row[self._place[counter]] += 1
        return torch.tensor(row, dtype=torch.float64)

    def decode(self, vector: Tensor) -> dict[str, float]:
        """The agreed sums by name."""
        return dict(zip(self.names, vector.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Agreed:
    """The reduced commit vector, the same on every rank.

    Fields:
        commands: rank 0's command per slot.
        differing: names of digests on which ranks disagree, in layout order.
        vetoes: (code, rank) per vetoed slot; the highest code wins, then the highest rank.
        ranks: each rank's word.
        order: the order to the whole run.
    """

    commands: dict[str, Command]
    differing: tuple[str, ...]
    vetoes: dict[str, tuple[Veto, int]]
    ranks: tuple[RankWord, ...]
    order: RunOrder = NO_ORDER

    @property
    def nonfinite_ranks(self) -> tuple[int, ...]:
        """Ranks that had a non-finite loss since the last tick."""
        return tuple(rank for rank, word in enumerate(self.ranks) if word.nonfinite_losses)


class CommitLayout:
    """Layout of the int64 vector: commands, digest pairs, slot vetoes, rank words, order."""

    def __init__(self, slots: Sequence[str], digests: Sequence[str], names: Sequence[str], world_size: int) -> None:
        self.slots, self.digests, self.names, self.world_size = list(slots), list(digests), list(names), world_size
        self._waits = {slot: wait(slot) for slot in self.slots}
        self.length = len(self.slots) * (WORDS + 1) + 2 * len(self.digests) + world_size + ORDER_WORDS

    def encode(
        self,
        rank: int,
        commands: Mapping[str, Command] | None,
        digests: Mapping[str, int | None],
        vetoes: Mapping[str, Veto],
        word: RankWord,
        order: RunOrder = NO_ORDER,
    ) -> Tensor:
        """The vector that this rank sends.

        Args:
            rank: this rank.
            commands: a command for every slot on rank 0, None elsewhere.
            digests: 62-bit value for every digest name; None takes no part in the comparison.
            vetoes: this rank's vetoes by slot.
            word: this rank's word.
            order: the order to the whole run; rank 0's is sent.
        """
        row: list[int] = []
        for slot in self.slots:
            command = None if commands is None else commands[slot]
            if command is None:
                row += [NOTHING] * WORDS
            else:  # most slots wait
                row += WAITING if command is self._waits[slot] else encode_command(command, self.names)
        for name in self.digests:
            digest = digests[name]
            row += [NOTHING, NOTHING] if digest is None else [digest, -digest]
        given = {slot: int(veto) << 32 | rank for slot, veto in vetoes.items() if veto is not Veto.NONE}
        row += [given.get(slot, 0) for slot in self.slots]
        row += [word.encode() if other == rank else 0 for other in range(self.world_size)]
        own = [int(order.verb), order.value, order.span, order.number]
        row += [NOTHING] * ORDER_WORDS if commands is None else own
        return torch.tensor(row, dtype=torch.int64)

    def decode(self, vector: Tensor) -> Agreed:
        """Reads the reduced vector. Commands are read only if no digest differs that must not: they may be rubbish."""
        row: list[int] = vector.tolist()
        at = len(self.slots) * WORDS
        differing = []
        for name in self.digests:
            if row[at] != NOTHING and row[at] != -row[at + 1]:
                differing.append(name)
            at += 2
        vetoes = {}
        for slot in self.slots:
            if row[at]:
                vetoes[slot] = (Veto(row[at] >> 32), row[at] & 0xFFFFFFFF)
            at += 1
        ranks = tuple(RankWord.decode(word) for word in row[at : at + self.world_size])
        commands, order = {}, NO_ORDER
        if set(differing) <= MAY_DIFFER:
            for index, slot in enumerate(self.slots):
                words = row[index * WORDS : (index + 1) * WORDS]
                commands[slot] = self._waits[slot] if words == WAITING else decode_command(words, slot, self.names)
            verb, value, span, number = row[-ORDER_WORDS:]
            order = RunOrder(verb=RunVerb(verb), value=value, span=span, number=number)
        return Agreed(commands, tuple(differing), vetoes, ranks, order)
