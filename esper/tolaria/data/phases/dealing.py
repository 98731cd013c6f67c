"""Two sets of samples become the parts of a phase.

    old phase   train, validation, probe, test: old samples
    new phase   train: all new ones, and as many old ones of the old phase's training part as make up the replay share;
                validation, probe, test: as many old as new ones, those that the old phase held out

A target is the pair of what is to be said and whether the sample is new, so that the task can tell the losses apart.
"""

from typing import Any

import torch
from torch import Tensor

from esper.leyline.errors import DataError
from esper.tolaria.data.hashing import hashed_order
from esper.tolaria.data.parts import PART_NAMES, Part
from esper.tolaria.data.phases.config import Phase, PhasedConfig

Rows = dict[str, Tensor]  # of each part, int64


class PhasePart(Part):
    """Samples of which each is old or new.

    Args:
        inner: the samples.
        new: whether each is new, bool [N].
    """

    def __init__(self, inner: Part, new: Tensor) -> None:
        self._inner, self._new = inner, new

    def __len__(self) -> int:
        return len(self._inner)

    def fetch(self, indices: Tensor) -> tuple[Any, Any]:
        """See `Part.fetch`; y is (the target, whether the sample is new, bool [N])."""
        x, y = self._inner.fetch(indices)
        return x, (y, self._new[indices])

    def content(self) -> tuple[Tensor, ...]:
        """The samples, and which are new."""
        return (*self._inner.content(), self._new)


def merge_phases(config: PhasedConfig, old: Rows, new: Rows) -> dict[str, tuple[Tensor, Tensor]]:
    """The rows of each part in the phase that the config names, and whether each is new: int64 [N], bool [N].

    Args:
        config: phase and replay share.
        old: rows of the old samples, by part.
        new: rows of the new ones, which are numbered on.

    Raises:
        DataError: there are too few old samples to replay.
    """
    if config.phase is Phase.OLD:
        return {name: (old[name], torch.zeros(len(old[name]), dtype=torch.bool)) for name in PART_NAMES}
    wanted = round(len(new["train"]) * config.replay / (1 - config.replay))
    have = len(old["train"])
    if wanted > have:
        raise DataError(
            f"data={config.kind}: data.replay = {config.replay} of the training part is {wanted} old samples beside "
            f"{len(new['train'])} new ones, and there are {have}; make it smaller"
        )
    chosen = hashed_order(have, "replay", config.split_seed)[:wanted]
    both = {name: (old[name], new[name]) for name in PART_NAMES} | {"train": (old["train"][chosen], new["train"])}
    return {
        name: (torch.cat(pair), torch.repeat_interleave(torch.tensor([False, True]), torch.tensor([*map(len, pair)])))
        for name, pair in both.items()
    }
