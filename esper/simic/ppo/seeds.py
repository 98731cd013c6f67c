"""Seeds that no two draws share: one for each purpose and environment, from numpy's `SeedSequence`.

Environments are numbered over all ranks: environment i of rank r, which holds N, is number r * N + i. So a seed belongs
to one (rank, environment, purpose), and the same environments get the same seeds however many ranks share them.
"""

from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What a stream of random numbers is for. Numbers are part of what a seed means: never change one."""

    WEIGHTS = 0
    ENVIRONMENT = 1
    ACTIONS = 2
    MINIBATCHES = 3
    EVALUATION = 4
    EVALUATION_ACTIONS = 5
    IMITATION = 6


def make_seed(seed: int, purpose: Purpose, *numbers: int) -> int:
    """Makes the seed of one stream, 0 to 2**63 - 1.

    Args:
        seed: the training's seed.
        purpose: what the stream is for.
        numbers: which of them: an environment's number, or those of an update and an epoch.
    """
    words = np.random.SeedSequence(seed, spawn_key=(int(purpose), *numbers)).generate_state(1, np.uint64)
    return int(words[0]) >> 1


def make_generator(seed: int, purpose: Purpose, *numbers: int) -> torch.Generator:
    """Makes a generator on the CPU with the seed of `make_seed`."""
    return torch.Generator().manual_seed(make_seed(seed, purpose, *numbers))
