"""From an observation to the arrays that a policy reads: features and masks, padded to a number of slots and entries.

    run            float32 [G]
    slots          float32 [S, F]      present_slots    bool [S]
    entries        float32 [S, B, K]   present_entries  bool [S, B]
    mask_...       bool, see `esper.tamiyo.policy.masks`

An environment stacks them over its hosts, [N, ...]. What is not present is 0 and has no influence.
"""

from collections.abc import Sequence

import numpy as np
import torch

from esper.leyline.errors import EsperError
from esper.leyline.observation import Observation
from esper.tamiyo.policy.columns import Feature, Sight
from esper.tamiyo.policy.features import LAYOUT, Layout
from esper.tamiyo.policy.heads import Batch
from esper.tamiyo.policy.masks import Arrays, mask_shapes, masks_of
from esper.tamiyo.policy.memory import Memory
from esper.tamiyo.policy.options import OPTIONS, Options

BOUND = 10.0
"""Largest size of a feature; whatever is beyond is cut."""


def array_shapes(
    slots: int, entries: int, *, layout: Layout = LAYOUT, options: Options = OPTIONS
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of each array of one observation.

    Args:
        slots: S.
        entries: B, entries of the longest catalogue.
        layout: features.
        options: what the heads choose from.
    """
    floats = {
        "run": (layout.width("run"),),
        "slots": (slots, layout.width("slot")),
        "entries": (slots, entries, layout.width("entry")),
    }
    bools = {
        "present_slots": (slots,),
        "present_entries": (slots, entries),
        **mask_shapes(slots, entries, options),
    }
    return {
        **{name: (shape, np.dtype(np.float32)) for name, shape in floats.items()},
        **{name: (shape, np.dtype(bool)) for name, shape in bools.items()},
    }


def arrays_of(
    observation: Observation,
    memory: Memory,
    *,
    slots: int | None = None,
    entries: int | None = None,
    layout: Layout = LAYOUT,
    options: Options = OPTIONS,
) -> Arrays:
    """Returns the arrays of one observation.

    Args:
        observation: of one tick.
        memory: has taken in that observation already (`Memory.note`), and those before it.
        slots: S to pad to; None is as many as there are.
        entries: B to pad to, at least 1; None is as many as there are.
        layout: features.
        options: what the heads choose from.

    Raises:
        EsperError: more slots or entries than there is room for, or a feature that is not a finite number.
    """
    most = max((len(view.catalogue) for view in observation.slots), default=0)
    slots = len(observation.slots) if slots is None else slots
    entries = max(1, most) if entries is None else entries
    if len(observation.slots) > slots or most > entries:
        raise EsperError(
            f"an observation of {len(observation.slots)} slots with up to {most} blueprints: there is room for "
            f"{slots} with {entries}"
        )
    shapes = array_shapes(slots, entries, layout=layout, options=options)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items() if not name.startswith("mask_")}
    sight = Sight(observation, memory, memory.unit, memory.tallies())
    arrays["run"][:] = _row(layout.run, sight)
    for at, view in enumerate(observation.slots):
        sight.slot = view
        arrays["slots"][at] = _row(layout.slot, sight)
        arrays["present_slots"][at] = True
        for number, entry in enumerate(view.catalogue):
            sight.entry = entry
            arrays["entries"][at, number] = _row(layout.entry, sight)
            arrays["present_entries"][at, number] = True
    for kind, name in (("run", "run"), ("slot", "slots"), ("entry", "entries")):
        _check_finite(arrays[name], kind, layout)
        np.clip(arrays[name], -BOUND, BOUND, out=arrays[name])
    return arrays | masks_of(observation, options, slots=slots, entries=entries)


def _row(features: Sequence[Feature], sight: Sight) -> list[float]:
    row: list[float] = []
    for feature in features:
        row += feature.values(sight)
    return row


def _check_finite(array: np.ndarray, kind: str, layout: Layout) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        column = int(np.argwhere(~finite)[0][-1])
        raise EsperError(f"feature {kind}.{layout.columns(kind)[column]}: not a finite number")


def stack(rows: Sequence[Arrays]) -> Arrays:
    """Returns arrays [N, ...] of N observations that were padded alike."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def to_batch(arrays: Arrays) -> Batch:
    """Returns tensors that share the arrays' memory."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
