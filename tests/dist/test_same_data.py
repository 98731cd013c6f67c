"""Data that are not the same on every rank are refused before the first step, in one line."""

import json
import os
from pathlib import Path

import esper
from esper import worker
from tests.support.dist import run_distributed
from tests.support.killed_runs import prepare_run
from tests.support.toy_tasks import HOT, NUMBERS, Rows, toy_plain


def shrinking(how: str) -> esper.Data:
    """On rank 1 the last training samples are gone, or targets of validation are others."""
    whole, train, validation = Rows(HOT, NUMBERS), Rows(HOT, NUMBERS), Rows(HOT, NUMBERS)
    if os.environ["RANK"] == "1":
        part = Rows(HOT[:41], NUMBERS[:41])
        train, validation = (part, whole) if how == "shrinks" else (whole, Rows(HOT, NUMBERS + 1))
    return esper.Data(train=train, validation=validation, probe=whole, test=whole)


def work(rank: int, run_dirs: list[Path]) -> list[int]:
    codes = []
    for index, run_dir in enumerate(run_dirs):
        os.environ["MASTER_PORT"] = os.environ["ESPER_TEST_PORTS"].split()[index]
        codes.append(worker.run(run_dir / "config.yaml"))
    return codes


def test_data_that_differ_between_ranks_are_one_line(tmp_path: Path) -> None:
    run_dirs = []
    for how in ("shrinks", "differs"):
        plain = toy_plain("mse")
        plain["data"] |= {"path": "tests.dist.test_same_data:shrinking", "options": {"how": how}}
        run_dirs.append(prepare_run(tmp_path / how, plain))
    assert all(code > 0 for codes in run_distributed(work, 2, run_dirs, groups=2) for code in codes)
    shrunk, differing = (json.loads((run_dir / "STATUS.json").read_text())["message"] for run_dir in run_dirs)
    assert "rank 0 has train=44 validation=44" in shrunk
    assert "rank 1 has train=41 validation=44" in shrunk
    assert "data: rank 0 has train=44" in differing
    assert "use the same files on every host" in differing
    for run_dir, text in zip(run_dirs, (shrunk, differing), strict=True):
        assert "\n" not in text
        assert not list((run_dir / "checkpoints").glob("step*")), "it has trained"
