"""Mixup and CutMix: a training sample is mixed with a partner, and so is its target.

    mixup    x = s x_i + (1 - s) x_j                      s ~ Beta(a, a)      Zhang et al. 2018, arXiv:1710.09412
    cutmix   a box of x_j, of 1 - s of the area, in x_i    s ~ Beta(a, a)      Yun et al. 2019, arXiv:1905.04899

Partner, share and box are a function of (seed, epoch, sample id), and the partner comes from the whole training part:
so N ranks mix what one mixes, and no batch matters. Validation, probe and test are never mixed.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.leyline.errors import ConfigError
from esper.leyline.plain import digest62
from esper.tolaria.data.hashing import hash_positions
from esper.tolaria.data.over import PartOver
from esper.tolaria.data.own.ahead import Request
from esper.tolaria.data.parts import Part
from esper.tolaria.tasks.targets import Mixed


class MixedPart(PartOver):
    """A training part whose samples are mixed.

    Args:
        part: the samples.
        mixup: a of mixup; 0: none.
        cutmix: a of CutMix; 0: none. With both, half of the samples get one and half the other.
    """

    def __init__(self, part: Part, *, mixup: float, cutmix: float) -> None:
        super().__init__(part)
        self._mixup, self._cutmix = mixup, cutmix
        self._seed: int | None = None

    def partners(self, indices: Tensor, seed: int, epoch: int) -> Tensor:
        """The sample that each is mixed with, int64 [N]; perhaps itself."""
        drawn = hash_positions(indices, "partner", seed, epoch) % np.uint64(len(self.part))
        return torch.from_numpy(drawn.astype(np.int64))

    def fetch_train(self, indices: Tensor, *, seed: int, epoch: int) -> tuple[Any, Any]:
        """See `Part.fetch_train`; the target is `Mixed`."""
        x, y = self.part.fetch_train(indices, seed=seed, epoch=epoch)
        other, second = self.part.fetch_train(self.partners(indices, seed, epoch), seed=seed, epoch=epoch)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise ConfigError("task.mixup, task.cutmix: inputs are no numbers that can be mixed; set both to 0")
        if self._cutmix and x.ndim != 4:
            raise ConfigError(f"task.cutmix: inputs are {list(x.shape)}, no images [N, C, H, W]; set task.cutmix=0")
        mixed, shares = x.clone(), []
        for row, index in enumerate(indices.tolist()):
            draws = np.random.default_rng(digest62(["mix", seed, epoch, index]))
            cut = self._cutmix > 0 and (self._mixup == 0 or draws.random() < 0.5)
            a = self._cutmix if cut else self._mixup
            share = float(draws.beta(a, a))
            if cut:
                share = _paste(mixed[row], other[row], share, draws)
            else:
                mixed[row] = share * x[row] + (1 - share) * other[row]
            shares.append(share)
        return mixed, Mixed(y, second, torch.tensor(shares, dtype=torch.float64))

    def read_ahead(self, seed: int, workers: int, *, pinned: bool = False) -> Any:
        """See `Part.read_ahead`."""
        self._seed = seed
        return super().read_ahead(seed, workers, pinned=pinned)

    def requests(self, indices: Tensor, epoch: int) -> Iterator[Request]:
        """See `Part.requests`: the samples, then their partners."""
        assert self._seed is not None
        yield from self.part.requests(indices, epoch)
        yield from self.part.requests(self.partners(indices, self._seed, epoch), epoch)


def _paste(into: Tensor, other: Tensor, share: float, draws: np.random.Generator) -> float:
    """Pastes a box of ``other`` in place; returns the share of the area that is left."""
    height, width = into.shape[-2:]
    side = (1 - share) ** 0.5
    tall, wide = round(height * side), round(width * side)
    top, left = int(draws.integers(height - tall + 1)), int(draws.integers(width - wide + 1))
    into[..., top : top + tall, left : left + wide] = other[..., top : top + tall, left : left + wide]
    return 1 - tall * wide / (height * width)
