"""Any number of labels of a sample.

Shapes: B samples, K labels.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.leyline.errors import ConfigError
from esper.leyline.events.task import MetricInfo
from esper.tolaria.data.parts import Bundle
from esper.tolaria.tasks.configs import MultiLabelConfig
from esper.tolaria.tasks.counts import count_names, f1_of, macro_f1
from esper.tolaria.tasks.targets import targets_in
from esper.tolaria.tasks.task import Metric, Scores, Task, read_logits


class MultiLabelTask(Task):
    """Any number of labels of a sample: logits [B, K], target [B, K] of 0 and 1.

    Args:
        labels: K.
        weights: factor of the loss of a label that is there, [K]; None: 1.
    """

    name, unit, objective, graded = "multilabel", "nats", "f1", True

    def __init__(self, labels: int, weights: Tensor | None = None) -> None:
        self.labels, self.weights = labels, weights
        self.columns = [name for of in ("tp", "fp", "fn") for name in count_names(of, labels)]
        micro = Metric(MetricInfo(name="f1", unit="share"), lambda sums: f1_of(sums, range(labels)))
        self.metrics = [micro, macro_f1(labels)]

    def score(self, output: Any, target: Any) -> Scores:
        """Mean binary cross-entropy over the labels; a label is said to be there from a probability of 1/2 on."""
        logits = read_logits(output, self.name)
        if logits.shape != target.shape or logits.ndim != 2 or logits.shape[1] != self.labels:
            raise ValueError(
                f"got logits {list(logits.shape)} and target {list(target.shape)}, expected both [B, {self.labels}]"
            )
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weights = None if self.weights is None else self.weights.to(wide)
        loss = F.binary_cross_entropy_with_logits(wide, target.to(wide), reduction="none", pos_weight=weights).mean(1)
        said, so = logits > 0, target > 0.5
        kinds = {"tp": said & so, "fp": said & ~so, "fn": ~said & so}
        sums = {f"{of}{k}": hit[:, k].double() for of, hit in kinds.items() for k in range(self.labels)}
        return Scores(loss, (said == so).to(loss.dtype).mean(1), sums)

    def answers(self, output: Any) -> dict[str, Tensor]:
        """The probability of each label."""
        return {"probability": torch.sigmoid(read_logits(output, self.name).double())}

    def chance(self, targets: Iterable[Any]) -> float:
        """Mean entropy of the labels' frequencies."""
        if self.weights is not None:
            return 0.0
        rows = torch.cat([tensor.double().reshape(-1, self.labels) for tensor in targets_in(targets)])
        p = rows.mean(0)
        return float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean())


def build_multilabel(config: MultiLabelConfig, bundle: Bundle) -> Task:
    """Several labels of a sample."""
    given = config.label_weights
    if given is not None and len(given) != bundle.classes:
        raise ConfigError(f"task.label_weights: {len(given)} for {bundle.classes} labels; give one for each")
    return MultiLabelTask(bundle.classes, None if given is None else torch.tensor(given).double())
