"""Parts that do not fit each other are refused before a rank starts and before there is a run directory."""

from pathlib import Path
from typing import Any

import pytest

from esper.config.tree import build_config
from esper.launcher import compose
from esper.leyline.errors import ConfigError
from esper.run.fitting.asking import ask_whether_parts_fit
from tests.support.dist import ROOT
from tests.support.tiny import tiny_plain
from tests.support.toy_tasks import TOYS, toy_plain

MISFITS = [
    ({"task": TOYS["segmentation"].task}, "learns a class of each pixel, and data=digits gives a class of each sample"),
    ({"task": TOYS["mse"].task}, "learns numbers of each sample, and data=digits gives a class of each sample"),
    ({"task": TOYS["contrastive"].task}, "learns two views, and host=cnn gives one; set host=custom"),
    ({"task": {"kind": "language", "label_smoothing": 0.0}}, "learns tokens in a row, and data=digits"),
]


@pytest.mark.parametrize(("settings", "text"), MISFITS, ids=[row[0]["task"]["kind"] for row in MISFITS])
def test_settings_say_that_shipped_parts_do_not_fit(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_config(tiny_plain("cnn", **settings))
    assert [text in line for line in caught.value.problems] == [True]


def test_text_is_no_class_of_a_sample() -> None:
    with pytest.raises(ConfigError, match="data=pysource gives tokens in a row; set task=language"):
        build_config(tiny_plain("gpt", task=TOYS["classification"].task))


def test_a_misfit_of_shipped_parts_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose.main(["task=segmentation", "run.dir=run"]) == 78
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_misfit_of_ones_own_parts_is_found_on_a_few_samples(tmp_path: Path) -> None:
    plain = toy_plain("segmentation")
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    wrong = {**plain, "task": toy_plain("multilabel")["task"]}
    with pytest.raises(ConfigError, match=r"task multilabel: .*expected both \[B, 3\]; do host and data fit it"):
        ask_whether_parts_fit(wrong, threads, tmp_path / "wrong")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "config.yaml").touch()
    ask_whether_parts_fit(wrong, threads, tmp_path)  # a run that goes on has been tried
