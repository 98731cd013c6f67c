"""The limit of open files grows with the ranks, and what a machine does not allow is said."""

import multiprocessing
import resource
from typing import Any

import pytest

from esper.leyline.errors import ConfigError
from esper.tolaria.ranks.sockets import OWN_FILES, allow_connections


def try_limits(limits: tuple[int, int], ranks: int, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    try:
        allow_connections(ranks, 3)
    except ConfigError as error:
        pipe.send(str(error))
    else:
        pipe.send(resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def after(limits: tuple[int, int], ranks: int) -> int | str:
    """What becomes of a process with these limits (soft, hard)."""
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=try_limits, args=(limits, ranks, theirs))
    child.start()
    told: int | str = ours.recv()
    child.join()
    return told


@pytest.mark.parametrize(("ranks", "soft"), [(2, 1024), (200, 1024), (512, 3 * 511 + OWN_FILES)])
def test_the_limit_is_raised_where_it_is_too_low(ranks: int, soft: int) -> None:
    assert after((1024, 4096), ranks) == soft


def test_a_machine_that_does_not_allow_so_many_is_named_before_any_rank_meets_another() -> None:
    told = after((1024, 4096), 4096)
    assert told == (
        "4096 ranks need 12,541 open files in each process (3 meshes of connections and 256 of its own), and this "
        "machine allows 4,096: raise its hard limit (ulimit -Hn; under Slurm LimitNOFILE of slurmd)"
    )
