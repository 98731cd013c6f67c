"""wandb offline, read back from its own files; and the run goes on whatever becomes of wandb."""

import json
import os
import sys

import pytest

from esper.leyline.stages import Stage
from esper.nissa.config import WandbConfig, WandbMode
from esper.nissa.wandb_sink import GROWTH_COLUMNS, WandbSink, tick_row
from tests.nissa.samples import tick_done
from tests.support.dist import ROOT
from tests.support.patience import load, run_patiently
from tests.support.wandb_file import offline_files, read_wandb_file


def child(run_dir, scene="plain", first=1, last=30, **more):
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for name in ("CACHE", "CONFIG", "DATA"):
        env[f"WANDB_{name}_DIR"] = str(run_dir / "home")
    command = [sys.executable, "-m", "tests.nissa.wandb_child", str(run_dir), scene, str(first), str(last)]
    return run_patiently(command, cwd=ROOT, env={**env, **more})


@pytest.fixture(scope="module")
def two_attempts(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    first = child(run_dir, "preempted", 1, 30)
    second = child(run_dir, "plain", 26, 40)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    return run_dir, first, second


def rows_of(file):
    return [row for row in file.history if "lr" in row]


def expected(tick):
    return tick_row(tick_done(tick, Stage.TRAINING if tick < 20 else Stage.FOSSILIZED))


def own(row):
    return {name: value for name, value in row.items() if not name.startswith("_")}


def test_every_metric_at_its_step_and_none_dropped(two_attempts):
    file = read_wandb_file(offline_files(two_attempts[0])[0])
    rows = rows_of(file)
    assert [row["train/step"] for row in rows] == [tick * 10 for tick in range(1, 31)]
    assert [own(row) for row in rows] == [expected(tick) for tick in range(1, 31)]


def test_absent_and_stale_readings_are_left_out(two_attempts):
    rows = rows_of(read_wandb_file(offline_files(two_attempts[0])[0]))
    odd, even = rows[2], rows[3]
    assert "slots/r0c0/contribution" not in odd
    assert (even["slots/r0c0/contribution"], even["slots/r0c0/contribution_se"]) == (0.04, 0.004)
    assert not any("validation/accuracy" in row for row in rows)  # stale throughout
    assert (odd["slots/r0c1/stage"], odd["slots/r0c1/alpha"]) == (Stage.EMPTY.code, 0.0)
    assert "slots/r0c1/gradient_norm" not in odd
    assert "slots/r0c1/gradient_nans" not in odd  # no seed, no gradient
    assert (odd["slots/r0c0/gradient_vanishing"], odd["slots/r0c0/gradient_exploding"]) == (0.5 / 3, 0.125)
    assert (odd["slots/r0c0/gradient_nans"], odd["slots/r0c0/gradient_infs"]) == (3, 0)
    assert (odd["host_gradient_vanishing"], odd["host_gradient_infs"]) == (0.5 / 3, 2)
    assert odd["slots/r0c0/gradient_ratio"] == 0.25
    assert [row["slots/r0c0/stage"] for row in rows] == [Stage.TRAINING.code] * 19 + [Stage.FOSSILIZED.code] * 11


def test_axes_config_names_and_end(two_attempts):
    file = read_wandb_file(offline_files(two_attempts[0])[0])
    assert file.metrics == {"train/step": "", "tick": "", "*": "train/step"}
    assert {name: file.config[name] for name in ("optim", "seed")} == {"optim": {"lr": 0.001}, "seed": 3}
    assert file.run == {
        "id": "run-1",
        "entity": "",
        "project": "growth",
        "group": "sweep-7",
        "job_type": "train",
        "name": "run-1",
        "tags": ["test"],
    }
    assert (file.ended, file.exit_code) == (True, 0)
    assert (file.summary["status"], file.summary["accuracy"]) == ("preempted", 0.9)


def test_growth_is_a_table(two_attempts):
    path = offline_files(two_attempts[0])[0]
    (row,) = [row for row in read_wandb_file(path).history if "growth/path" in row]
    table = json.loads((path.parent / "files" / row["growth/path"]).read_text())
    assert table["columns"] == list(GROWTH_COLUMNS)
    assert table["data"] == [[200, 20, "r0c0", "TRAINING", "BLENDING", "ADVANCE", "conv_light"]]
    assert (row["train/step"], row["tick"]) == (300, 30)


def test_a_second_attempt_continues_the_run(two_attempts):
    first, second = (read_wandb_file(path) for path in offline_files(two_attempts[0]))
    assert first.run["id"] == second.run["id"] == "run-1"
    assert [row["tick"] for row in rows_of(second)] == list(range(26, 41))
    assert second.summary["status"] == "done"


def test_silent_and_without_a_hand_on_signals_or_hooks(two_attempts):
    for done in two_attempts[1:]:
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1
        report = json.loads(done.stdout)
        assert report["hooks_kept"]
        assert (report["faults"], report["dropped"]) == ([], 0)


def test_a_kill_takes_no_more_than_the_flush_interval(tmp_path):
    done = child(tmp_path, "kill", 1, 20)
    assert done.returncode == -9, done.stderr
    (path,) = offline_files(tmp_path)
    file = read_wandb_file(path)
    assert [row["tick"] for row in rows_of(file)] == list(range(1, 21))
    assert not file.ended


@pytest.mark.parametrize("tail", [3, 7, 30, 200])
def test_a_torn_tail_ends_the_file(two_attempts, tmp_path, tail):
    whole = offline_files(two_attempts[0])[0]
    torn = tmp_path / "run-1.wandb"
    torn.write_bytes(whole.read_bytes()[:-tail])
    rows, all_rows = rows_of(read_wandb_file(torn)), rows_of(read_wandb_file(whole))
    assert rows == all_rows[: len(rows)]
    torn.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert 0 < len(rows_of(read_wandb_file(torn))) < 30


def test_damage_before_the_tail_is_no_silent_end(two_attempts, tmp_path):
    data = bytearray(offline_files(two_attempts[0])[0].read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "bad.wandb").write_bytes(data)
    with pytest.raises(ValueError, match="fails its CRC"):
        read_wandb_file(tmp_path / "bad.wandb")


@pytest.mark.parametrize(
    ("scene", "text"),
    [
        ("service-killed", "wandb: "),
        ("hang", "did not finish in 0.5 s"),
        ("hang in a save", "took nothing"),
        ("unreachable", "wandb: "),
    ],
)
def test_an_outage_is_one_fault_and_one_line(tmp_path, scene, text):
    more = {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"} if scene == "unreachable" else {}
    done = child(tmp_path, scene, last=4000 if scene == "hang in a save" else 30, **more)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["faults"]) == 1
    assert text in report["faults"][0]
    assert report["emit_s"] < 2.0 * load(), "half a second for each save, had the first not ended it"
    assert report["hooks_kept"]
    assert done.stderr.count("\n") == 1
    assert "wandb is off for the rest of this run" in done.stderr


def test_disabled_does_nothing(tmp_path):
    faults = []
    sink = WandbSink(
        WandbConfig(mode=WandbMode.DISABLED),
        run_dir=tmp_path,
        run_id="run-1",
        group=None,
        config_dict={},
        on_fault=faults.append,
    )
    sink.emit(tick_done(1))
    sink.flush()
    sink.close()
    assert (list(tmp_path.iterdir()), faults) == ([], [])
