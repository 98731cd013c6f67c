"""Lanes: what each net of one forward computes, and how that becomes a few grouped computations.

A lane is one net with the seeds that take part. Most forwards have a lane for each net; a shadow forward, and each arm
of a probe, is one more lane of the same net. Seats with the same blueprint in the same slot are computed together, and
nothing else is: a seed that is not there, or that is at alpha 0 and does not learn, has no seat.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esper.leyline.alpha import Operator
from esper.simic.batched.weights import GATE, HOST_KEY, Key, Weights


@dataclass(frozen=True, slots=True)
class Seat:
    """A seed that takes part in a lane.

    Fields:
        blueprint: of the seed.
        operator: by which it is joined.
        fades_from: the operator that is being faded out, or None.
        alpha: in [0, 1]; at 0 the host's output is what it is without the seed, and the seed gets a gradient of zeros.
        fade: share of ``operator`` in a cross-fade.
        learns: whether the loss reaches its weights.
    """

    blueprint: str
    operator: Operator
    fades_from: Operator | None
    alpha: float
    fade: float
    learns: bool

    @property
    def kind(self) -> tuple[bool, int, int]:
        """What seats that are joined by one formula have in common."""
        return not self.learns, int(self.operator), -1 if self.fades_from is None else int(self.fades_from)

    def uses(self, operator: Operator) -> bool:
        """Whether that operator is in force, or fading out."""
        return operator in (self.operator, self.fades_from)


@dataclass(frozen=True, slots=True)
class Lane:
    """One net in a forward.

    Fields:
        net: its place.
        seats: by slot.
        learns: whether the loss reaches the host's weights; these lanes come first.
    """

    net: int
    seats: dict[str, Seat]
    learns: bool = False


@dataclass(slots=True)
class Segment:
    """Seats of a group that are joined by one formula: places first .. last - 1 of the group."""

    first: int
    last: int
    seat: Seat


@dataclass(slots=True, eq=False)
class Group:
    """Seats with one blueprint in one slot, all at alpha 0 or none.

    Fields:
        key: of the weights.
        silent: whether they are at alpha 0.
        lanes: their lanes, int64 [n].
        whole: whether these are all lanes, in order.
        rows: their rows of weights, int64 [n]; those that learn come first.
        learning: how many learn.
        same: whether these are all rows of the block, in order.
        gates: rows of their gates' weights; -1 without one.
        alpha: float32 [n].
        fade: float32 [n].
        segments: by formula.
    """

    key: Key
    silent: bool
    lanes: Tensor
    whole: bool
    rows: Tensor
    learning: int
    same: bool
    gates: list[int]
    alpha: Tensor
    fade: Tensor
    segments: list[Segment] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Plan:
    """One forward.

    Fields:
        lanes: in order.
        nets: their nets, int64 [L].
        rows: their rows of the host's weights, int64 [L].
        learning: how many learn; they come first.
        same: whether ``rows`` are all rows of the block, in order.
        slots: groups by slot.
    """

    lanes: Sequence[Lane]
    nets: Tensor
    rows: Tensor
    learning: int
    same: bool
    slots: dict[str, list[Group]]


def make_plan(lanes: Sequence[Lane], weights: Weights) -> Plan:
    """The plan of a forward with these lanes, those that learn first."""
    weights.settle()
    device = weights.device
    place = {key: {net: row for row, net in enumerate(block.nets)} for key, block in weights.blocks.items()}
    found: dict[tuple[Key, bool], list[tuple[tuple[bool, int, int], int, Seat]]] = defaultdict(list)
    for index, lane in enumerate(lanes):
        for slot, seat in lane.seats.items():
            found[(slot, seat.blueprint), seat.alpha == 0.0].append((seat.kind, index, seat))
    slots: dict[str, list[Group]] = defaultdict(list)
    for (key, silent), entries in found.items():
        entries.sort(key=lambda entry: entry[:2])
        indices = [index for _, index, _ in entries]
        seats = [seat for _, _, seat in entries]
        nets = [lanes[index].net for index in indices]
        gates = place.get((key[0], GATE), {})
        group = Group(
            key=key,
            silent=silent,
            lanes=torch.tensor(indices, device=device),
            whole=indices == list(range(len(lanes))),
            rows=torch.tensor([place[key][net] for net in nets], device=device),
            same=nets == weights.blocks[key].nets,
            learning=sum(seat.learns for seat in seats),
            gates=[gates.get(net, -1) for net in nets],
            alpha=torch.tensor([seat.alpha for seat in seats], dtype=torch.float32, device=device),
            fade=torch.tensor([seat.fade for seat in seats], dtype=torch.float32, device=device),
        )
        for at, (kind, _, seat) in enumerate(entries):
            if at and entries[at - 1][0] == kind:
                group.segments[-1].last = at + 1
            else:
                group.segments.append(Segment(at, at + 1, seat))
        slots[key[0]].append(group)
    nets = [lane.net for lane in lanes]
    return Plan(
        lanes=lanes,
        nets=torch.tensor(nets, device=device),
        rows=torch.tensor([place[HOST_KEY][lane.net] for lane in lanes], device=device),
        learning=sum(lane.learns for lane in lanes),
        same=nets == weights.blocks[HOST_KEY].nets,
        slots=slots,
    )
