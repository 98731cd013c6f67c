"""Toys of every task whose optimum is known in closed form, whatever the network.

An input is one of four symbols, one-hot, and each symbol comes with targets in fixed shares. The best that any network
can do is the best constant for each symbol: so the least loss is that of conditional means, medians or frequencies. All
parts hold the same samples, so that validation says how far from it a run is. A whole epoch is one batch.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import esper
from esper.config.tree import build_config
from tests.support.tiny import act, custom_host, schedule, tiny_plain

SYMBOLS, COPIES = 4, 11
GROUP = 4


class Rows(Dataset):
    def __init__(self, *columns: Any) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> Any:
        return tuple(column[index] for column in self.columns)


class Dicts(Rows):
    def __getitem__(self, index: int) -> Any:
        return {"tokens": self.columns[0][index], "labels": self.columns[1][index]}


def shares(symbol: int) -> list[int]:
    """Eleven targets of a symbol, out of three classes, in shares that differ."""
    return [(symbol + k) % 3 for k, count in enumerate((7, 3, 1)) for _ in range(count)]


CLASSES = torch.tensor([shares(s) for s in range(SYMBOLS)]).flatten()
SYMBOL = torch.arange(SYMBOLS).repeat_interleave(COPIES)
HOT = F.one_hot(SYMBOL, SYMBOLS).double()
NUMBERS = CLASSES.double() ** 2 + 0.5 * SYMBOL
FIRST, SECOND = (torch.randint(SYMBOLS, (20, 3, 3), generator=torch.Generator().manual_seed(k)) for k in (1, 2))


def entropy(*given: Tensor, of: Tensor) -> float:
    """Conditional entropy of one column by others, nats."""
    total = 0.0
    keys = torch.stack([*given], 1)
    for key in keys.unique(dim=0):
        rows = of[(keys == key).all(1)]
        p = torch.bincount(rows).double() / len(rows)
        total -= len(rows) / len(of) * float(torch.xlogy(p, p).sum())
    return total


def data(task: str) -> esper.Data:
    """The data of one toy; all parts are the same."""
    if task in ("regression", "counting"):
        rows: Rows = Rows(HOT, NUMBERS)
        classes = 1
    elif task == "multilabel":
        rows, classes = Rows(HOT, F.one_hot(CLASSES, 3).double() + F.one_hot(SYMBOL % 3, 3).double().mul(0)), 3
    elif task == "segmentation":
        target = FIRST % 3  # no more: a seed may see other pixels
        target[:, 0, 0] = 255
        rows, classes = Rows(F.one_hot(FIRST, SYMBOLS).permute(0, 3, 1, 2).double(), target), 3
    elif task == "masked_language":
        rows, classes = Rows(SYMBOL[:, None].expand(-1, 12).contiguous(), SYMBOL[:, None].expand(-1, 12)), SYMBOLS + 1
    elif task == "seq2seq":
        tokens, labels = FIRST.flatten(1), (FIRST + (SECOND == 0)).remainder(3).flatten(1)
        labels[:, 2] = -100
        rows, classes = Dicts(tokens, labels), 3
    elif task == "ragged":  # as seq2seq, with another number of labels in each
        labels = (FIRST + SECOND).remainder(3).flatten(1)
        labels[torch.arange(9) > torch.arange(20)[:, None] % 9] = -100
        rows, classes = Dicts(FIRST.flatten(1), labels), 3
    elif task == "contrastive":
        ids = F.one_hot(torch.arange(24), 24).double()
        rows, classes = Rows(ids, ids.roll(1, 1)), 1
    else:
        rows, classes = Rows(HOT, CLASSES), 3
    return esper.Data(train=rows, validation=rows, probe=rows, test=rows, classes=classes)


class Net(nn.Module):
    """A hidden layer, at which there is a slot, and a last one."""

    def __init__(self, task: str, inputs: int, outputs: int) -> None:
        super().__init__()
        self.task = task
        width = 6
        if task in ("masked_language", "seq2seq"):
            self.hidden: nn.Module = nn.Embedding(inputs, width)
        else:
            self.hidden = nn.Conv2d(inputs, width, 1) if task == "segmentation" else nn.Linear(inputs, width)
        self.other = nn.Linear(inputs, width) if task == "contrastive" else None
        self.head = nn.Conv2d(width, outputs, 1) if task == "segmentation" else nn.Linear(width, outputs)

    def forward(self, x: Tensor | None = None, second: Tensor | None = None, *, tokens: Tensor | None = None) -> Any:
        if tokens is not None:
            return {"logits": self.head(self.hidden(tokens))}
        hidden = self.hidden(x)
        if self.task == "masked_language":
            hidden = hidden + hidden.mean(1, keepdim=True)
        out = self.head(hidden)
        if self.other is not None:
            return out, self.head(self.other(second))
        return out


def build(input_shape: tuple[int, ...], classes: int, task: str) -> nn.Module:
    """The host of one toy."""
    inputs = {"masked_language": SYMBOLS + 1, "seq2seq": SYMBOLS}.get(task, input_shape[0] if input_shape else 1)
    return Net(task, inputs, 8 if task == "contrastive" else classes)


class Counting(esper.Task):
    """Poisson regression: exp(z) - y z, up to a constant of the data; a unit of its own."""

    unit, columns, objective = "Poisson", ("events", "expected"), "ratio"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.metrics = [
            esper.Metric(
                esper.MetricInfo(name="ratio", higher=False),
                lambda sums: abs(1 - sums["expected"] / sums["events"]) if sums["events"] else None,
            )
        ]

    def score(self, output: Any, target: Any) -> esper.Scores:
        z = output[:, 0]
        return esper.Scores(self.scale * (z.exp() - target * z), None, {"events": target, "expected": z.exp()})


def within(column: Tensor, value: Any) -> float:
    """The mean over symbols of a function of a symbol's targets."""
    return float(sum(value(column[s == SYMBOL]) for s in range(SYMBOLS)) / SYMBOLS)


def huber_least(values: Tensor) -> Tensor:
    grid = torch.linspace(float(values.min()), float(values.max()), 20001, dtype=torch.float64)
    return torch.stack([F.huber_loss(g.expand_as(values), values) for g in grid[::10]]).min()


@dataclass
class Toy:
    """One toy: its task's settings, the least loss there is, and how near to it a run must come."""

    task: dict[str, Any]
    least: float
    near: float = 2e-3
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def kind(self) -> str:
        """The name under which data and host are made."""
        return self.name or str(self.task["kind"])


def _flat(first: Tensor, second: Tensor, keep: Tensor) -> float:
    labels = (first + (second == 0)).remainder(3)
    return entropy(first[keep], of=labels[keep])


_TOKEN = torch.ones(20, 9, dtype=torch.bool)
_TOKEN[:, 2] = False
UNMIXED = {"class_weights": None, "balanced": False, "mixup": 0.0, "cutmix": 0.0}
PLAIN = {"label_smoothing": 0.0}
PLACES = {**PLAIN, "normalise": "samples"}
TOYS = {
    "classification": Toy(
        {"kind": "classification", **PLAIN, **UNMIXED, "f1": True},
        entropy(SYMBOL, of=CLASSES),
    ),
    "mse": Toy(
        {"kind": "regression", "loss": "mse", "delta": 1.0, "unit": "m"},
        within(NUMBERS, lambda y: y.var(correction=0)),
    ),
    "l1": Toy(
        {"kind": "regression", "loss": "l1", "delta": 1.0, "unit": "m"},
        within(NUMBERS, lambda y: (y - y.median()).abs().mean()),
        near=5e-2,
    ),
    "huber": Toy({"kind": "regression", "loss": "huber", "delta": 1.0, "unit": ""}, within(NUMBERS, huber_least)),
    "multilabel": Toy(
        {"kind": "multilabel", "label_weights": None},
        sum(entropy(SYMBOL, of=F.one_hot(CLASSES, 3)[:, k]) for k in range(3)) / 3,
    ),
    "segmentation": Toy(
        {"kind": "segmentation", "ignore_index": 255, "class_weights": None, "balanced": False, **PLACES},
        0.0,
        near=2e-2,
    ),
    "masked_language": Toy({"kind": "masked_language", "share": 0.2, "mask_token": None, **PLACES}, 0.0, near=0.25),
    "seq2seq": Toy(
        {"kind": "seq2seq", "ignore_index": -100, **PLACES}, _flat(FIRST.flatten(1), SECOND.flatten(1), _TOKEN)
    ),
    "contrastive": Toy(
        {"kind": "contrastive", "group": GROUP, "temperature": 0.2}, 0.0, near=0.1, settings={"trainer__batch": 24}
    ),
    "counting": Toy(
        {"kind": "custom", "path": "tests.support.toy_tasks:Counting", "options": {"scale": 2.0}},
        within(NUMBERS, lambda y: 2 * (y.mean() - y.mean() * math.log(y.mean()))),
        name="counting",
    ),
}


def toy_config(name: str, **settings: Any) -> Any:
    """The config of a toy."""
    return build_config(toy_plain(name, **settings))


def toy_plain(name: str, **settings: Any) -> dict[str, Any]:
    """The plain config of a toy: a birth in the middle, full batches, float64."""
    toy = TOYS[name]
    common: dict[str, Any] = {
        "host": custom_host(
            "tests.support.toy_tasks:build",
            {"r0c0": "hidden"},
            options={"task": toy.kind},
            layout={"r0c0": "BTC"} if toy.kind in ("masked_language", "seq2seq") else None,
        ),
        "data": {
            "kind": "custom",
            "split_seed": 0,
            "path": "tests.support.toy_tasks:data",
            "options": {"task": toy.kind},
            "validation": 16,
            "probe": 16,
            "test": 16,
            "length": None,
            "workers": 0,
        },
        "task": toy.task,
        "trainer__steps": 160,
        "trainer__batch": 44,
        "trainer__objective": None,
        "trainer__precision": "fp64",
        "control__every": 20,
        "control__attribute_every": 0,
        "optim__lr": 0.1,
        "optim__weight_decay": 0.0,
        "gates__probe_samples": 16,
        "gates__min_samples": 4,
        "controller": schedule(
            act(1, "r0c0", "GERMINATE", blueprint="norm", operator="ADD", ticks=2),
            act(3, "r0c0", "ADVANCE"),
            act(5, "r0c0", "ADVANCE"),
        ),
    }
    return tiny_plain("cnn", **{**common, **toy.settings, **settings})
