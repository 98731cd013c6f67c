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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType

from esper.launcher.ahead.process import ReadyAgent
from esper.launcher.processes import catches, children_of, descendants_of, describe_state, leads_session
from esper.run.parent import adopt_orphans

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_KILL_AFTER_S = 5.0
_GIVE_UP_S = 60.0  # after a SIGKILL; taking down a process with much memory takes its time
_POLL_S = 0.2


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
    ready: ReadyAgent | None = None,
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
        ready: a process that was started ahead to run an `agent_command`; None starts one.
        stop_due: called often; a reason that it returns counts like a stop signal.
        nothing_unsaved: called often after a stop signal; if it says so, force is used at once.
        idle_s: seconds without a worker after which the agent is ended, since the other hosts did not come.
        remote: whether the workers are on other hosts.
    """
    others = descendants_of(os.getpid()) | set(children_of(os.getpid(), alive=False))
    variables = {**environment, "ESPER_SUPERVISED": "1"}
    adopt_orphans(True)
    try:
        with _Signals() as signals:
            if ready is not None:
                child = ready.process
                others -= {child.pid, *descendants_of(child.pid)}
                ready.go(command, variables, lock)
            else:
                child = subprocess.Popen(
                    command,
                    env={**os.environ, **variables, "ESPER_LAUNCHER_PID": str(os.getpid())},
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
