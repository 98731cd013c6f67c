"""A multirun that Hydra itself sends to Slurm, by the launcher plugin of the extra ``submitit``."""

import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import Cluster
from tests.slurm.test_slurm import ALONE, SMALL
from tests.support.dist import ROOT

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("submitit") is None, reason="no hydra-submitit-launcher: pip install '.[submitit]'"
    ),
]


def typed(cluster: Cluster, folder: Path, *words: str) -> tuple[int, str]:
    """Exit code and words of a command on the controller's host that waits for its jobs."""
    log, paths = folder / "command.log", os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    log.unlink(missing_ok=True)
    line = f"({shlex.join(words)}; echo code $?) >{log} 2>&1 </dev/null &"
    cluster.ask("sh", "-c", line, folder=folder, PYTHONPATH=paths)
    cluster.until(lambda: re.search(r"(?m)^code \d+$", log.read_text()) is not None, "the end of the command", log)
    said = log.read_text()
    return int(said.split()[-1]), said


def test_jobs_of_a_sweep_run_on_the_cluster_and_a_failure_there_is_told_here(cluster: Cluster) -> None:
    """Two seeds end well, and are not run again. A third job is refused where it starts."""
    folder = cluster.base / "sent"
    folder.mkdir()
    slurm = ("hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=10", "hydra.launcher.cpus_per_task=1")
    train = [sys.executable, str(ROOT / "launch" / "train.py"), "-m", *slurm, *SMALL[1:], *ALONE]
    sweep = [*train, "hydra.sweep.dir=sweep", "seed=1,2"]
    code, said = typed(cluster, folder, *sweep)
    assert code == 0, said
    runs = [folder / "sweep" / str(job) for job in (0, 1)]
    for seed, run in enumerate(runs, start=1):
        assert json.loads((run / "STATUS.json").read_text())["status"] == "done"
        assert f"seed: {seed}\n" in (run / "config.yaml").read_text()
    logs = "".join(path.read_text() for path in (folder / "sweep" / ".submitit").rglob("*.out"))
    assert logs.count("esper: done at step 40") == 2, logs

    before = [(run / "events.jsonl").stat().st_mtime_ns for run in runs]
    assert typed(cluster, folder, *sweep)[0] == 0
    assert [(run / "events.jsonl").stat().st_mtime_ns for run in runs] == before

    text = ("host=gpt", "data=text", "trainer=language", "data.root=/nowhere")
    code, said = typed(cluster, folder, *train, "hydra.sweep.dir=refused", *text)
    assert code == 74, said
    assert re.search(r"(?m)^esper: data: data=text: /nowhere", said), said
    assert "Traceback" not in said, said
