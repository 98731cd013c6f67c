"""Supervises one torchrun as a child process: starts it, stops it, and leaves no process of it behind.

Signals, from the gentlest to the hardest:
  1. SIGINT, SIGTERM or SIGUSR1 at the launcher: every worker gets one SIGUSR1 as soon as it can catch it, so that it
     saves at its next tick. Its helpers and the agent get none. Workers that start later get theirs, too. In a Slurm
     job on several hosts srun gets the signal, and passes it on to a supervisor like this one on each of them.
  2. A second SIGINT or SIGTERM (schedulers repeat SIGUSR1), or ``grace_s`` later, or once ranks that stand still
     have nothing to save: SIGHUP to the agent, which ends its workers; SIGTERM to srun.
  3. Five seconds later: SIGKILL to every process that the run started.
  4. A minute later: what cannot be killed (it waits for a device or a file system, state D) is named and left behind.
     It holds RUN's lock until it is gone.
Processes that are left when the agent has ended, for whatever reason, get five seconds and are then killed. The
launcher adopts orphans (a Linux "subreaper"), so no process can escape this.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from esper.launcher.processes import catches, children_of, descendants_of, describe_state, leads_session
from esper.run.parent import adopt_orphans
from esper.tolaria.ranks.config import Device, WorldConfig
from esper.tolaria.training.config import TrainerConfig

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_KILL_AFTER_S = 5.0
_GIVE_UP_S = 60.0  # after a SIGKILL; taking down a process with much memory takes its time
_POLL_S = 0.2


def torchrun_arguments(
    world: WorldConfig,
    config_path: Path,
    module: str = "esper.worker",
    *,
    is_first: bool | None = None,
    own_name: str | None = None,
    patience_s: float | None = None,
) -> list[str]:
    """The arguments of ``torchrun`` on the command line.

    Args:
        world: ranks, hosts and the rendezvous.
        config_path: RUN/config.yaml.
        module: the module that each rank runs.
        is_first: whether the rendezvous is on this host; None lets torchrun find out, which fails with DNS aliases.
        own_name: the name by which the other hosts reach this one; None takes its hostname.
        patience_s: seconds that the hosts wait for each other; None takes torchrun's ten minutes.
    """
    alone = world.nnodes == 1
    endpoint = world.rdzv_endpoint
    if alone and endpoint in (None, "slurm"):
        endpoint = "localhost:0"
    conf = [] if is_first is None else [f"is_host={int(is_first)}"]
    conf += [] if patience_s is None else [f"join_timeout={patience_s:.0f}"]
    return [
        f"--nnodes={world.nnodes}",
        f"--nproc-per-node={world.nproc_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={world.rdzv_id or uuid.uuid4().hex[:12]}",
        # A host whose own name does not resolve can still talk to itself.
        *(["--local-addr=localhost"] if alone else [f"--local-addr={own_name}"] if own_name else []),
        *([f"--rdzv-conf={','.join(conf)}"] if conf and not alone else []),
        f"--max-restarts={world.max_restarts}",
        "-m",
        module,
        str(config_path),
    ]


def rendezvous_of(arguments: list[str]) -> str:
    """The name of the rendezvous in `torchrun_arguments`; its ranks see it as TORCHELASTIC_RUN_ID."""
    return next(word.removeprefix("--rdzv-id=") for word in arguments if word.startswith("--rdzv-id="))


def agent_command(arguments: list[str]) -> list[str]:
    """The command line of torchrun as `esper.launcher.agent` runs it."""
    return [sys.executable, "-m", "esper.launcher.agent", *arguments]


# glibc returns blocks of 128 KiB and more to the kernel when they are freed, so that every activation of every step is
# paged in anew. If it keeps them, a step of a small CNN takes two thirds of the time. Bytes; 32 MiB is glibc's limit.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def torchrun_environment(world: WorldConfig, trainer: TrainerConfig) -> dict[str, str]:
    """The variables that every torchrun of a run needs, beside those that it inherits."""
    needed = {"OMP_NUM_THREADS": str(world.threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONUNBUFFERED": "1"}
    if world.device is Device.CPU and not any(name in os.environ for name in MALLOC):
        needed |= MALLOC
    if world.device is Device.GPU and trainer.deterministic:
        needed["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return needed


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of a torchrun.

    Fields:
        returncode: exit code of the agent; RUN/STATUS.json says more.
        stopped: name of the first signal that asked it to stop, or another reason; None without a stop.
        forced: whether it was ended by force, before its workers had saved.
    """

    returncode: int
    stopped: str | None
    forced: bool


def _send(pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signum)


class _Signals:
    """Records stop signals inside a ``with`` block; the handlers do nothing else."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.names.append(signal.Signals(signum).name)

    @property
    def insist(self) -> bool:
        """Whether a second SIGINT or SIGTERM asks for the end at once."""
        return sum(name in ("SIGINT", "SIGTERM") for name in self.names) > 1

    def __enter__(self) -> "_Signals":
        self._before = {signum: signal.signal(signum, self._note) for signum in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def supervise(
    command: list[str],
    environment: Mapping[str, str],
    *,
    grace_s: float,
    lock: int | None = None,
    stop_due: Callable[[], str | None] = lambda: None,
    nothing_unsaved: Callable[[], bool] = lambda: False,
    idle_s: float | None = None,
    remote: bool = False,
) -> Ended:
    """Runs a torchrun, or the srun that starts one on every host, to its end, and leaves no process behind.

    Args:
        command: an `agent_command`, or with ``remote`` an srun.
        environment: variables that are added to this process's own.
        grace_s: seconds between the first stop signal and force.
        lock: descriptor of the run's lock; the child holds it too, so that a run whose launcher was killed stays
            locked until its workers are gone.
        stop_due: called often; a reason that it returns counts like a stop signal.
        nothing_unsaved: called often after a stop signal; if it says so, force is used at once.
        idle_s: seconds without a worker after which the agent is ended, since the other hosts did not come.
        remote: whether the workers are on other hosts.
    """
    others = descendants_of(os.getpid()) | set(children_of(os.getpid(), alive=False))
    adopt_orphans(True)
    try:
        with _Signals() as signals:
            child = subprocess.Popen(
                command,
                env={**os.environ, **environment, "ESPER_LAUNCHER_PID": str(os.getpid()), "ESPER_SUPERVISED": "1"},
                pass_fds=() if lock is None else (lock,),
                start_new_session=True,  # Ctrl-C reaches the launcher alone, which passes it on
            )
            try:
                forced = _watch(child, signals, grace_s, stop_due, nothing_unsaved, idle_s, remote)
            finally:
                _end_leftovers(child, others)
            return Ended(
                -signal.SIGKILL if child.returncode is None else child.returncode,
                signals.names[0] if signals.names else None,
                forced,
            )
    finally:
        adopt_orphans(False)


def _ask_to_stop(child: "subprocess.Popen[bytes]", asked: set[int], remote: bool) -> None:
    """Sends one SIGUSR1 to each worker (or the srun) that can catch it now and is not in ``asked`` yet."""
    for pid in {child.pid} if remote else set(children_of(child.pid)):
        # An srun blocks the signal and waits for it.
        if pid not in asked and (catches(pid, signal.SIGUSR1) or (remote and catches(pid, signal.SIGUSR1, "SigBlk:"))):
            asked.add(pid)
            _send(pid, signal.SIGUSR1)


def _watch(
    child: "subprocess.Popen[bytes]",
    signals: _Signals,
    grace_s: float,
    stop_due: Callable[[], str | None],
    nothing_unsaved: Callable[[], bool],
    idle_s: float | None,
    remote: bool,
) -> bool:
    """Waits until the child has ended, and stops it where asked to; returns whether force was used."""
    asked: set[int] = set()
    deadline = kill_at = idle_at = float("inf")
    while child.poll() is None:
        now = time.monotonic()
        if not signals.names and (reason := stop_due()):
            signals.names.append(reason)
        if signals.names and deadline == float("inf"):
            deadline = now + grace_s
            print(
                f"\nesper: {signals.names[0]}: workers save at the next tick and stop (at most {grace_s:g} s; "
                "a second signal ends them at once)",
                file=sys.stderr,
                flush=True,
            )
        if idle_s is not None:
            idle_at = float("inf") if any(map(leads_session, children_of(child.pid))) else min(idle_at, now + idle_s)
        if signals.names and kill_at == float("inf"):
            _ask_to_stop(child, asked, remote)
        if signals.names and now < deadline and kill_at == float("inf") and nothing_unsaved():
            print(
                "esper: the ranks stand still and no step is unsaved, so they are ended at once",
                file=sys.stderr,
                flush=True,
            )
            deadline = now
        if kill_at == float("inf") and (signals.insist or now >= min(deadline, idle_at)):
            if now >= idle_at:
                print(
                    f"esper: no rank here for {idle_s:g} s: the other hosts did not come", file=sys.stderr, flush=True
                )
            kill_at = now + _KILL_AFTER_S
            child.send_signal(signal.SIGTERM if remote else signal.SIGHUP)
        if now >= kill_at:
            for pid in descendants_of(child.pid):
                _send(pid, signal.SIGKILL)
            _kill(child)
            break
        try:
            child.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            continue
    return kill_at < float("inf")


def _kill(child: "subprocess.Popen[bytes]") -> None:
    """Kills a child and waits for its end, but not for ever."""
    child.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GIVE_UP_S)


def _end_leftovers(agent: "subprocess.Popen[bytes]", others: set[int]) -> None:
    """Ends the processes that the run left: after five seconds (a helper may still be writing) by SIGKILL."""
    if agent.poll() is None:  # `_watch` itself failed, or the agent cannot be killed
        _kill(agent)
    deadline = time.monotonic() + _KILL_AFTER_S
    while left := descendants_of(os.getpid()) - others:
        if time.monotonic() >= deadline + _GIVE_UP_S:
            for pid in sorted(left):
                print(
                    f"esper: process {pid} cannot be killed ({describe_state(pid)}) and is left behind; RUN stays "
                    "locked while it lives",
                    file=sys.stderr,
                    flush=True,
                )
            break
        if time.monotonic() >= deadline:
            for pid in left:
                _send(pid, signal.SIGKILL)
        time.sleep(0.05)
    for pid in set(children_of(os.getpid(), alive=False)) - others:  # adopted orphans: this process must wait for them
        os.waitpid(pid, 0)
