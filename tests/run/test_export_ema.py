"""``esper export --ema``: the average of the weights that lies in a checkpoint, as a plain model."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from esper import cli
from esper.config.tree import write_config
from tests.support.tiny import act, make_engine, schedule, tiny_config, tiny_plain

SETTINGS = {
    "trainer__steps": 60,
    "control__every": 3,
    "checkpoint__every_ticks": 20,
    "trainer__batch": 64,
    "optim__lr": 0.03,
    "trainer__ema": 0.95,
    "trainer__ema_validate": True,
    "controller": schedule(
        act(1, "r0c0", "GERMINATE", blueprint="conv_small", ticks=1),
        act(3, "r0c0", "ADVANCE"),
        act(4, "r0c0", "ADVANCE"),
        act(6, "r0c0", "ADVANCE"),
        act(7, "r0c0", "FOSSILIZE"),
    ),
}


def test_an_export_of_the_average_has_the_numbers_of_the_test_that_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_config(run / "config.yaml", tiny_plain("cnn", **SETTINGS))
    engine = make_engine(tiny_config("cnn", **SETTINGS), run)
    engine.begin(None)
    result = engine.run()
    assert cli.main(["export", str(run), "--ema"]) == 0
    folder = run / "export-00000060-ema"
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"esper: the average of the weights at step 60 of {run} as a plain model in {folder}"
    assert json.loads((folder / "topology.json").read_text())["about"]["ema"] == 0.95
    assert cli.main(["export", str(run)]) == 0
    live = torch.export.load(run / "export-00000060" / "program.pt2").module()
    program = torch.export.load(folder / "program.pt2").module()
    test = engine.bundle.test
    x, y = test.fetch(torch.arange(len(test)))
    with torch.no_grad():
        assert float(F.cross_entropy(program(x), y)) == pytest.approx(result.test_loss.value, abs=1e-5)
        assert float(F.cross_entropy(live(x), y)) != pytest.approx(result.test_loss.value, abs=1e-3)


def test_a_run_without_an_average_has_none_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"trainer__steps": 4, "checkpoint__every_ticks": 1}
    write_config(tmp_path / "config.yaml", tiny_plain("cnn", **settings))
    engine = make_engine(tiny_config("cnn", **settings), tmp_path)
    engine.begin(None)
    engine.run()
    capsys.readouterr()
    assert cli.main(["export", str(tmp_path), "--at", "4", "--ema"]) == 74
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("state.pt: it holds no average of the weights; train with trainer.ema=0.999")
    assert not list(tmp_path.glob("export-*"))
