"""What a start is measured against: torch, gloo, scikit-learn's digits, DDP and one step, under plain torchrun."""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Takes one step; rank 0 writes when it was done."""
    dist.init_process_group("gloo")
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    model = DistributedDataParallel(nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    share = slice(dist.get_rank(), 64, dist.get_world_size())
    nn.functional.cross_entropy(model(x[share]), y[share]).backward()
    optimizer.step()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(str(time.clock_gettime(time.CLOCK_BOOTTIME)))
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
