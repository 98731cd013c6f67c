"""``esper export``: the network of a run's checkpoint, with the numbers that the run reported for it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from esper import cli
from esper.config.tree import write_config
from esper.tolaria.data.parts import Part
from esper.tolaria.training.result import RunResult
from tests.support.bitwise import bits
from tests.support.tiny import act, make_engine, schedule, tiny_config, tiny_plain

# r0c0 is a fossil at step 30; r0c1 is in training at step 30 and on its way at 60; r1c0 has come and gone.
SCHEDULE = schedule(
    act(1, "r0c0", "GERMINATE", blueprint="conv_small", ticks=1),
    act(1, "r1c0", "GERMINATE", blueprint="norm", ticks=1),
    act(3, "r0c0", "ADVANCE"),
    act(4, "r0c0", "ADVANCE"),
    act(6, "r0c0", "ADVANCE"),
    act(7, "r0c0", "FOSSILIZE"),
    act(3, "r1c0", "PRUNE"),
    act(8, "r0c1", "GERMINATE", blueprint="conv_light", ticks=8),
    act(10, "r0c1", "ADVANCE"),
    act(16, "r0c1", "ADVANCE"),
)
SETTINGS = {
    "trainer__steps": 60,
    "control__every": 3,
    "checkpoint__every_ticks": 5,
    "trainer__batch": 64,
    "optim__lr": 0.03,
    "slots__embargo_ticks": 1,
    "controller": SCHEDULE,
}


@dataclass(frozen=True)
class Done:
    """A run that ended: its folder, what it says of itself, its test part."""

    run: Path
    result: RunResult
    test: Part


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    run = tmp_path_factory.mktemp("exporting") / "run"
    run.mkdir()
    write_config(run / "config.yaml", tiny_plain("cnn", **SETTINGS))
    engine = make_engine(tiny_config("cnn", **SETTINGS), run)
    engine.begin(None)
    result = engine.run()
    return Done(run, result, engine.bundle.test)


def test_the_exported_network_has_the_numbers_of_the_result(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    """By default the checkpoint that validation chose. The program is checked, and the weights by the key map."""
    assert cli.main(["export", str(done.run), "--partial"]) == 0  # wherever that checkpoint is in the seed's ramp
    folder = done.run / f"export-{done.result.best_step:08d}"
    told = capsys.readouterr()
    assert told.err == ""
    assert told.out.splitlines()[0] == f"esper: step {done.result.best_step} of {done.run} as a plain model in {folder}"
    assert "  r0c0  conv_small  module in grown.r0c0" in told.out.splitlines()
    program = torch.export.load(folder / "program.pt2").module()
    x, y = done.test.fetch(torch.arange(len(done.test)))
    with torch.no_grad():
        output = program(x)
    correct = float((output.argmax(1) == y).double().mean())
    assert correct == pytest.approx(done.result.test_accuracy.value, abs=1e-12)
    loss = float(F.cross_entropy(output, y).double())
    assert loss == pytest.approx(done.result.test_loss.value, abs=1e-5)
    record = json.loads((folder / "topology.json").read_text())
    assert record["about"]["step"] == done.result.best_step
    assert record["about"]["seeds"]["r0c0"]["blueprint"] == "conv_small"
    assert record["about"]["host"]["kind"] == "cnn"


def test_any_kept_checkpoint_can_be_had_and_unfolded_it_holds_its_very_weights(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(done.run), "--at", "30", "--to", str(tmp_path / "out"), "--no-fold"]) == 0
    told = ["  r0c0  conv_small  module in grown.r0c0", "  r0c1  conv_light  left out"]
    assert capsys.readouterr().out.splitlines()[1:] == told
    record = json.loads((tmp_path / "out" / "topology.json").read_text())
    assert record["exact"]
    program = torch.export.load(tmp_path / "out" / "program.pt2").module().state_dict()
    model = torch.load(done.run / "checkpoints" / "step-00000030" / "state.pt", weights_only=True)["model"]
    assert set(record["keys"]) == set(model)
    gone = {key for key, now in record["keys"].items() if now is None}
    assert gone == {key for key in model if key.startswith("esper_slots.r0c1.")}
    for key in set(model) - gone:
        assert bits(program[record["keys"][key]], model[key]), key


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Exit code and what stands on stderr."""
    code = cli.main(["export", *arguments])
    told = capsys.readouterr()
    assert told.out == ""
    return code, told.err.splitlines()


def test_what_cannot_be_exported_is_one_line_and_an_exit_code(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, at = str(done.run), ("--at", "60", "--to", str(tmp_path / "out"))
    code, (line,) = lines(capsys, run, *at)
    assert code == 78
    assert line.startswith("esper: config: the seed in slot r0c1 is at alpha 0.5")
    assert "esper export --partial" in line
    code, (line,) = lines(capsys, run, "--at", "31")
    assert code == 74
    assert "--at 31: no checkpoint of that step in" in line
    assert line.endswith("there are 30, 45, 60")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, (line,) = lines(capsys, run, "--at", "30", "--to", str(tmp_path / "full"))
    assert (code, line) == (74, f"esper: {tmp_path / 'full'}: exists already; name a new folder")
    code, (line,) = lines(capsys, str(tmp_path))
    assert code == 74
    assert "no config.yaml in it, so it is no run" in line
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_passed_over_with_a_word_and_named_where_it_was_asked_for(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(done.run / "checkpoints", run / "checkpoints")
    shutil.copy(done.run / "config.yaml", run / "config.yaml")
    for folder in (run / "checkpoints").iterdir():
        with (folder / "state.pt").open("r+b") as file:
            file.write(b"damage")
    code, told = lines(capsys, str(run), "--at", "30")
    assert code == 74
    assert "state.pt: SHA-256 differs from the manifest's; the file is damaged" in told[0]
    code, told = lines(capsys, str(run))
    assert code == 74
    assert [line.partition(": ")[2].partition(":")[0] for line in told[:3]] == ["passed over a damaged checkpoint"] * 3
    assert "no valid checkpoint with a validation score (there are 30, 45, 60); name one by --at STEP" in told[3]
