"""Real ranks for tests: a function runs in N processes that meet as torchrun's workers do, over real gloo (or NCCL).

    results = run_distributed(train_a_little, 2, config, tmp_path)      # train_a_little(rank, config, run_dir)

Children fork off a server that has loaded torch and esper once. The store lives in this process, as it lives in
torchrun's agent, so no rank's end takes it away and no port is guessed. Each child has its own global random stream,
one thread, and warnings as errors. What it returns comes back pickled. When no child gets on any more, those that are
left are asked for their stacks and killed by pid, and the test fails with what every rank last said. Configs and
engines: `tests.support.tiny`.
"""

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.patience import STILL_S, Patience, cpu_of, load, marks_of, tree_of

ROOT = Path(__file__).parents[2]
GRACE_S = 0.2  # on a quiet machine, for ranks that may die to end by themselves
# torch._dynamo: the first optimizer of a process imports it, for two seconds.
PRELOAD = ["torch", "torch._dynamo", "esper.worker", "tests.support.tiny", "tests.support.forked"]

# For @pytest.mark.parametrize("device", DEVICES); run_distributed(device="gpu") skips where devices are missing.
DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]


class RanksFailed(AssertionError):
    """Some rank raised, died or was late; the text holds every rank's story."""


@dataclass(frozen=True, slots=True)
class Died:
    """In the place of a result: a rank that ended without one. Negative codes are signals."""

    exit_code: int


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    still_s: float = STILL_S,
    device: str = "cpu",
    may_die: Collection[int] = (),
    groups: int = 1,
) -> list[Any]:
    """Runs ``fn(rank, *args)`` on every rank and returns the results in rank order.

    Args:
        fn: a function of a module (pickled by name). args: picklable; a Path among them that holds a folder
            ``heartbeat`` is taken for the run directory when a failure is told.
        world_size: ranks. still_s: see `Patience`; all ranks together must get on.
        device: "gpu" skips the test where there are fewer CUDA devices than ranks.
        may_die: ranks that are to die or to stand still; they are ended once the others are done.
        groups: how often the ranks meet anew in this launch; see `use_group`.

    Raises:
        RanksFailed: with every rank's traceback, exit code, last heartbeat, stack and stderr.
    """
    if device == "gpu" and torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices, this machine has {torch.cuda.device_count()}")
    context = rank_context()
    stores = [dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False) for _ in range(groups)]
    ports = [store.port for store in stores]
    with tempfile.TemporaryDirectory(prefix="esper-ranks-") as folder:
        ranks: dict[int, Any] = {}
        pipes: dict[int, Any] = {}
        replies: dict[int, tuple[str, Any]] = {}
        try:
            for rank in range(world_size):
                pipes[rank], theirs = context.Pipe(duplex=False)
                ranks[rank] = context.Process(
                    target=_child, args=(fn, rank, world_size, ports, args, theirs, Path(folder)), daemon=True
                )
                ranks[rank].start()
                theirs.close()
            waited = [rank for rank in range(world_size) if rank not in may_die]
            pids = [process.pid for process in ranks.values()]
            runs = [arg for arg in args if isinstance(arg, Path)]
            patience = Patience(cpu_of(lambda: set().union(*map(tree_of, pids))), marks_of(*runs), still_s=still_s)
            _collect(ranks, pipes, replies, waited, patience.lasts)
            leave = time.monotonic() + GRACE_S * load()
            _collect(ranks, pipes, replies, list(may_die), lambda: time.monotonic() < leave)
            late = [rank for rank in waited if rank not in replies]
            for rank in late:
                _ask_for_stack(ranks[rank])
            if late:
                time.sleep(0.5 * load())  # for the stacks to be written
        finally:
            for process in ranks.values():
                process.kill()  # by its pid; nothing happens to one that has ended
            for rank, process in ranks.items():
                process.join()
                replies.setdefault(rank, ("died", process.exitcode))
                process.close()
                pipes[rank].close()
        bad = [rank for rank, (kind, _) in replies.items() if kind == "raised" or (kind == "died" and rank in waited)]
        if bad:
            raise RanksFailed(_story(replies, late, args, Path(folder)))
    return [Died(value) if kind == "died" else value for kind, value in (replies[r] for r in range(world_size))]


def use_group(index: int) -> None:
    """In a child: the next `World` meets in store ``index``. A store that has seen a group cannot bring up another."""
    os.environ["MASTER_PORT"] = os.environ["ESPER_TEST_PORTS"].split()[index]


def rank_context() -> Any:
    """What starts processes that fork off the server; see `multiprocessing.get_context`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    # The server is this process's environment for ever: give it the path to preload by, and one thread.
    wanted = {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        forkserver.ensure_running()
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value
    return context


def _child(
    fn: Callable[..., Any], rank: int, world_size: int, ports: list[int], args: tuple[Any, ...], pipe: Any, folder: Path
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        ESPER_TEST_PORTS=" ".join(map(str, ports)),
        OMP_NUM_THREADS="1",
        TORCHELASTIC_RUN_ID="test",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT="0",
        PYTHONWARNINGS="",
    )
    use_group(0)
    stderr = os.open(_stderr(folder, rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(stderr, 2)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    warnings.resetwarnings()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.manual_seed(104_729 * (rank + 1))  # ranks that seed alike would hide what lockstep is for
    try:
        reply = pickle.dumps(("result", fn(rank, *args)))
    except BaseException:
        reply = pickle.dumps(("raised", traceback.format_exc()))
    with contextlib.suppress(OSError):
        pipe.send_bytes(reply)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as abruptly as a worker may end: peers must cope


def _collect(
    ranks: dict[int, Any],
    pipes: dict[int, Any],
    replies: dict[int, tuple[str, Any]],
    wanted: list[int],
    go_on: Callable[[], bool],
) -> None:
    """Takes the replies of ``wanted`` until all are there, or ``go_on`` says no."""
    while open_ := {pipes[rank]: rank for rank in wanted if rank not in replies}:
        came = multiprocessing.connection.wait(list(open_), timeout=0.1)
        for pipe in came:
            rank = open_[pipe]
            try:
                replies[rank] = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank].join()  # its end of the pipe is closed, so it has ended or is about to
                replies[rank] = ("died", ranks[rank].exitcode)
        if not came and not go_on():
            return


def _stderr(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.stderr"


def _ask_for_stack(process: Any) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR2)


def _story(replies: dict[int, tuple[str, Any]], late: list[int], args: tuple[Any, ...], folder: Path) -> str:
    lines = []
    runs = [arg for arg in args if isinstance(arg, Path) and (arg / "heartbeat").is_dir()]
    for rank in sorted(replies):
        kind, value = replies[rank]
        what = {"result": "ended well", "raised": f"raised\n{value}", "died": f"died with exit code {value}"}[kind]
        lines.append(f"--- rank {rank}: {'late, killed' if rank in late else what}")
        for run in runs:
            mark = run / "heartbeat" / f"rank-{rank:05d}"
            if mark.exists():
                lines.append(f"heartbeat (step, tick, phase, time, error): {mark.read_text().strip()}")
        if _stderr(folder, rank).exists() and (text := _stderr(folder, rank).read_text(errors="replace").strip()):
            lines.append("stderr, its end:\n" + text[-4000:])
    return "\n".join(["not every rank ended well", *lines])
