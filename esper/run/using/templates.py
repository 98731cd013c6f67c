"""The files that ``esper init`` writes, by task; ``NAME`` stands for the package."""

MODEL = {
    "classification": '''"""The host: a small convolutional network. Any nn.Module will do."""

from torch import nn


def build(input_shape, classes, width=8):
    channels = input_shape[0]
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )
''',
    "regression": '''"""The host: a small network on vectors. Any nn.Module will do."""

from torch import nn


def build(input_shape, classes, width=16):
    return nn.Sequential(
        nn.Sequential(nn.Linear(input_shape[0], width), nn.ReLU()),
        nn.Sequential(nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, classes),
    )
''',
    "segmentation": '''"""The host: a small convolutional network that keeps the resolution. Any nn.Module will do."""

from torch import nn


def build(input_shape, classes, width=8):
    channels = input_shape[0]
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width), nn.ReLU()),
        nn.Conv2d(width, classes, 1),
    )
''',
}

DATA_HEAD = '''"""Synthetic data; replace `Samples` with your own map-style data set.

Whatever it draws from torch, numpy or random belongs to (seed, epoch, sample), so every run is exact.
"""

import torch
from torch.utils.data import Dataset

import esper


class Samples(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        own = torch.Generator().manual_seed(index)
'''

DATA = {
    "classification": DATA_HEAD
    + """        label = index % 3
        image = 0.3 * torch.randn(1, 12, 12, generator=own)
        place = int(torch.randint(8, (1,), generator=own))
        if label == 0:
            image[0, place : place + 2] += 1  # a bar across
        elif label == 1:
            image[0, :, place : place + 2] += 1  # a bar down
        else:
            image[0, place : place + 4, place : place + 4] += 1  # a square
        return image, label


def build(samples=900):
    return esper.Data(train=Samples(samples), classes=3)
""",
    "regression": DATA_HEAD
    + """        x = torch.randn(6, generator=own)
        y = torch.sin(2 * x[0]) + x[1] * x[2] + 0.1 * torch.randn((), generator=own)
        return x, y


def build(samples=900):
    return esper.Data(train=Samples(samples), classes=1)
""",
    "segmentation": DATA_HEAD
    + """        image = 0.3 * torch.randn(1, 12, 12, generator=own)
        mask = torch.zeros(12, 12, dtype=torch.int64)
        for kind in (1, 2):
            top, left = torch.randint(8, (2,), generator=own).tolist()
            mask[top : top + 4, left : left + 4] = kind
        image[0] += mask
        return image, mask


def build(samples=900):
    return esper.Data(train=Samples(samples), classes=3)
""",
}

TASK = {
    "classification": '''"""What is learned. Shipped tasks need no file (task=classification); this one is yours."""

import torch.nn.functional as F

import esper


class Own(esper.Task):
    unit, graded, class_logits, objective = "nats", True, True, "accuracy"

    def score(self, output, target):
        loss = F.cross_entropy(output, target, reduction="none")  # one number for each sample
        return esper.Scores(loss, (output.argmax(1) == target).to(loss.dtype))
''',
    "regression": '''"""What is learned. Shipped tasks need no file (task=regression); this one is yours."""

import esper


class Own(esper.Task):
    unit, columns, objective = "", ("absolute",), "mae"
    metrics = (
        esper.Metric(
            esper.MetricInfo(name="mae", higher=False),
            lambda sums: sums["absolute"] / sums["count"] if sums["count"] else None,
        ),
    )

    def score(self, output, target):
        difference = output[:, 0] - target
        return esper.Scores(difference.square(), sums={"absolute": difference.abs()})
''',
    "segmentation": '''"""What is learned. Shipped tasks need no file (task=segmentation); this one is yours."""

import torch.nn.functional as F

import esper


class Own(esper.Task):
    unit, columns, objective = "nats", ("both", "either"), "object_iou"
    metrics = (
        esper.Metric(
            esper.MetricInfo(name="object_iou", unit="share"),
            lambda sums: sums["both"] / sums["either"] if sums["either"] else None,
        ),
    )

    def score(self, output, target):
        loss = F.cross_entropy(output, target, reduction="none").mean((1, 2))
        said, so = output.argmax(1) > 0, target > 0
        return esper.Scores(loss, sums={"both": (said & so).sum((1, 2)), "either": (said | so).sum((1, 2))})
''',
}

SITES = "{r0c0: '0', r1c0: '1'}"
SETTINGS = """# The settings of a run, an override a line; docs/configuration.md of Esper says what each means.
host=custom
host.path=NAME.model:build
host.sites=SITES
data=custom
data.path=NAME.data:build
data.validation=120
data.probe=240
data.test=120
task=custom
task.path=NAME.task:Own
controller=heuristic
trainer.batch=32
trainer.epochs=30
optim.lr=0.01
"""

TRAIN = """#!/usr/bin/env bash
# Trains in runs/: ./train.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")"
mapfile -t settings < <(grep -v '^#' settings.txt)
exec esper train "${settings[@]}" "$@"
"""

SLURM = """#!/usr/bin/env bash
#SBATCH --job-name=NAME --nodes=1 --ntasks-per-node=1 --cpus-per-task=4 --time=01:00:00
#SBATCH --signal=B:USR1@120 --requeue
# sbatch slurm.sh: one node; stopped in time, saved, and put back into the queue. docs/slurm.md of Esper has more nodes.
cd "$SLURM_SUBMIT_DIR"
RUN="runs/$SLURM_JOB_ID"
trap 'kill -USR1 "$PID"' USR1
./train.sh run.dir="$RUN" & PID=$!
while kill -0 "$PID" 2>/dev/null; do wait "$PID"; done
esper requeue "$RUN"
"""

TEST = '''"""A few steps of everything: ``pytest`` in this folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_it_trains(tmp_path):
    settings = [line for line in (HERE / "settings.txt").read_text().splitlines() if not line.startswith("#")]
    quick = ["trainer.limit=6", f"run.dir={tmp_path / 'run'}", "telemetry.wandb.mode=disabled", "telemetry.console=off"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    subprocess.run([sys.executable, "-m", "esper.cli", "train", *settings, *quick], cwd=HERE, env=env, check=True)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["step"] == 6
    assert result["test_loss"]["value"] > 0
'''
