"""What runs of a comparison share: one process, so one derivation of an arm at a time."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest

import esper.compare.runner
from esper.compare.arms import derive, load_compare
from esper.compare.devices import Devices
from esper.compare.report import collect_finished, make_notes, run_compare
from esper.compare.runner import ArmJob, Comparer, jobs_of, run_folder
from esper.leyline.errors import DataError, EsperError, RunDirError


def test_arms_are_derived_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, other = threading.Semaphore(1), threading.Event()
    overlaps = []

    def derive(*_: object) -> None:
        if not inside.acquire(blocking=False):
            overlaps.append(True)
            other.set()
            raise EsperError("two at once")
        other.wait(0.5)
        inside.release()
        raise EsperError("far enough")

    monkeypatch.setattr(esper.compare.runner, "derive", derive)
    comparer = Comparer(load_compare("digits_cpu", []), tmp_path, lambda text: None)
    comparer.run_all([ArmJob("none", 0), ArmJob("heuristic", 0)], 2)
    assert not overlaps
    assert list(comparer.failures.values()) == ["far enough"] * 2


ALONE = """
base: [host=gpt, trainer=language, data=text, data.root={root}, data.validation=8, data.probe=400]
seeds: [1, 2]
metric: loss
subject: a
flops_share: 1
margin: 0.01
arms:
  a: {{overrides: [controller=none]}}
  b: {{overrides: [controller=none]}}
"""


def letters(folder: Path, text: str) -> Path:
    """A folder for data=text."""
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        (folder / f"{part}.txt").write_text(text * 20_000)
    return folder


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A comparison of two arms that come to the same config."""
    path = tmp_path / "alone.yaml"
    path.write_text(ALONE.format(root=letters(tmp_path / "letters", "abcd ")))
    return path


def pretend(comparer: Comparer, job: ArmJob, **result: object) -> Path:
    """A folder that says that the run of a job has finished on the data at hand."""
    config, plain = derive(comparer.config, job.arm, job.seed, {}, comparer.data)
    folder = run_folder(comparer.out, plain)
    folder.mkdir(parents=True)
    said = {"data": {"digest": comparer.data(config.data).digest}, "flops": 1, "topology": {}, **result}
    (folder / "result.json").write_text(json.dumps(said))
    (folder / "STATUS.json").write_text(json.dumps({"status": "done"}))
    return folder


def test_a_run_on_other_data_is_not_taken_for_this_one(alone: Path, tmp_path: Path) -> None:
    comparer = Comparer(load_compare(str(alone), []), tmp_path / "out", lambda text: None)
    folder = pretend(comparer, ArmJob("a", 1))
    assert comparer.run(ArmJob("a", 1)) == folder
    letters(tmp_path / "letters", "dcba ")
    later = Comparer(comparer.config, comparer.out, lambda text: None)
    with pytest.raises(RunDirError, match="finished on other data"):
        later.run(ArmJob("a", 1))


def test_a_folder_below_the_current_one_is_told_whole(
    alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    comparer = Comparer(load_compare(str(alone), []), Path("out"), lambda text: None)
    pretend(comparer, ArmJob("a", 1))
    folder = comparer.run(ArmJob("a", 1))
    assert folder.parent == tmp_path / "out" / "runs", "a rank knows by its whole path that RUN is locked for it"


def test_without_data_nothing_is_begun(alone: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "letters")
    with pytest.raises(DataError, match="letters"):
        run_compare("x", load_compare(str(alone), []), tmp_path / "out", parallel=1, report_only=False, say=print)
    assert not (tmp_path / "out").exists()


def test_two_arms_of_one_config_are_one_run(alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparer = Comparer(load_compare(str(alone), []), tmp_path / "out", lambda text: None)
    began = []

    def execute(self: Comparer, job: ArmJob, config: object, plain: dict[str, object], folder: Path) -> None:
        began.append(job)
        time.sleep(0.3)
        pretend(comparer, job)

    monkeypatch.setattr(Comparer, "_execute", execute)
    comparer.run_all([ArmJob("a", 1), ArmJob("b", 1)], 2)
    assert not comparer.failures
    assert len(began) == 1
    assert comparer.folders["a", 1] == comparer.folders["b", 1]


def test_what_a_report_lacks_is_said(alone: Path, tmp_path: Path) -> None:
    comparer = Comparer(load_compare(str(alone), []), tmp_path / "out", lambda text: None)
    folder = pretend(comparer, ArmJob("a", 1))
    (folder / "STATUS.json").write_text(json.dumps({"status": "diverged", "message": "no finite loss"}))
    collect_finished(comparer, jobs_of(comparer.config))
    assert comparer.failures["a", 1].startswith("diverged: no finite loss")
    (folder / "STATUS.json").write_text("")
    collect_finished(comparer, jobs_of(comparer.config))
    assert "not readable" in comparer.failures["a", 1]
    first, *others = make_notes(comparer, {"a": {}, "b": {}})
    assert first == "4 of 4 runs are missing, rows stand on the others: a 1, b 1, a 2, b 2"
    assert any(note.startswith("a/1 failed: ") for note in others)


def test_each_job_gets_gpus_of_its_own() -> None:
    devices = Devices(["4", "5", "6", "7"])
    with devices.take(2) as first, devices.take(1) as second:
        assert first == {"CUDA_VISIBLE_DEVICES": "4,5"}
        assert second == {"CUDA_VISIBLE_DEVICES": "6"}
        with devices.take(1) as third:
            assert third == {"CUDA_VISIBLE_DEVICES": "7"}
        with devices.take(2) as more:  # more jobs than fit share the least used
            assert more["CUDA_VISIBLE_DEVICES"].split(",")[0] == "7"
    with devices.take(1) as again:
        assert again == {"CUDA_VISIBLE_DEVICES": "4"}
    with Devices([]).take(1) as none, devices.take(0) as cpu:
        assert none == cpu == {}
