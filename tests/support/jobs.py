"""Jobs that people have, small: real or made data, a host for each, and the words that train it.

diabetes      regression on scikit-learn's table of 442 patients
digits        classification of scikit-learn's digits
shapes        segmentation of drawn discs and bars
translation   from bytes to bytes: a word to its mirror image in capitals
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import esper

LONGEST = 8  # bytes of a word


class Shapes(Dataset):
    """A disc (1) and a bar (2) on noise, 12 x 12, with its number beside it if asked for."""

    def __init__(self, count: int, numbered: bool = False) -> None:
        self.count, self.numbered = count, numbered

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        own = torch.Generator().manual_seed(index)
        y, x = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
        mask = torch.zeros(12, 12, dtype=torch.int64)
        top, left, row = torch.randint(3, 9, (3,), generator=own).tolist()
        mask[(y - top) ** 2 + (x - left) ** 2 <= 6] = 1
        mask[row] = 2
        image = mask[None].float() + 0.3 * torch.randn(1, 12, 12, generator=own) + 0.1 * torch.randn(())
        return (image, torch.tensor(index), mask) if self.numbered else (image, mask)


class Words(Dataset):
    """Words as bytes; label: their mirror image in capitals, nothing where the word has ended."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        own = torch.Generator().manual_seed(index)
        length = int(torch.randint(3, LONGEST + 1, (1,), generator=own))
        word = bytes(torch.randint(97, 105, (length,), generator=own).tolist())
        tokens, labels = torch.zeros(LONGEST, dtype=torch.int64), torch.full((LONGEST,), -100)
        tokens[:length] = torch.tensor(list(word))
        labels[:length] = torch.tensor(list(word[::-1].upper()))
        return {"tokens": tokens, "labels": labels}


def shapes(count: int = 300, numbered: bool = False) -> esper.Data:
    return esper.Data(train=Shapes(count, numbered), classes=3)


def words(count: int = 300) -> esper.Data:
    return esper.Data(train=Words(count), classes=256)


class Numbered(nn.Module):
    """A host of numbered shapes; a buffer digests the numbers of the samples that it is trained on, in their order."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, image: Tensor, number: Tensor) -> Any:
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                for one in number.tolist():
                    self.seen.mul_(31).add_(one + 1).remainder_(2**55 - 55)
        return self.inner(image)


class Translator(nn.Module):
    """Mixes places, then tells the byte at each."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(256, width), nn.Linear(LONGEST, LONGEST)
        self.hidden, self.head = nn.Linear(width, width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Any:
        mixed = self.mix(self.embedding(tokens).transpose(1, 2)).transpose(1, 2)
        return {"logits": self.head(self.hidden(mixed).relu())}


def build(input_shape: tuple[int, ...], classes: int, job: str) -> nn.Module:
    """The host of a job."""
    if job == "diabetes":
        return nn.Sequential(nn.Sequential(nn.Linear(input_shape[0], 8), nn.ReLU()), nn.Linear(8, 1))
    if job == "translation":
        return Translator()
    first = nn.Sequential(nn.Conv2d(input_shape[0], 6, 3, padding=1), nn.ReLU())
    net = nn.Sequential(first, nn.Conv2d(6, classes, 1))
    return Numbered(net) if job == "numbered" else net


@dataclass(frozen=True)
class Job:
    """The words of a job beside `COMMON`, its metric, and a unit that its comparison names."""

    words: tuple[str, ...]
    blueprint: str
    metric: str
    head: str
    accurate: bool = True


def host(job: str, site: str) -> tuple[str, ...]:
    """Words that name a host of this module."""
    path = "host.path=tests.support.jobs:build"
    return "host=custom", path, f"host.options={{job: {job}}}", f"host.sites={{r0c0: '{site}'}}"


SMALL = ("data.validation=64", "data.probe=64", "data.test=64")
JOBS = {
    "diabetes": Job(
        (
            "task=regression",
            "task.unit=points",
            "data=table",
            "data.path=diabetes.csv",
            "data.target=[progression]",
            *SMALL,
            *host("diabetes", "0"),
            "optim.lr=0.05",
        ),
        "mlp",
        "mae",
        "mae points",
        accurate=False,
    ),
    "digits": Job(
        (
            "data=digits",
            "host=cnn",
            "host.widths=[8,16]",
            "trainer.batch=128",
            "optim.lr=0.03",
            "task=classification",
            "task.f1=true",
        ),
        "conv_light",
        "f1_macro",
        "f1_macro %",
    ),
    "shapes": Job(
        ("task=segmentation", "data=custom", "data.path=tests.support.jobs:shapes", *SMALL, *host("shapes", "0")),
        "conv_light",
        "mean_iou",
        "mean_iou %",
    ),
    "translation": Job(
        ("task=seq2seq", "data=custom", "data.path=tests.support.jobs:words", *SMALL, *host("translation", "hidden")),
        "norm",
        "token_accuracy",
        "token_accuracy %",
    ),
}
COMMON = (
    "world.nproc_per_node=1",
    "trainer.steps=72",
    "trainer.batch=32",
    "control.every=6",
    "checkpoint.every_ticks=3",
    "optim.lr=0.02",
    "gates=observe",
    "slots.incubation=immediate",
    "gates.probe_samples=32",
    "gates.min_samples=16",
    "telemetry.wandb.mode=disabled",
)


def growing(blueprint: str) -> tuple[str, str]:
    """Words of a controller under which a seed is born, blended in and kept."""
    life = (f"op: GERMINATE, blueprint: {blueprint}, ticks: 1", "op: ADVANCE", "op: ADVANCE", "op: FOSSILIZE")
    actions = ", ".join(f"{{tick: {t}, slot: r0c0, {what}}}" for t, what in zip((1, 3, 6, 7), life, strict=True))
    return "controller=schedule", f"controller.actions=[{actions}]"


def words_of(job: Job) -> tuple[str, ...]:
    """All words of a job but those of its controller."""
    named = {word.partition("=")[0] for word in job.words}
    return (*job.words, *(word for word in COMMON if word.partition("=")[0] not in named))


def write_diabetes(path: Path) -> None:
    """The table as CSV, in the units of its authors."""
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*table.feature_names, "progression"])
        writer.writerows([*map(float, row), float(y)] for row, y in zip(table.data, table.target, strict=True))
