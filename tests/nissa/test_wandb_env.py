"""wandb's own variables: obeyed where the config is silent, named where it is not."""

from typing import Any

import pytest

from esper.nissa.config import WandbConfig, WandbMode
from esper.nissa.wandb_env import WandbChoice, choose_wandb
from esper.nissa.wandb_sink import WandbSink
from tests.nissa.test_wandb import child
from tests.support.wandb_file import offline_files, read_wandb_file

ALL = {
    "WANDB_MODE": "online",
    "WANDB_PROJECT": "theirs",
    "WANDB_NAME": "my-run",
    "WANDB_TAGS": "a,b",
    "WANDB_DIR": "/scratch",
    "WANDB_RUN_GROUP": "lab",
    "WANDB_JOB_TYPE": "eval",
}


def choose(variables: dict[str, str], group: str | None = None, **settings: Any) -> WandbChoice:
    names = {"run_id": "r1", "name": "demo, seed 1", "group": group}
    return choose_wandb(WandbConfig(**settings), run_dir="/RUN", environ=variables, **names)


def test_a_silent_config_obeys_every_variable() -> None:
    assert choose(ALL) == WandbChoice(
        WandbMode.ONLINE, "theirs", "my-run", "lab", "eval", ("a", "b"), "/scratch", notes=()
    )
    assert choose({}) == WandbChoice(WandbMode.OFFLINE, "esper", "demo, seed 1", None, "train", (), "/RUN", notes=())


@pytest.mark.parametrize(
    ("word", "mode"), [("dryrun", "offline"), ("run", "online"), ("Disabled", "disabled"), ("offline", "offline")]
)
def test_a_mode_by_any_of_its_names(word: str, mode: str) -> None:
    chosen = choose({"WANDB_MODE": word})
    assert (chosen.mode.value, chosen.notes) == (mode, ())


def test_a_config_that_speaks_comes_first_and_names_what_it_overrules() -> None:
    settings = {"mode": WandbMode.OFFLINE, "project": "ours", "name": "n", "tags": ["c"], "job_type": "train"}
    chosen = choose({**ALL, "WANDB_RUN_ID": "x"}, group="sweep", **settings)
    assert (chosen.mode, chosen.project, chosen.name) == (WandbMode.OFFLINE, "ours", "n")
    assert (chosen.group, chosen.job_type, chosen.tags) == ("sweep", "train", ("c",))
    assert chosen.notes == (
        "WANDB_MODE=online is overruled by telemetry.wandb.mode=offline",
        "WANDB_TAGS=a,b is overruled by telemetry.wandb.tags=c",
        "WANDB_RUN_ID=x is overruled: the attempts of a run share its id, r1",
        "WANDB_PROJECT=theirs is overruled by telemetry.wandb.project=ours",
        "WANDB_NAME=my-run is overruled by telemetry.wandb.name=n",
        "WANDB_RUN_GROUP=lab is overruled by telemetry.wandb.group=sweep",
        "WANDB_JOB_TYPE=eval is overruled by telemetry.wandb.job_type=train",
    )
    same = choose({"WANDB_MODE": "offline", "WANDB_PROJECT": "ours"}, mode=WandbMode.OFFLINE, project="ours")
    assert same.notes == (), "what says the same is not overruled"


def test_a_mode_that_nobody_knows_is_named() -> None:
    chosen = choose({"WANDB_MODE": "shared"})
    assert chosen.mode is WandbMode.OFFLINE
    assert chosen.notes == ("WANDB_MODE=shared: not one of online, run, offline, dryrun, disabled; wandb is offline",)


def test_the_sink_writes_nothing_where_the_variable_says_so(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    faults: list[Any] = []
    for mode in (None, WandbMode.DISABLED):
        config = WandbConfig(mode=mode)
        names = {"run_id": "r", "name": "r", "group": None}
        WandbSink(config, run_dir=tmp_path, config_dict={}, on_fault=faults.append, **names).close()
    assert (faults, list(tmp_path.iterdir()), capsys.readouterr().err) == ([], [], "")


def test_wandb_itself_gets_them(tmp_path: Any) -> None:
    where = tmp_path / "elsewhere"
    where.mkdir()
    own = {"WANDB_MODE": "offline", "WANDB_DIR": str(where), "WANDB_ENTITY": "us"}
    done = child(tmp_path, "silent", 1, 2, **{**ALL, **own})
    assert done.returncode == 0, done.stderr
    assert offline_files(tmp_path) == []
    (file,) = offline_files(where)
    assert read_wandb_file(file).run == {
        "id": "run-1",
        "entity": "us",
        "project": "theirs",
        "group": "sweep-7",
        "job_type": "eval",
        "name": "my-run",
        "tags": ["a", "b"],
    }
    assert "WANDB_RUN_GROUP=lab is overruled by telemetry.wandb.group=sweep-7" in done.stderr
