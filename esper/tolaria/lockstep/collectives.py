"""The two collectives of a tick, and what happens when the ranks have parted.

Who decides: rank 0. Who follows: everybody, rank 0 included, by the same commit. What travels: numbers whose place is
a function of the agreed state. When a digest differs every rank sees it in the same reduced vector; then all enter one
diagnostic all-gather and stop with one text. On a healthy tick nothing but the two all-reduces happens.
"""

import struct
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from esper.accord.effects import Veto
from esper.accord.state import RunState
from esper.kasmina.slots.grown import Grown
from esper.leyline.commands import Command
from esper.leyline.errors import LockstepError
from esper.leyline.plain import digest62
from esper.tolaria.lockstep.wire import Agreed, CommitLayout, Failure, ObserveLayout, RankWord
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.ranks.world import World

RUN_DIGESTS = ("tick", "step", "registry", "state", "observation", "parameters")
SLOT_DIGESTS = ("record", "alpha", "weights")


def _usual(values: Sequence[int]) -> tuple[int, bool]:
    """The most common value; in a tie rank 0's, and True."""
    counts = Counter(values).most_common(2)
    tie = len(counts) > 1 and counts[0][1] == counts[1][1]
    return (values[0] if tie else counts[0][0]), tie


def describe_parting(names: Sequence[str], rows: Sequence[Sequence[int]], differing: Sequence[str]) -> str:
    """Names tick, step, fields and ranks: those outside the most common value, or that differ from rank 0 in a tie."""
    columns = {name: [row[index] for row in rows] for index, name in enumerate(names)}
    parts = []
    for name in differing:
        usual, tie = _usual(columns[name])
        odd = [str(rank) for rank, value in enumerate(columns[name]) if value != usual]
        parts.append(f"{name} differs on rank {', '.join(odd)}" + (" from rank 0" if tie else ""))
    # Not this rank's own clocks: they may be what differs, and every rank raises the same text.
    tick, step = _usual(columns["tick"])[0], _usual(columns["step"])[0]
    return f"ranks parted before tick {tick}, step {step}: {'; '.join(parts)}"


class Lockstep:
    """Observe and commit for one run. Layouts are fixed by the slot ids, the catalogue and the world size."""

    def __init__(self, world: World, slots: Sequence[str], names: Sequence[str], registry: int) -> None:
        self.world, self.registry = world, registry
        self.slots = list(slots)
        self.digests = [*RUN_DIGESTS, *(f"slot {slot} {field}" for slot in slots for field in SLOT_DIGESTS)]
        self.observe_layout = ObserveLayout(slots)
        self.commit_layout = CommitLayout(slots, self.digests, names, world.size)
        self._observed = 0

    def observe(self, values: Mapping[str, float]) -> dict[str, float]:
        """ONE all-reduce(SUM): this rank's measurements in, the agreed sums out."""
        vector = self.observe_layout.encode(values, self.world.rank)
        self.world.all_reduce(vector, dist.ReduceOp.SUM, what="observe")
        self._observed = digest_tensors([("observation", vector)])
        return self.observe_layout.decode(vector)

    def digests_of(self, state: RunState, grown: Grown, *, parameters: bool) -> dict[str, int]:
        """What this rank says of itself, read off the real tensors and the real state.

        Args:
            state: agreed state with this tick's evidence in. grown: the model.
            parameters: digest all parameters and buffers too, not only live seeds.
        """
        found = {
            "tick": state.tick,
            "step": state.step,
            "registry": self.registry,
            "state": digest62(state),
            "observation": self._observed,
            "parameters": digest_tensors(grown.model.state_dict().items()) if parameters else 0,
        }
        for entry in state.slots:
            holder = grown.slots[entry.slot]
            seed = holder.seed
            alpha = struct.unpack("<i", struct.pack("<f", float(holder.alpha)))[0] & 0xFFFFFFFF
            ramp = [struct.unpack("<q", struct.pack("<d", x))[0] for x in (holder.level, holder.fade_level)]
            joined = [int(holder.operator), holder.fades_from]
            found[f"slot {entry.slot} record"] = digest62([entry, state.step, holder.phase.value])
            found[f"slot {entry.slot} alpha"] = digest62([alpha, ramp, joined])
            live = seed is not None and (entry.stage.is_live or parameters)
            found[f"slot {entry.slot} weights"] = digest_tensors(holder.state_dict().items()) if live else 0
        return found

    def commit(
        self,
        state: RunState,
        commands: Mapping[str, Command] | None,
        digests: Mapping[str, int],
        vetoes: Mapping[str, Veto],
        word: RankWord,
        failure_text: str = "",
    ) -> Agreed:
        """ONE all-reduce(MAX): commands, digests and vetoes in, the agreed commit out.

        Args:
            state: for naming the tick. commands: one per slot on rank 0, else None.
            digests: of `digests_of`. vetoes, word: this rank's. failure_text: what failed here, if word.failure.

        Raises:
            LockstepError: ranks differ, or one of them failed; the same text on every rank.
        """
        vector = self.commit_layout.encode(self.world.rank, commands, digests, vetoes, word)
        self.world.all_reduce(vector, dist.ReduceOp.MAX, what="commit")
        agreed = self.commit_layout.decode(vector)
        failed = [rank for rank, other in enumerate(agreed.ranks) if other.failure is not Failure.NONE]
        if failed:
            texts = self.world.gather_text(failure_text, what="diagnosis")
            parts = [f"rank {rank} failed in {agreed.ranks[rank].failure.name}: {texts[rank]}" for rank in failed]
            raise LockstepError(f"tick {state.tick}, step {state.step}: {'; '.join(parts)}")
        if agreed.differing:
            own = torch.tensor([digests[name] for name in self.digests], dtype=torch.int64)
            rows = [row.tolist() for row in self.world.all_gather(own, what="diagnosis")]
            raise LockstepError(describe_parting(self.digests, rows, agreed.differing))
        return agreed
