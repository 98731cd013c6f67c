"""Masked language modelling: hidden tokens are told from the others (Devlin et al. 2019, arXiv:1810.04805).

Of each sequence a share of the places is asked for. Of these, 80 % get the mask token, 10 % a token drawn at random,
10 % stay. Which, is a function of (seed, epoch, sample, place) in training, so that each epoch asks others; in
evaluation it is always the same. The last token of the vocabulary masks, unless another is named.

Shapes: N samples, T tokens.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.leyline.errors import ConfigError
from esper.tolaria.data.hashing import hash_positions
from esper.tolaria.data.over import PartOver
from esper.tolaria.data.parts import Bundle, Part
from esper.tolaria.tasks.configs import MaskedLanguageConfig
from esper.tolaria.tasks.positions import PositionTask
from esper.tolaria.tasks.task import Task

IGNORED = -100


def mask_tokens(
    tokens: Tensor, ids: Tensor, *key: int | str, share: float, mask: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Hides tokens; a pure function of its arguments.

    Args:
        tokens: int64 [N, T].
        ids: sample ids, int64 [N].
        key: further key of the draws.
        share: share of the places that are asked for; at least one place of each sequence is.
        mask: token that stands for a hidden one.
        vocabulary: tokens there are.

    Returns:
        What the model sees, and the labels, `IGNORED` where nothing is asked.
    """
    count, length = tokens.shape
    places = (ids[:, None] * length + torch.arange(length)).flatten()
    draws = hash_positions(places, "mask", *key).reshape(count, length)
    uniform = (draws >> np.uint64(40)).astype(np.float64) / 2**24
    asked = torch.from_numpy(uniform < share)
    asked[torch.arange(count), torch.from_numpy(np.argmin(uniform, axis=1))] = True
    kind = torch.from_numpy(((draws >> np.uint64(16)) % np.uint64(10)).astype(np.int64))
    other = torch.from_numpy((draws % np.uint64(vocabulary)).astype(np.int64))
    seen = torch.where(asked & (kind < 8), mask, torch.where(asked & (kind == 8), other, tokens))
    return seen, torch.where(asked, tokens, IGNORED)


class MaskedPart(PartOver):
    """Sequences of which tokens are hidden.

    Args:
        part: the whole sequences, as x.
        task: says how many.
    """

    def __init__(self, part: Part, task: "MaskedTask") -> None:
        super().__init__(part)
        self._task = task

    def _masked(self, x: Any, indices: Tensor, *key: int | str) -> tuple[Tensor, Tensor]:
        task = self._task
        return mask_tokens(x, indices, *key, share=task.share, mask=task.mask, vocabulary=task.vocabulary)

    def fetch(self, indices: Tensor) -> tuple[Any, Any]:
        """See `Part.fetch`; the same places are hidden each time."""
        return self._masked(self.part.fetch(indices)[0], indices, "evaluation")

    def fetch_train(self, indices: Tensor, *, seed: int, epoch: int) -> tuple[Any, Any]:
        """See `Part.fetch_train`."""
        x, _ = self.part.fetch_train(indices, seed=seed, epoch=epoch)
        return self._masked(x, indices, seed, epoch)


class MaskedTask(PositionTask):
    """Masked language modelling."""

    def __init__(self, config: MaskedLanguageConfig, vocabulary: int) -> None:
        super().__init__(config.kind, IGNORED, smoothing=config.label_smoothing, normalise=config.normalise)
        self.share, self.vocabulary = config.share, vocabulary
        self.mask = vocabulary - 1 if config.mask_token is None else config.mask_token

    def prepare(self, part: Part) -> Part:
        """The part with hidden tokens."""
        return MaskedPart(part, self)


def build_masked(config: MaskedLanguageConfig, bundle: Bundle) -> Task:
    """Masked language modelling of sequences of tokens.

    Raises:
        ConfigError: the data are no sequences of tokens, or have no such mask token.
    """
    x, _ = bundle.train.fetch(torch.arange(2))
    if not isinstance(x, Tensor) or x.is_floating_point() or x.ndim != 2:
        raise ConfigError(f"task.kind = {config.kind!r}: data={bundle.name} has no sequences of tokens, int64 [N, T]")
    if config.mask_token is not None and config.mask_token >= bundle.classes:
        raise ConfigError(
            f"task.mask_token = {config.mask_token}: the vocabulary has {bundle.classes} tokens, 0 to "
            f"{bundle.classes - 1}"
        )
    return MaskedTask(config, bundle.classes)
