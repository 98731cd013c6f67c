"""Guards of tasks, and of how they are joined to data, that no other test makes fire."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import esper
from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.data import CustomDataConfig, load_data
from esper.tolaria.tasks import (
    ClassificationConfig,
    ContrastiveConfig,
    CustomTaskConfig,
    MaskedLanguageConfig,
    MultiLabelConfig,
    OfDataConfig,
    RegressionConfig,
    SegmentationConfig,
    task_config_class,
)
from esper.tolaria.tasks.bind import bind
from tests.support.refusals import fails
from tests.support.toy_tasks import Rows

HERE = __name__


def no_task() -> str:
    return "a task"


def metric(name: str) -> esper.Metric:
    return esper.Metric(esper.MetricInfo(name=name), lambda sums: None)


class Twice(esper.Task):
    """Two metrics of one name."""

    metrics = [metric("worth")] * 2


class Spaced(esper.Task):
    """A sum that is no name."""

    columns = ("my worth",)


class Groupless(esper.Task):
    """A group of none."""

    group = 0


def lone() -> esper.Data:
    rows = Rows(torch.zeros(1, 2), torch.zeros(1))
    return esper.Data(train=rows, validation=rows, probe=rows, test=rows)


def nested() -> esper.Data:
    """Targets that are no tensor."""
    rows = Rows(torch.zeros(40, 2))

    def collate(samples: list[Any]) -> Any:
        return torch.stack([x for (x,) in samples]), {"a": torch.zeros(len(samples))}

    return esper.Data(train=rows, validation=rows, probe=rows, test=rows, collate=collate)


def clustered() -> esper.Data:
    rows = Rows(torch.zeros(80, 2), torch.zeros(80, 2))
    return esper.Data(train=rows, cluster=[index // 4 for index in range(80)])


def of(kind: str, config: Any) -> Callable[[], Any]:
    """Joins a toy's data, or those of a function here, to a task."""
    path = f"{HERE}:{kind}" if kind in globals() else "tests.support.toy_tasks:data"
    options = {} if kind in globals() else {"task": kind}
    settings: dict[str, Any] = {"validation": 8, "probe": 8, "test": 8} if kind == "clustered" else {}
    return lambda: bind(load_data(CustomDataConfig(path=path, options=options, **settings)), config)


def score(kind: str, config: Any, output: Tensor, target: Any) -> Callable[[], Any]:
    return lambda: of(kind, config)().learns.score(output, target)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def cut() -> None:
    bundle = of("classification", ClassificationConfig(cutmix=1.0))()
    bundle.train.fetch_train(torch.arange(2), seed=1, epoch=0)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            of("classification", ClassificationConfig(class_weights=[0.0, 0.0, 0.0])),
            r"^task\.class_weights: no training sample has a weight above 0; raise some$",
        ),
        (
            of("classification", ClassificationConfig(class_weights=[1.0])),
            r"^task\.class_weights: 1 for 3 classes; give one for each$",
        ),
        (
            of("regression", ClassificationConfig(balanced=True)),
            r"^task\.kind = 'classification': class weights need one whole number as the target of each sample$",
        ),
        (
            of("classification", SegmentationConfig(balanced=True)),
            r"^task\.kind = 'segmentation': class weights need one whole number as the target of each pixel$",
        ),
        (cut, r"^task\.cutmix: inputs are \[2, 4\], no images \[N, C, H, W\]; set task\.cutmix=0$"),
        (
            of("multilabel", MultiLabelConfig(label_weights=[1.0])),
            r"^task\.label_weights: 1 for 3 labels; give one for each$",
        ),
        (of("nested", RegressionConfig()), r"^task\.kind = 'regression': a target is dict, need a tensor of numbers$"),
        (
            of("classification", MaskedLanguageConfig()),
            r"^task\.kind = 'masked_language': data=custom has no sequences of tokens, int64 \[N, T\]$",
        ),
        (
            of("masked_language", MaskedLanguageConfig(mask_token=99)),
            r"^task\.mask_token = 99: the vocabulary has 5 tokens, 0 to 4$",
        ),
        (
            of("classification", OfDataConfig()),
            r"^task\.kind = 'data': data=custom may serve any task; name one, as task=regression$",
        ),
        (
            of("classification", CustomTaskConfig(path=f"{HERE}:no_task")),
            rf"^task\.path = '{HERE}:no_task': returned str, need an esper\.Task$",
        ),
        (
            of("classification", CustomTaskConfig(path=f"{HERE}:Twice")),
            r": a metric of the name worth is there already; rename it$",
        ),
        (
            of("classification", CustomTaskConfig(path=f"{HERE}:Spaced")),
            r": 'my worth' is no name; use letters, digits and _$",
        ),
        (of("classification", CustomTaskConfig(path=f"{HERE}:Groupless")), r": group = 0, must be >= 1$"),
        (
            of("classification", CustomTaskConfig(path=f"{HERE}:Twice", options={"depth": 3})),
            rf"^task\.options = \{{'depth': 3\}}: {HERE}:Twice does not take these; ",
        ),
        (
            of("contrastive", ContrastiveConfig(group=100)),
            r"^task\.group = 100: the part train has 24 samples, need at least two groups; make task\.group smaller$",
        ),
        (
            of("clustered", ContrastiveConfig(group=2)),
            r"^task\.group = 2: data=custom has clusters of its own, and groups are clusters too; leave the clusters ",
        ),
        (lambda: task_config_class("nothing"), r"^task\.kind = 'nothing': unknown task; known are .*classification"),
    ],
)
def test_what_does_not_fit(call: Callable[[], Any], text: str) -> None:
    fails(call, ConfigError, text)


def test_parts_of_one_sample() -> None:
    fails(
        lambda: load_data(CustomDataConfig(path=f"{HERE}:lone")),
        DataError,
        r"^data=custom: every part needs at least 2 samples, got {'train': 1, .*; change the sizes in data\.\*$",
    )


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            score("contrastive", ContrastiveConfig(group=2), zeros(4, 3), ()),
            r"^the host must return two tensors \[B, D\], or one \[B, 2, D\]$",
        ),
        (
            score("segmentation", SegmentationConfig(), zeros(2, 3), zeros(2, 3).long()),
            r"^got logits \[2, 3\] and target \[2, 3\], expected logits \[B, K, H, W\] and target \[B, H, W\]$",
        ),
        (
            score("multilabel", MultiLabelConfig(), zeros(2, 3), zeros(2, 2)),
            r"^got logits \[2, 3\] and target \[2, 2\], expected both \[B, 3\]$",
        ),
        (
            score("regression", RegressionConfig(), zeros(2, 3), zeros(2)),
            r"^got output \[2, 3\] and target \[2\], expected one shape$",
        ),
        (
            score("regression", RegressionConfig(), zeros(2, 3), zeros(2, 3)),
            r"^got 3 numbers of each sample, the data says 1$",
        ),
    ],
)
def test_outputs_of_another_shape(call: Callable[[], Any], text: str) -> None:
    fails(call, ValueError, text)
