"""Compares networks with a seed and without it from its birth on, on the same batches: what a forked twin could tell.

    python launch/paired.py                                # widths 32 and 8, 20 random seeds: some five minutes

A classifier of scikit-learn's digits (64 - width - 10) is trained for 770 steps. At step 33 a seed is added at full
alpha behind its first Linear: ``lora`` adds nothing there, ``mlp`` adds a layer. ``twin`` is the network itself with
weights moved by 0.001 %, ``order`` the network on batches in another order: what chance does. Printed is the loss that
the seed saves on probe and held-out samples after so many steps: mean and deviation over random seeds, and how often it
is above 0.
"""

import argparse
import statistics
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from lives import LR, Batch, Digits
from torch import Tensor, nn

STEPS, BORN = 770, 33
AFTER = (50, 100, 200, 400, STEPS - BORN)
ARMS = ("twin", "order", "lora", "mlp")


class Net(nn.Module):
    """64 - width - 10, with a place for a seed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, width), nn.Linear(width, 10)
        self.seed: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 1, 8, 8]."""
        h = self.first(x.flatten(1))
        return self.last(torch.relu(h if self.seed is None else h + self.seed(h)))


def build_seed(kind: str, width: int) -> nn.Sequential:
    """A seed whose last layer begins at a tenth of its size."""
    if kind == "lora":
        seed = nn.Sequential(nn.Linear(width, 4, bias=False), nn.Linear(4, width, bias=False))
    else:
        seed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    with torch.no_grad():
        seed[-1].weight.mul_(0.1)
    return seed


def batches(digits: Digits, number: int) -> Iterator[Batch]:
    """Batches without end, in an order of this number."""
    generator = torch.Generator().manual_seed(number)
    while True:
        yield from digits.epoch(generator)


def train(digits: Digits, width: int, number: int, arm: str) -> list[float]:
    """The losses of one network at the steps of `AFTER`."""
    torch.manual_seed(number)
    net, feed, judged = Net(width), batches(digits, number), (digits.probe, digits.held)
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=LR), []
    for step in range(STEPS):
        if step == BORN:
            torch.manual_seed(777 + number)
            if arm == "order":
                feed = batches(digits, 7000 + number)
            elif arm == "twin":
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter.mul_(1 + 1e-5 * torch.randn_like(parameter))
            elif arm != "none":
                net.seed = build_seed(arm, width)
                optimizer.add_param_group({"params": list(net.seed.parameters())})
        x, y = next(feed)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        if step + 1 - BORN in AFTER:
            with torch.no_grad():
                losses.append(statistics.fmean(float(F.cross_entropy(net(x), y)) for x, y in judged))
    return losses


def main() -> None:
    """Prints a line for each width and arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--widths", default="32,8")
    options = parser.parse_args()
    digits = Digits.load()
    for width in map(int, options.widths.split(",")):
        without = [train(digits, width, number, "none") for number in range(options.runs)]
        for arm in ARMS:
            rows = [train(digits, width, number, arm) for number in range(options.runs)]
            parts = []
            for at, after in enumerate(AFTER):
                saved = [one[at] - other[at] for one, other in zip(without, rows, strict=True)]
                positive = sum(value > 0 for value in saved)
                parts.append(f"{after}: {statistics.fmean(saved):+.3f} ({statistics.stdev(saved):.3f}) {positive}")
            print(f"width {width}, {arm}: {'; '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
