"""Counts how often the heuristic fossilises a seed that adds nothing, and one that helps; and what the network gained.

    python launch/lives.py                                         # widths 32 and 8, 20 runs each: some ten minutes
    python launch/lives.py --allow-foldable --blueprints lora --baseline continued
    python launch/lives.py --keep lives.jsonl                      # stopped, the same command goes on where it was

The host is a classifier of scikit-learn's digits (64 - width - 10), trained by `esper.Session` for 770 steps on 700
images. A ``lora`` seed at its first Linear adds nothing: exported, it folds into that layer. An ``mlp`` seed there adds
what a narrow host lacks; ``any`` leaves the choice to the heuristic. Each run has a twin without growth: same weights,
same batches.
"""

import argparse
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.leyline.errors import ConfigError

EPOCHS, EVERY, BATCH, LR = 70, 11, 64, 2e-3
Batch = tuple[Tensor, Tensor]


def per_sample(model: Any, batch: Batch) -> Tensor:
    """Nats of each sample, [B]."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


@dataclass(frozen=True, slots=True)
class Digits:
    """Training, probe and held-out samples."""

    train: Batch
    probe: Batch
    held: Batch

    @classmethod
    def load(cls) -> "Digits":
        """Cuts scikit-learn's digits in three, always alike."""
        digits = load_digits()
        x = torch.tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)
        y = torch.tensor(digits.target)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(5))
        parts = [(x[part], y[part]) for part in (order[:700], order[700:1250], order[1250:])]
        return cls(*parts)

    def epoch(self, generator: torch.Generator) -> Iterator[Batch]:
        """The training batches of an epoch."""
        x, y = self.train
        for indices in torch.randperm(len(y), generator=generator).split(BATCH):
            yield x[indices], y[indices]


@dataclass(frozen=True, slots=True)
class Life:
    """How a run ended: loss and accuracy on held-out samples, the stage of its slot and what lives there ("" where
    nothing does), births, and the most continuations of one of its seeds."""

    loss: float
    accuracy: float
    stage: str
    blueprint: str
    births: int
    continuations: int


def live(seed: int, digits: Digits, width: int, controller: Any, gates: dict[str, Any], incubation: str) -> Life:
    """Trains one network."""
    torch.manual_seed(seed)
    host = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    grown = esper.attach(host, {"r0c0": "1"}, digits.probe[0][:4])
    optimizer = torch.optim.AdamW(host.parameters(), lr=LR)
    session = esper.Session(
        grown,
        optimizer,
        controller=controller,
        loss=per_sample,
        probe=DataLoader(TensorDataset(*digits.probe), batch_size=256),
        every=EVERY,
        seed=seed,
        steps=EVERY * EPOCHS,
        slots={"incubation": incubation},
        gates=gates,
    )
    generator = torch.Generator().manual_seed(seed)
    continuations = 0
    for _ in range(EPOCHS):
        for batch in digits.epoch(generator):
            session.loss(batch).backward()
            session.step()
            continuations = max(continuations, session.state.slots[0].continued)
    (entry,) = session.state.slots
    host.eval()
    x, y = digits.held
    with torch.no_grad():
        logits = host(x)
    session.close()
    return Life(
        loss=float(F.cross_entropy(logits, y)),
        accuracy=float((logits.argmax(1) == y).float().mean()),
        stage=entry.stage.name,
        blueprint=entry.blueprint or "",
        births=entry.generation,
        continuations=continuations,
    )


class Kept:
    """Lives by their settings, in a file of JSON lines if one is given."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._lives = path, dict[str, Life]()
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                key, life = json.loads(line)
                self._lives[key] = Life(**life)

    def get(self, key: str, make: Callable[[], Life]) -> Life:
        """The life of these settings, lived now if it is not known."""
        if key not in self._lives:
            self._lives[key] = make()
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps([key, asdict(self._lives[key])]) + "\n")
        return self._lives[key]


def with_error(values: list[float]) -> str:
    """The mean and its standard error."""
    return f"{statistics.mean(values):+.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def main() -> None:
    """Prints a row for each blueprint and width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--widths", default="32,8")
    parser.add_argument("--blueprints", default="lora,any,mlp", help="a row for each; any: the heuristic's own choice")
    parser.add_argument("--baseline", default="standing", choices=("continued", "standing"))
    parser.add_argument("--allow-foldable", action="store_true", help="gates.allow_foldable=true")
    parser.add_argument("--incubation", default="immediate")
    parser.add_argument("--keep", type=Path, help="file of finished lives, which are not lived again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    digits, kept = Digits.load(), Kept(args.keep)

    def lives(width: int, controller: Any, gates: dict[str, Any]) -> list[Life]:
        return [
            kept.get(
                f"{seed} {width} {controller} {gates} {args.incubation}",
                partial(live, seed, digits, width, controller, gates, args.incubation),
            )
            for seed in range(args.runs)
        ]

    columns = ["blueprints", "width", "runs", "births", "fossils", "other ends", "continuations", "gain, nats"]
    table = Table(*columns, "gain, points")
    gates = {"baseline": args.baseline, "allow_foldable": args.allow_foldable}
    for width in map(int, args.widths.split(",")):
        alone = lives(width, "none", {"evidence": "observe"})
        for name in args.blueprints.split(","):
            try:
                runs = lives(width, {"kind": "heuristic", "blueprints": [] if name == "any" else [name]}, gates)
            except ConfigError as error:
                table.add_row(name, str(width), str(args.runs), "0", "0", f"refused: {error}", "", "", "")
                continue
            ends = Counter(f"{run.stage} {run.blueprint}".strip() for run in runs)
            fossils = {end: count for end, count in ends.items() if end.startswith("FOSSILIZED")}
            gains = [one.loss - run.loss for one, run in zip(alone, runs, strict=True)]
            points = [100 * (run.accuracy - one.accuracy) for one, run in zip(alone, runs, strict=True)]
            table.add_row(
                name,
                str(width),
                str(args.runs),
                str(sum(run.births for run in runs)),
                ", ".join(f"{count} {end.removeprefix('FOSSILIZED ')}" for end, count in fossils.items()) or "0",
                ", ".join(f"{count} {end}" for end, count in ends.items() if end not in fossils),
                str(sum(run.continuations for run in runs)),
                *(with_error(values) for values in (gains, points)),
            )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
