"""wandb offline, read back from its own files; and the run goes on whatever becomes of wandb."""

import json
import os
import sys

import pytest

from esper.leyline.stages import Stage
from esper.nissa.config import WandbConfig, WandbMode
from esper.nissa.wandb_rows import tick_row
from esper.nissa.wandb_sink import WandbSink
from esper.nissa.wandb_tables import COLUMNS, ROWS, Story
from tests.nissa.samples import refused, tick_done
from tests.support.dist import ROOT
from tests.support.patience import load, run_patiently
from tests.support.wandb_file import offline_files, read_wandb_file
from tests.support.wandb_server import wandb_server


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
    return {name: value for name, value in row.items() if not name.startswith(("_", "counts/"))}


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
    assert odd["slots/r0c0/gradient_parity"] == 0.5
    assert "slots/r0c0/update_parity" not in odd, "absent is not zero"
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
        "name": "demo, heuristic, seed 3",
        "tags": ["test"],
    }
    assert (file.ended, file.exit_code) == (True, 0)
    own_keys = {name for name in file.summary if not name.startswith("_")} - {f"tables/{name}" for name in COLUMNS}
    assert own_keys == {
        *("status", "step", "tick", "wall_s", "train_loss", "validation_loss", "validation_accuracy", "parameters"),
        *("parameters_added", "training_flops", "fossils", "live_seeds", "seeds_born", "refusals", "vetoes"),
        *("rollbacks", "faults"),
    }, "a short summary"
    assert (file.summary["status"], file.summary["wall_s"], file.summary["step"]) == ("preempted", 1.5, 300)


def test_growth_is_a_table(two_attempts):
    path = offline_files(two_attempts[0])[0]
    (row,) = [row for row in read_wandb_file(path).history if "tables/growth/path" in row]
    table = json.loads((path.parent / "files" / row["tables/growth/path"]).read_text())
    assert table["columns"] == list(COLUMNS["growth"])
    assert table["data"] == [[200, 20, "r0c0", "TRAINING", "BLENDING", "ADVANCE", "conv_light"]]
    assert (row["train/step"], row["tick"]) == (300, 30)


def tables_of(path):
    """The last state of each table of an offline file, as rows of name to value."""
    found = {}
    for row in read_wandb_file(path).history:
        for name in COLUMNS:
            if f"tables/{name}/path" in row:
                table = json.loads((path.parent / "files" / row[f"tables/{name}/path"]).read_text())
                found[name] = [dict(zip(table["columns"], line, strict=True)) for line in table["data"]]
    return found


@pytest.fixture(scope="module", params=["decisions", "resumed"])
def decided(request, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("decided")
    done = child(run_dir, request.param, 1, 20)
    assert done.returncode == 0, done.stderr
    (path,) = offline_files(run_dir)
    return path, json.loads(done.stdout)


def test_a_decision_is_one_row_with_verdict_reason_and_outcome(decided):
    """Also where its command was given by the attempt before."""
    tables = tables_of(decided[0])
    by_id = {row["proposal"]: row for row in tables["decisions"] if row["verdict"] == "applied"}
    born, vetoed = by_id[7], by_id[9]
    assert [born[name] for name in ("slot", "op", "blueprint")] == ["r0c0", "GERMINATE", "conv_light"]
    assert born["reason"] == "plateau"
    assert (born["step"], born["outcome"], born["outcome_step"]) == (210, "GERMINATED", 220)
    assert (vetoed["outcome"], vetoed["outcome_step"]) == ("vetoed: OUT_OF_MEMORY", 250)
    refusals = [row for row in tables["decisions"] if row["verdict"] == "refused"]
    assert len(refusals) == 41
    assert refusals[0]["gate"] == "G2: contribution: 0.001 ± 0.004"
    (birth,) = tables["births"]
    assert (birth["slot"], birth["parameters"], birth["forward_flops"], birth["proposal"]) == ("r0c0", 160, 20_480, 7)


def test_a_checkpoint_is_an_artifact_that_says_where_it_is(decided):
    (artifact,) = [found for found in read_wandb_file(decided[0]).artifacts if found["type"] == "checkpoint"]
    folder = decided[0].parents[2] / "checkpoints" / "step-250"
    assert (artifact["name"], sorted(artifact["aliases"])) == ("checkpoint-run-1", ["latest", "step-250"])
    about = {name: artifact["metadata"][name] for name in ("run_id", "step", "bytes", "folder")}
    assert about == {"run_id": "run-1", "step": 250, "bytes": 7, "folder": str(folder)}
    assert artifact["entries"] == [("step-250/state.pt", (folder / "state.pt").as_uri())], "by reference, not copied"


def test_an_exported_model_is_an_artifact_made_from_its_checkpoint(tmp_path):
    folder = tmp_path / "export-00000250"
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"plain weights")
    done = child(tmp_path, "export")
    assert done.returncode == 0, done.stderr
    file = read_wandb_file(offline_files(tmp_path)[0])
    (artifact,) = file.artifacts
    assert (artifact["name"], artifact["type"]) == ("model-run-1", "model")
    assert artifact["metadata"]["made_from"] == file.config["made_from"] == "checkpoint-run-1:step-250"
    assert [name for name, _ in artifact["entries"]] == ["model.pt"]
    assert (file.run["id"], file.run["job_type"], file.run["group"]) == ("run-1-export-250", "export", "run-1")


def test_a_stop_asked_in_wandbs_page_is_heard_without_a_signal(tmp_path):
    with wandb_server() as server:
        server.stop.set()
        done = child(tmp_path, "stopped", last=3, **server.variables)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["stopped"], report["hooks_kept"], report["faults"]) == (True, True, [])


def test_incidents_counts_and_alerts(decided):
    path, report = decided
    file, incidents = read_wandb_file(path), tables_of(path)["incidents"]
    assert [row["kind"] for row in incidents] == ["veto", *["fault", "orders_refused"] * 40, "fault"]
    titles = [alert["title"] for alert in file.alerts]
    assert titles == ["birth vetoed", "fault", "orders refused"], "one of a kind in five minutes"
    assert "forged" in file.alerts[-1]["text"]
    assert file.summary["alerts_held_back"] == 40 + 39
    names = ("refusals", "vetoes", "faults", "seeds_born", "rollbacks")
    assert [file.summary[name] for name in names] == [41, 1, 41, 1, 0]
    assert report["sent"] == len(rows_of(file)) == 20, "rows sent are rows kept"


def test_a_table_keeps_its_newest_rows_and_is_sent_when_it_doubled():
    story = Story(lambda event: None)
    sent = 0
    for tick in range(1, ROWS + 500):
        story.take(refused(tick))
        if story.tables["decisions"].doubled:
            sent += 1
            story.tables["decisions"].sent = story.tables["decisions"].taken
    table = story.tables["decisions"]
    assert (len(table.rows), table.taken) == (ROWS, ROWS + 499)
    assert table.rows[-1][2] == ROWS + 499
    assert sent <= 15


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
        name="run-1",
        group=None,
        config_dict={},
        on_fault=faults.append,
    )
    sink.emit(tick_done(1))
    sink.flush()
    sink.close()
    assert (list(tmp_path.iterdir()), faults) == ([], [])
