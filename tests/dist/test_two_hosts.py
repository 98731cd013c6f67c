"""Two hosts with addresses of their own, one torchrun on each: the cable is cut in mid-run, restored, lost for good."""

import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import environment
from tests.support.dist import ROOT
from tests.support.killed_runs import assert_same_run, final, live, prepare_run
from tests.support.patience import load, run_patiently
from tests.support.tiny import act, schedule, tiny_plain
from tests.support.two_hosts import STILL_S


@functools.cache
def slowness() -> float:
    """One figure for both runs of a test, since they are compared."""
    return load()


def settings(steps: int) -> dict[str, Any]:
    return tiny_plain(
        "cnn",
        controller=schedule(act(1, "r0c0", "GERMINATE", blueprint="conv_small", ticks=2), act(3, "r0c0", "ADVANCE")),
        trainer__steps=steps,
        control__timeout_s=6.0 * slowness(),
        control__slow_timeout_s=6.0 * slowness(),
        control__startup_timeout_s=90.0 * slowness(),
        checkpoint__every_ticks=1,
        world__nnodes=2,
        world__nproc_per_node=1,
        world__rdzv_endpoint="slurm",
        telemetry__level="full",
    )


def on_two_hosts(run: Path, plan: str) -> dict[str, Any]:
    apart = ["unshare", "-nmpf", "--mount-proc", "--kill-child"]
    probe = ["sh", "-c", "mount -t tmpfs tmpfs /run && mkdir /run/netns && ip netns add probe"]
    if shutil.which("unshare") is None or subprocess.run([*apart, *probe], capture_output=True).returncode:
        pytest.skip("'ip netns add' is not allowed here: it needs root, iproute2 and mounts")
    line = [*apart, sys.executable, "-m", "tests.support.two_hosts", str(run), plan]
    done = run_patiently(line, cwd=ROOT, env=environment(run.parent), still_s=2 * STILL_S)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert "never" not in found, (found, *(path.read_text() for path in run.parent.glob("*.log")))
    return found


def assert_undisturbed(run: Path, twin: Path) -> None:
    """What the run came to is what two ranks on one host come to."""
    prepare_run(twin, settings(300))
    assert live(twin, 2) == [0, 0]
    assert_same_run(final(run), final(twin))


@pytest.mark.parametrize("plan", [pytest.param("restore", marks=pytest.mark.slow), "lose"])
def test_a_cut_cable_ends_both_sides_with_one_named_error(tmp_path: Path, plan: str) -> None:
    """Started again when the cable is back, the run comes to the end of one that was never cut."""
    run = prepare_run(tmp_path / "run", settings(300))
    found = on_two_hosts(run, plan)
    logs = [(tmp_path / f"host{side}-1.log").read_text() for side in (0, 1)]
    assert found["codes"][0] == [1, 1], (found, *logs)
    lost = [re.findall(r"^esper: rank \d: lost contact.*$", log, re.M) for log in logs]
    assert sum(map(len, lost)) >= 1, logs
    assert all(len(lines) <= 1 for lines in lost), "one line on a side"
    assert max(found["seconds"]) < (6.0 + 90.0 + 60.0) * load(), "rank, torchrun, or else its supervisor, has an end"
    print("seconds from the cut to the end:", found["seconds"])
    if plan == "lose":
        status = json.loads((run / "STATUS.json").read_text())
        assert (status["status"], status["exit_code"]) == ("failed", 76)
        return
    again = [(tmp_path / f"host{side}-2.log").read_text() for side in (0, 1)]
    assert found["codes"][1] == [0, 0], (found, *again)
    assert json.loads((run / "attempt.json").read_text())["number"] == 2
    assert_undisturbed(run, tmp_path / "twin")


@pytest.mark.slow
def test_a_cable_that_is_back_within_the_timeout_costs_nothing(tmp_path: Path) -> None:
    run = prepare_run(tmp_path / "run", settings(300))
    found = on_two_hosts(run, "blink")
    logs = [(tmp_path / f"host{side}-1.log").read_text() for side in (0, 1)]
    assert found["codes"] == [[0, 0]], (found, *logs)
    assert not any("lost contact" in log for log in logs)
    assert json.loads((run / "attempt.json").read_text())["number"] == 1
    assert_undisturbed(run, tmp_path / "twin")
