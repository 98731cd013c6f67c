"""What a user waits for: from a command to its first step, and from a killed rank to training again.

Each round takes the arms one after the other, so that the machine is alike for all. Seconds are of the clock; beside
them stand CPU seconds of all processes, which tell more where other work is on the machine.
"""

import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parents[2]
PLAIN = Path(__file__).with_name("plain_start.py")
DEMO = ["experiment=demo", "telemetry.wandb.mode=disabled", "telemetry.console=off"]
PATIENCE_S = 600.0


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _environment(code: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}


def _wait(due: Callable[[], bool], process: "subprocess.Popen[bytes]") -> float:
    deadline = _now() + PATIENCE_S
    while not due():
        if process.poll() is not None or _now() > deadline:
            raise SystemExit(f"the command ended with {process.poll()} before it came as far")
        time.sleep(0.005)
    return _now()


def _step(run: Path) -> int:
    """Steps that rank 0 has done, by its last mark."""
    try:
        return int(json.loads((run / "heartbeat" / "rank-00000").read_bytes())[0])
    except (OSError, ValueError):
        return 0


def start_plain(code: Path, folder: Path) -> tuple[float, float]:
    """Seconds to the first step of a plain script under torchrun, and CPU seconds of its processes."""
    mark, before, began = folder / "mark", _cpu(), _now()
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(PLAIN), str(mark)]
    subprocess.run([sys.executable, *words], check=True, cwd=folder, env=_environment(code), capture_output=True)
    return float(mark.read_text()) - began, _cpu() - before


def start_demo(code: Path, folder: Path) -> tuple[float, float]:
    """The same of the demo, cut short after its second step."""
    run, before, began = folder / "run", _cpu(), _now()
    words = [str(code / "launch" / "train.py"), *DEMO, "trainer.steps=4", f"run.dir={run}"]
    env = _environment(code)
    process = subprocess.Popen([sys.executable, *words], cwd=folder, env=env, stdout=subprocess.DEVNULL)
    seconds = _wait(lambda: _step(run) >= 1, process) - began
    process.wait()
    return seconds, _cpu() - before


def restart_demo(code: Path, folder: Path) -> tuple[float, float]:
    """Seconds from the kill of rank 1 until rank 0 has done a step of the next attempt, and CPU seconds meanwhile."""
    run = folder / "run"
    words = [*DEMO, "trainer.steps=100000", "checkpoint.every_ticks=1", "world.max_restarts=1", f"run.dir={run}"]
    process = subprocess.Popen(
        [sys.executable, str(code / "launch" / "train.py"), *words],
        cwd=folder,  # not that of a checkout, whose code would be imported first
        env=_environment(code),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    saved = run / "saved.json"
    _wait(lambda: saved.exists() and _step(run) >= 28, process)
    began, before = _now(), _cpu_of_tree(process.pid)
    os.kill(_rank(process.pid, 1), signal.SIGKILL)
    attempt = run / "attempt.json"
    _wait(lambda: json.loads(attempt.read_text())["number"] == 2, process)
    stale = (run / "heartbeat" / "rank-00000").read_bytes()
    _wait(lambda: (run / "heartbeat" / "rank-00000").read_bytes() != stale, process)
    at = _step(run)
    seconds = _wait(lambda: _step(run) > at, process) - began
    cpu = _cpu_of_tree(process.pid) - before
    process.send_signal(signal.SIGINT)
    process.wait()
    return seconds, cpu


def _tree(pid: int) -> list[int]:
    sys.path.insert(0, str(HERE))
    from esper.launcher.processes import descendants_of

    return [pid, *descendants_of(pid)]


def _cpu_of_tree(pid: int) -> float:
    """CPU seconds of a process and of all below it, with those that it and they have waited for."""
    total = 0.0
    for each in _tree(pid):
        try:
            words = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK")
    return total


def _rank(pid: int, rank: int) -> int:
    for each in _tree(pid):
        try:
            words = [
                *Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0"),
                *Path(f"/proc/{each}/environ").read_bytes().split(b"\0"),
            ]
        except OSError:
            continue
        if f"RANK={rank}".encode() in words and b"esper.worker" in words:
            return each
    raise SystemExit(f"no rank {rank} below process {pid}")


Arm = Callable[[Path, Path], tuple[float, float]]


def _compare(arms: dict[str, tuple[Arm, Path]], rounds: int) -> None:
    """Prints the median and the range of every arm, and what they are of the first arm's in the same round."""
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(rounds):
        turn = list(arms.items())
        for name, (arm, code) in turn if number % 2 == 0 else reversed(turn):
            with tempfile.TemporaryDirectory() as folder:
                seen[name].append(arm(code, Path(folder)))
    first = next(iter(seen.values()))
    for name, pairs in seen.items():
        print(f"{name:<28} {_spread(pairs, 0)} s   CPU {_spread(pairs, 1)} s", flush=True)
        if pairs is not first:
            shares = [(a / c, b / d) for (a, b), (c, d) in zip(pairs, first, strict=True)]
            print(f"{'':<28} {_spread(shares, 0)}     CPU {_spread(shares, 1)}   of the first", flush=True)


def _spread(pairs: list[tuple[float, float]], which: int) -> str:
    """Median and range."""
    values = [pair[which] for pair in pairs]
    return f"{statistics.median(values):6.2f} [{min(values):.2f}, {max(values):.2f}]"


def start(rounds: int, before: Path | None) -> None:
    """From the command to the first step: the demo beside a plain script under torchrun, and that beside itself."""
    arms: dict[str, tuple[Arm, Path]] = {
        "plain torchrun": (start_plain, HERE),
        "plain torchrun, again": (start_plain, HERE),
        "demo": (start_demo, HERE),
    }
    if before is not None:
        arms["demo, before"] = (start_demo, before)
    _compare(arms, rounds)


def restart(rounds: int, before: Path | None) -> None:
    """From a killed rank to training again, by torchrun's restart."""
    now: tuple[Arm, Path] = (restart_demo, HERE)
    arms = {"killed rank": now, "killed rank, again": now}
    if before is not None:
        was: tuple[Arm, Path] = (restart_demo, before)
        arms = {"killed rank, before": was, "killed rank, before, again": was, "killed rank": now}
    _compare(arms, rounds)


PARTS = {"start": start, "restart": restart}
