"""Two hosts that share a run directory and a cable: unshare ... python -m tests.support.two_hosts RUN PLAN.

Each is a network namespace with an address of its own and runs `esper.launcher.one_host`, as srun would start it. The
cable is cut at the third tick. PLAN is ``blink`` (it is back after two seconds), ``restore`` (it is back when both
sides have ended, which are then started again) or ``lose`` (it stays cut). Prints one JSON line: exit codes of both
sides, per attempt, and seconds from the cut to each end.

Under ``unshare -nmpf --mount-proc --kill-child``, so that nothing outlives it.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support.patience import Patience, cpu_of, load, tree_of

ADDRESSES = ("10.232.0.1", "10.232.0.2")
STILL_S = 200.0  # both sides may wait for each other, and torchrun for its peer
BLINK_S = 2.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=30 * load())


def lay_cable() -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    Path("/run/netns").mkdir()
    for side in "01":
        ip("netns", "add", f"host{side}")
        ip("-n", f"host{side}", "link", "set", "lo", "up")
    ip("link", "add", "eth0", "netns", "host0", "type", "veth", "peer", "eth0", "netns", "host1")
    for side, address in enumerate(ADDRESSES):
        ip("-n", f"host{side}", "addr", "add", f"{address}/24", "dev", "eth0")
        plug(side, "up")
        retries = "echo 5 > /proc/sys/net/ipv4/tcp_retries2"  # a torchrun may else read from a lost host for 15 minutes
        subprocess.run(["ip", "netns", "exec", f"host{side}", "sh", "-c", retries], check=True)


def plug(side: int, how: str) -> None:
    ip("-n", f"host{side}", "link", "set", "eth0", how)


def start(run: Path, attempt: int) -> list["subprocess.Popen[bytes]"]:
    """Both sides."""
    started = []
    for side, address in enumerate(ADDRESSES):
        name = {"SLURM_NODEID": str(side), "SLURMD_NODENAME": address, "GLOO_SOCKET_IFNAME": "eth0"}
        words = ["ip", "netns", "exec", f"host{side}", sys.executable, "-m", "esper.launcher.one_host"]
        words += [str(run / "config.yaml"), f"{ADDRESSES[0]}:29777", f"attempt-{attempt}"]
        with (run.parent / f"host{side}-{attempt}.log").open("w") as log:
            started.append(subprocess.Popen(words, env={**os.environ, **name}, stdout=log, stderr=log))
    return started


def end(started: list["subprocess.Popen[bytes]"]) -> tuple[list[int | None], list[float]]:
    """Exit codes (None: it had to be ended) and seconds until then."""
    began, seconds = time.monotonic(), [0.0, 0.0]
    patience = patience_with(started)
    while any(process.poll() is None for process in started) and patience.lasts():
        for side, process in enumerate(started):
            if process.poll() is None:
                seconds[side] = time.monotonic() - began
        time.sleep(0.1)
    codes = [process.poll() for process in started]
    for process in started:
        process.kill()
        process.wait()
    return codes, seconds


def patience_with(started: list["subprocess.Popen[bytes]"]) -> Patience:
    return Patience(cpu_of(lambda: set().union(*(tree_of(side.pid) for side in started))), still_s=STILL_S)


def reached(run: Path, tick: int) -> bool:
    try:
        return bool(json.loads((run / "heartbeat" / "rank-00000").read_bytes())[1] >= tick)
    except (OSError, ValueError):
        return False


def main() -> None:
    run, plan = Path(sys.argv[1]), sys.argv[2]
    lay_cable()
    started = start(run, 1)
    patience = patience_with(started)
    while not reached(run, 3):
        if not patience.lasts() or any(process.poll() is not None for process in started):
            print(json.dumps({"never": [process.poll() for process in started]}))
            return
        time.sleep(0.02)
    plug(1, "down")
    if plan == "blink":
        time.sleep(BLINK_S)
        plug(1, "up")
    codes, seconds = end(started)
    told = {"codes": [codes], "seconds": seconds}
    if plan == "restore":
        plug(1, "up")
        codes, _ = end(start(run, 2))
        told["codes"].append(codes)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
