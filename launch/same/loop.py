"""The session of `launch/same_runs.py`: ``torchrun ... loop.py FOLDER [FILE TO RESTORE]``.

It writes into FOLDER: events.jsonl, middle.pt after half of the steps, end.pt, done.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import esper
from esper.kasmina.streams import seed_streams

STEPS, BATCH, MIDDLE = 160, 32, 80
ACTIONS = [
    {"tick": 1, "slot": "r0c0", "op": "GERMINATE", "blueprint": "conv_small", "ticks": 2},
    {"tick": 1, "slot": "r1c0", "op": "GERMINATE", "blueprint": "norm", "ticks": 1},
    *({"tick": tick, "slot": slot, "op": "ADVANCE"} for tick in (3, 4, 7) for slot in ("r0c0", "r1c0")),
    {"tick": 9, "slot": "r0c0", "op": "FOSSILIZE"},
    {"tick": 12, "slot": "r1c0", "op": "PRUNE", "ticks": 2},
]


def build_host() -> nn.Module:
    """A small CNN; its first weights are the same in every process."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and correctness of each sample."""
    output = model(batch[0])
    return F.cross_entropy(output, batch[1], reduction="none"), (output.argmax(1) == batch[1]).float()


def main() -> None:
    """Trains, or goes on from a file."""
    folder, files = Path(sys.argv[1]), sys.argv[2:]
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    chunks = [(x[at : at + 64], y[at : at + 64]) for at in range(1200, 1776, 64)]
    held_out = {"probe": chunks[:6], "validation": chunks[6:]}
    if files:
        session = esper.Session.restore(files[0], build_host, loss=loss_fn, **held_out)
    else:
        model = build_host()
        grown = esper.attach(model, sites={"r0c0": "1", "r1c0": "3"}, example=x[:2])
        session = esper.Session(
            grown,
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            loss=loss_fn,
            every=8,
            seed=7,
            controller={"kind": "schedule", "actions": ACTIONS},
            gates={"evidence": "observe", "probe_samples": 96},
            slots={"incubation": "shadow"},
            sink=folder / "events.jsonl",
            **held_out,
        )
    rank, world = session.world.rank, session.world.size
    seed_streams(100 + rank)  # Python's and numpy's, too: a save holds them
    for step in range(MIDDLE if files else 0, STEPS):
        if step == MIDDLE and not files:
            session.save(folder / "middle.pt")
        picks = torch.randint(1200, (BATCH,), generator=torch.Generator().manual_seed(step))[rank::world]
        session.loss((x[picks], y[picks])).backward()
        session.step()
    session.save(folder / "end.pt")
    session.close()
    if rank == 0:
        (folder / "done").touch()


if __name__ == "__main__":
    main()
