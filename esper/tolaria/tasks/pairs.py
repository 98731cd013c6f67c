"""Contrastive pairs: two views of each sample must find each other among the samples of their group.

    loss_i = (CE(z_i . w_j / T over j, i) + CE(w_i . z_j / T over j, i)) / 2      z, w of length 1, j in i's group

(InfoNCE, van den Oord et al. 2018, arXiv:1807.03748; both ways as in Radford et al. 2021, arXiv:2103.00020.) The
negatives of a sample are the others of its group, whose size does not change with the number of ranks: so N ranks learn
what one learns. A group is dealt whole to one rank, and counts as one cluster of evidence.

Shapes: B samples, G samples of a group, D features.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.leyline.events.task import MetricInfo
from esper.tolaria.data.parts import Bundle
from esper.tolaria.tasks.configs import ContrastiveConfig
from esper.tolaria.tasks.counts import mean_of
from esper.tolaria.tasks.task import Metric, Scores, Task


class ContrastiveTask(Task):
    """Contrastive pairs."""

    name, graded, columns = "contrastive", True, ("first",)
    metrics = (Metric(MetricInfo(name="found_by_first", unit="share"), mean_of("first")),)

    def __init__(self, config: ContrastiveConfig) -> None:
        self.config, self.group = config, config.group

    def split(self, batch: Any) -> tuple[Any, Any]:
        """A batch has no target: (x, y) are the two views, a tensor [B, 2, ...] holds both."""
        if isinstance(batch, list):
            batch = tuple(batch)
        return batch, ()

    def _views(self, output: Any) -> tuple[Tensor, Tensor]:
        if isinstance(output, Tensor) and output.ndim == 3 and output.shape[1] == 2:
            return output[:, 0], output[:, 1]
        pair = tuple(output.values()) if isinstance(output, Mapping) else output
        if isinstance(pair, tuple | list) and len(pair) >= 2:
            first, second = pair[:2]
            if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape:
                return first, second
        raise ValueError("the host must return two tensors [B, D], or one [B, 2, D]")

    def score(self, output: Any, target: Any) -> Scores:
        """InfoNCE both ways within each group of neighbours, in nats; correct: the share of both that find theirs."""
        first, second = self._views(output)
        wide = torch.promote_types(first.dtype, torch.float32)
        size = self.group if len(first) % self.group == 0 else len(first)  # the two samples of an example
        z, w = (F.normalize(view.to(wide).flatten(1), dim=1).unflatten(0, (-1, size)) for view in (first, second))
        logits = z @ w.transpose(1, 2) / self.config.temperature
        own = torch.arange(size, device=logits.device).expand(len(logits), size)
        losses, hits = [], []
        for way in (logits, logits.transpose(1, 2)):
            losses.append(F.cross_entropy(way.flatten(0, 1), own.flatten(), reduction="none"))
            hits.append((way.argmax(-1) == own).flatten().to(wide))
        return Scores((losses[0] + losses[1]) / 2, (hits[0] + hits[1]) / 2, {"first": hits[0].double()})

    def answers(self, output: Any) -> dict[str, Tensor]:
        """The features of both views."""
        first, second = self._views(output)
        return {"first": first, "second": second}

    def chance(self, targets: Iterable[Any]) -> float:
        """The loss where all look alike."""
        return math.log(self.group)


def build_contrastive(config: ContrastiveConfig, bundle: Bundle) -> Task:
    """Contrastive pairs."""
    return ContrastiveTask(config)
