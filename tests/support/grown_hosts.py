"""Small grown hosts of every topology whose seeds matter, with batches and a loss per sample; float64 throughout."""

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.attribution.worth import attribute as attribute_anew
from esper.kasmina.hosts import CNNConfig, GPTConfig, ResNet20Config, build_host
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.slot import Phase
from tests.support.stateful_model import Images

attribute = partial(attribute_anew, statistics=None)  # with the running statistics that the model has


class Sequences(nn.Module):
    """Tokens to features BTC to logits, each position mixing in its past."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).cumsum(1)
        return self.head(self.norm(x + self.mix(x).relu()))


class Vectors(nn.Module):
    """Five layers on features BC; two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(5))
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        x = self.norm(x + shift)
        for layer in self.layers:
            x = torch.tanh(layer(x)) + 0.5 * x
        return self.head(x)


class Delta(nn.Module):
    """A seed for any topology: a linear map of the channels and a tanh."""

    def __init__(self, dim: int, axis: int) -> None:
        super().__init__()
        self.axis, self.map = axis, nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.map(x.movedim(self.axis, -1))).movedim(-1, self.axis)


def classify(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, K] or [B, T, V]; a sequence is one sample."""
    loss = F.cross_entropy(output.movedim(-1, 1), target, reduction="none")
    correct = (output.argmax(-1) == target).double()
    return (loss, correct) if target.ndim == 1 else (loss.mean(1), correct.mean(1))


def _batch(kind: str, samples: int, number: int) -> tuple[Any, Tensor]:
    stream = torch.Generator().manual_seed(number)
    if kind in ("BCHW", "cnn", "resnet20"):
        x = torch.randn(samples, 1, 8, 8, generator=stream, dtype=torch.float64)
        return x, torch.randint(3, (samples,), generator=stream)
    if kind in ("BTC", "gpt"):
        tokens = torch.randint(7, (samples, 5), generator=stream)
        return tokens, torch.randint(7, (samples, 5), generator=stream)
    x, shift = torch.randn(2, samples, 5, generator=stream, dtype=torch.float64)
    return (x, shift), torch.randint(3, (samples,), generator=stream)


HOSTS: dict[str, tuple[Any, tuple[int, ...], int]] = {
    "cnn": (CNNConfig(widths=[4, 4, 6]), (1, 8, 8), 3),
    "resnet20": (ResNet20Config(width=2), (1, 8, 8), 3),
    "gpt": (GPTConfig(layers=3, heads=2, dim=8, block=6, sites=["block", "attention", "mlp"]), (5,), 7),
}


SITES: dict[str, tuple[type[nn.Module], dict[str, str]]] = {
    "BCHW": (Images, {"r0c0": "norm", "r0c1": "blocks.0", "r1c0": "blocks.1"}),
    "BTC": (Sequences, {"r0c0": "embed", "r1c0": "mix"}),
    "BC": (Vectors, {f"r{i}c0": f"layers.{i}" for i in range(5)}),
}


def batches_for(kind: str, sizes: tuple[int, ...] = (6, 6, 3)) -> list[tuple[Any, Tensor]]:
    """Inputs and targets of one host."""
    return [_batch(kind, size, 100 + i) for i, size in enumerate(sizes)]


def grown_for(kind: str, alphas: dict[str, float]) -> Grown:
    """The host of a topology, in train(), its running statistics moved, with a seed in blend per slot of ``alphas``."""
    torch.manual_seed(3)
    if kind in HOSTS:
        model = build_host(*HOSTS[kind]).double()
        sites = {point.slot: point.module for point in model.injection_points()}  # type: ignore[operator]
    else:
        make, sites = SITES[kind]
        model = make().double()
    example, _ = batches_for(kind)[0]
    model(*(example if isinstance(example, tuple) else (example,)))
    grown = attach(model, sites, example)
    for slot, alpha in alphas.items():
        site = grown.sites[slot]
        plant(grown, slot, Delta(site.dim, site.topology.channel_axis).double(), alpha)
    return grown


def plant(grown: Grown, slot: str, seed: nn.Module, alpha: float) -> None:
    """Puts a seed to work."""
    grown.slots[slot].plant(seed)
    grown.slots[slot].phase = Phase.BLEND
    grown.slots[slot].set_alpha(alpha)


class Branches(nn.Module):
    """Branches of equal weights that are added up: their seeds meet only in the sum."""

    def __init__(self, count: int) -> None:
        super().__init__()
        first = nn.Linear(4, 4)
        self.branches = nn.ModuleList(copy.deepcopy(first) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


def branches(count: int, seeds: list[nn.Module]) -> tuple[Grown, list[tuple[Tensor, Tensor]]]:
    """Grown `Branches`, a seed at alpha 1 on each, and two batches of inputs and targets [B, 4]."""
    torch.manual_seed(1)
    x, target = torch.randn(2, 9, 4, dtype=torch.float64)
    grown = attach(Branches(count).double(), {f"r0c{i}": f"branches.{i}" for i in range(count)}, x)
    for i, seed in enumerate(seeds):
        plant(grown, f"r0c{i}", seed, 1.0)
    return grown, [(x[:5], target[:5]), (x[5:], target[5:])]


def deltas(count: int) -> list[nn.Module]:
    """Different seeds for `Branches`."""
    torch.manual_seed(2)
    return [Delta(4, 1).double() for _ in range(count)]
