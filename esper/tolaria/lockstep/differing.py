"""Names the tensors that differ once ranks have parted: one digest per tensor, gathered only then."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from esper.kasmina.slots.grown import HOST, Grown
from esper.kasmina.slots.sites import CONTAINER
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.ranks.world import World

SHOWN = 3  # tensors that an error names
CHUNK = 4096  # digests that travel at once


def _describe(grown: Grown, name: str) -> str:
    """A tensor's name and owner, as an error says them."""
    kind = "" if name in dict(grown.model.named_parameters()) else "buffer of "
    if not name.startswith(f"{CONTAINER}."):
        return f"{name} ({kind}{HOST})"
    slot, _, rest = name.removeprefix(f"{CONTAINER}.").partition(".")
    return f"{rest} ({kind}slot {slot})"


def find_differing(world: World, named: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not equal on all ranks; the same list on every rank.

    Args:
        world: the ranks; all of them call this with the same names.
        named: tensors by name.
    """
    if not named or world.size == 1:
        return []
    own = torch.tensor([digest_tensors([item]) for item in named.items()], dtype=torch.int64)
    equal: list[bool] = []
    for piece in own.split(CHUNK):
        rows = torch.stack(world.all_gather(piece, what="tensors"))
        equal += (rows == rows[0]).all(0).tolist()
    return [name for name, same in zip(named, equal, strict=True) if not same]


def name_tensors(world: World, grown: Grown, differing: Sequence[str], *, but: Collection[str] = ()) -> str:
    """Names the first tensors that differ over ranks, with their owners, as the end of an error.

    Every rank calls it with the same digests, and gets the same text.

    Args:
        world: the ranks.
        grown: the model.
        differing: names of the digests on which ranks disagree; empty text if none of them is one of tensors.
        but: tensors that no such digest covers.
    """
    slots = [slot for slot in grown.slots if f"slot {slot} weights" in differing]
    prefixes = ("",) if "parameters" in differing else tuple(f"{CONTAINER}.{slot}." for slot in slots)
    if not prefixes:
        return ""
    tensors = grown.model.state_dict().items()
    named = {name: tensor for name, tensor in tensors if name.startswith(prefixes) and name not in but}
    names = digest_tensors((name, torch.empty(0)) for name in named)
    heads = [row.tolist() for row in world.all_gather(torch.tensor([len(named), names]), what="tensors")]
    if any(head != heads[0] for head in heads):
        return "; they do not even have the same tensors"
    found = find_differing(world, named)
    if not found:
        return ""
    shown = ", ".join(_describe(grown, name) for name in found[:SHOWN])
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    parameters = dict(grown.model.named_parameters())
    hint = ""
    if all(name not in parameters and not name.startswith(f"{CONTAINER}.") for name in found):
        hint = "; a buffer that each rank fills by itself does not belong in state_dict: persistent=False"
    return f"; what differs: {shown}{more}{hint}"
