"""Guards of many rooms that no other test makes fire: each refuses, with a word on what was given and what to do.

The rooms with more of them have a file of this name of their own.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import cli
from esper.compare.arms import read_result
from esper.config.tree import RunConfig, build_config
from esper.kasmina.blueprints import blueprint
from esper.kasmina.blueprints.registry import index_of, name_at
from esper.kasmina.export.exporter import export
from esper.kasmina.export.writing import save_exported
from esper.kasmina.hosts import GPTConfig, build_host
from esper.kasmina.hosts.start import freeze
from esper.leyline.channels import parse_channels
from esper.leyline.errors import CheckpointError, ConfigError, DataError, LoopError, RunDirError
from esper.leyline.evidence import Reading, Status
from esper.leyline.imports import export_later, import_object
from esper.leyline.orders.order import Order, command_of
from esper.leyline.orders.verbs import RunOrder, RunVerb
from esper.leyline.plain import from_plain
from esper.leyline.stages import IllegalTransition, Op, Stage, find_edge
from esper.leyline.topology import Topology
from esper.nissa.envelope import from_record
from esper.run.directory import check_run
from esper.run.using.evaluation import _with_settings, evaluate_run
from esper.run.using.prediction import _read_inputs, predict_run
from esper.tamiyo.common import Stateless
from esper.tolaria.data import DATASETS, DigitsConfig, TextConfig, load_data
from esper.tolaria.data.image_clusters import from_column, from_csv
from esper.tolaria.data.own.table import read_table
from esper.tolaria.data.registry import register as register_data
from esper.tolaria.data.sampler import bounds
from esper.tolaria.tasks import TASKS, Task
from esper.tolaria.tasks.registry import register as register_task
from tests.support.refusals import fails
from tests.support.sessions import A, adamw, batch, host, loss, make, probe, train

X = batch(0, 2)[0]


# sessions ------------------------------------------------------------------------------------------------------------


def test_calls_of_a_loop_that_miss_another() -> None:
    session = make(actions=())
    fails(session.step, LoopError, r"^session\.step\(\) without session\.loss\(batch\) before it$")
    model = host()
    grown = esper.attach(model, {A: "0"}, X)
    shadow: dict[str, Any] = {"slots": {"incubation": "shadow"}, "controller": "none"}
    fails(
        lambda: esper.Session(grown, adamw(model), **shadow), ConfigError, r"^slots\.incubation = shadow: needs loss="
    )
    grown.slots[A].plant(nn.Identity())
    fails(
        lambda: esper.Session(grown, adamw(model), loss=loss, probe=probe(), controller="none"),
        ConfigError,
        rf"^grown: {A} already hold seeds; use Session\.restore, or load_state_dict$",
    )
    fails(lambda: grown.slots[A].plant(nn.Identity()), ValueError, "already holds a seed")


def test_states_of_another_session() -> None:
    session = make(actions=())
    train(session, range(2))
    state = session.state_dict()

    def load(change: Callable[[dict[str, Any]], Any], **more: Any) -> Callable[[], None]:
        changed = dict(state)
        change(changed)
        other = make(**{"actions": (), **more})
        return lambda: other.load_state_dict(changed)

    def renamed(payload: dict[str, Any]) -> None:
        payload["model"] = {("9.weight" if name == "0.weight" else name): t for name, t in payload["model"].items()}

    fails(load(lambda s: s.pop("rng", s.pop("model"))), CheckpointError, r"state: missing \['model'\]")
    fails(load(renamed), CheckpointError, r"host weights: missing \['0\.weight'\], unknown \['9\.weight'\]$")
    fails(load(lambda s: None, actions=[{"tick": 1, "slot": A, "op": "PRUNE"}]), CheckpointError, "another controller")
    fails(load(lambda s: s.update(scheduler={})), CheckpointError, "has a scheduler and the session has none; pass")


# models --------------------------------------------------------------------------------------------------------------


class Nameless(nn.Module):
    """A blueprint whose name is none."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass
class Rows:
    """A site that gives something that export cannot put a feature back into."""

    feature: Tensor


def misnamed() -> Any:
    return blueprint("Not A Name", topology=Topology.VECTOR, parameters=lambda d: 0, flops=lambda d, p: 0)(Nameless)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (misnamed, ConfigError, r"a name is lower-case letters, digits and underscores, at most 32"),
        (lambda: index_of("nothing"), ConfigError, r"blueprint 'nothing': not registered; registered are .*conv"),
        (lambda: name_at(10_000), ConfigError, r"blueprint index 10000: the catalogue has 0 to \d+"),
        (lambda: export(host()), ConfigError, r"^export: got Sequential, expected what esper\.attach returned"),
        (lambda: save_exported(host(), "x"), ConfigError, r"^save_exported: got Sequential, expected what esper\.kas"),
        (lambda: freeze(host(), "body.*"), ConfigError, r"^host\.freeze = 'body\.\*': matches no parameter, such as 0"),
        (
            lambda: build_host(GPTConfig(block=4), (4,), 7)(torch.zeros(1, 5, dtype=torch.long)),
            ValueError,
            r"^a sequence of 5 tokens: this GPT takes at most host\.block = 4$",
        ),
    ],
)
def test_models_and_blueprints(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    fails(call, kind, text)


# data and tasks ------------------------------------------------------------------------------------------------------


class Judge(Task):
    """A task that says neither a score nor positions."""

    name = "judge"


def unnamed(default: Any) -> type:
    return dataclasses.make_dataclass("Odd", [("kind", Any, dataclasses.field(default=default))])


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: load_data(OtherDigits()),
            ConfigError,
            r"^data\.kind = 'digits': needs DigitsConfig, got OtherDigits$",
        ),
        (lambda: register_data(unnamed(3)), ConfigError, r"^Odd\.kind: needs the data set's name as its default$"),
        (lambda: register_data(unnamed("digits")), ConfigError, r"^data set 'digits' is registered already; names tak"),
        (lambda: register_task(unnamed(next(iter(TASKS)))), ConfigError, r"is registered already; names taken: "),
        (lambda: bounds(5, 3, 3), ValueError, r"^piece 3 of 3: must be 0 to 2$"),
        (lambda: from_column(["a", None], "who", Path("x")), DataError, r"row 1 of column 'who' is empty; give each"),
        (lambda: Judge().score(X, X), NotImplementedError, r"^task judge: override Task\.score$"),
        (lambda: Judge().positions(X), NotImplementedError, r"^task judge: override Task\.positions, or set by_pos"),
    ],
)
def test_data_and_tasks(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    before = dict(DATASETS), dict(TASKS)
    fails(call, kind, text)
    assert before == (DATASETS, TASKS)


class OtherDigits(DigitsConfig):
    """Settings of another class."""


def test_files_of_data_that_lack_something(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("path,cluster\na.png,\n")
    fails(lambda: from_csv(["a.png"], tmp_path / "c.csv", Path("x")), DataError, r"c\.csv: line 2 lacks a path or a cl")
    (tmp_path / "t.csv").write_text("a,b\n")
    fails(lambda: read_table(tmp_path / "t.csv"), DataError, r"t\.csv: no rows; bring some$")
    (tmp_path / "train").mkdir()
    fails(
        lambda: load_data(TextConfig(root=str(tmp_path))), DataError, r"train: no \.txt file in it; expected train\.t"
    )


# runs and commands ---------------------------------------------------------------------------------------------------


def test_folders_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    here = r"^run\.dir = '.*': "
    fails(lambda: check_run(RunConfig(dir=str(tmp_path / "file")), {}), RunDirError, here + "is not a folder; set run")
    fails(lambda: check_run(RunConfig(dir=str(tmp_path / "full")), {}), RunDirError, here + r"holds mine\.txt but no c")
    (tmp_path / "result.json").write_text("[]")
    fails(lambda: read_result(tmp_path), RunDirError, r"result\.json: no result of a run, data, flops, topology missin")


def test_words_of_commands_that_use_a_run(tmp_path: Path) -> None:
    fails(lambda: evaluate_run(tmp_path, part="none"), ConfigError, r"^--part none: no such part; there are ")
    fails(lambda: _with_settings({}, ["lr=1"]), ConfigError, r"^--data lr=1: write data\.<setting>=<value>, for exam")
    fails(
        lambda: predict_run(tmp_path, tmp_path / "x", tmp_path / "y.txt"), ConfigError, r"y\.txt: unknown kind; write"
    )
    fails(
        lambda: _read_inputs(tmp_path / "x.txt", {}), DataError, r"x\.txt: unknown kind; write \.npy, \.pt \(a tensor\)"
    )
    torch.save({"a": X}, tmp_path / "x.pt")
    fails(lambda: _read_inputs(tmp_path / "x.pt", {}), DataError, r"x\.pt: holds dict, need one tensor \[N, \.\.\.\]$")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["compare", "digits_cpu", "--share", "3/2"], r"'3/2': expected I/N with 1 <= I <= N, as in 2/4"),
        (["compare", "digits_cpu", "--jobs", "0"], r"'0' is no whole number from 1"),
        (["query", "select 1", "--rows", "0"], r"'0' is no number above 0"),
    ],
)
def test_words_that_are_no_numbers(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    assert re.search(text, capsys.readouterr().err)


# contracts -----------------------------------------------------------------------------------------------------------


def order(**more: Any) -> Order:
    plain: dict[str, Any] = {
        "run_id": "r",
        "attempt": 1,
        "sender": "me",
        "nonce": "0" * 32,
        "time_ms": 1,
        "valid_ms": 1,
    }
    return Order(**{**plain, "command": "prune", "slot": None, "arguments": {}, "dry_run": False, "why": "", **more})


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: order(nonce="x"), ValueError, r"^nonce: expected 32 hexadecimal digits$"),
        (lambda: order(sender="a b"), ValueError, r"^sender: expected 1 to 64 letters, digits and _\.@\+-$"),
        (lambda: order(why="a\nb"), ValueError, r"^why: expected one line of at most \d+ printable characters$"),
        (lambda: order(attempt=-1), ValueError, "^attempt: expected a whole number from 0$"),
        (lambda: prune(ticks="x"), ValueError, "^ticks: expected a whole number from 0$"),
        (lambda: prune(steepness="x"), ValueError, "^steepness: expected a number$"),
        (lambda: prune(curve="x"), ValueError, "^curve: expected one of "),
        (lambda: build_config([]), ConfigError, r"^config = \[\]: expected a mapping of sections$"),
        (
            lambda: command_of(order(arguments={"ticks": 0, "curve": "linear", "steepness": 6.0})),
            ValueError,
            r"^prune: names no slot$",
        ),
        (
            lambda: RunOrder(verb=RunVerb.BREAKER, value=99),
            ValueError,
            r"^BREAKER: value 99, span 0; need 0 to \d, 0 t",
        ),
        (lambda: Reading(status=Status.ABSENT, value=1.0), ValueError, r"^inconsistent reading: absent with value=1"),
        (
            lambda: import_object("json:nothing", "host.path"),
            ConfigError,
            r"^host\.path = 'json:nothing': json has no ",
        ),
        (lambda: export_later("p", {"a": "a"}), ValueError, r"^p: a would be hidden by the submodule of that name$"),
        (
            lambda: find_edge(Stage.EMPTY, Op.FOSSILIZE, Stage.FOSSILIZED),
            IllegalTransition,
            r"^EMPTY -FOSSILIZE-> FOSSILIZED is no edge; from EMPTY: GERMINATE->GERMINATED",
        ),
        (
            lambda: parse_channels(3, "slots.x"),
            ConfigError,
            r"^slots\.x: int is no text; write one value in \[0, 1\] p",
        ),
        (lambda: from_plain(Choice, {"it": 1.5}, "c"), ValueError, r"^c\.it: 1\.5 fits none of "),
        (lambda: from_record({"kind": "tick"}), ValueError, r"^event record: missing \[.*'payload'.*\], unknown \[\]$"),
        (lambda: Stateless().load_state_dict({"x": 1}), ValueError, r"^Stateless: unknown x; it has no state$"),
    ],
)
def test_contracts(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    fails(call, kind, text)


def prune(**more: Any) -> Any:
    given = {"ticks": 0, "curve": "LINEAR", "steepness": 6.0, **more}
    return command_of(order(slot="r0c0", arguments=given))


@dataclass
class Choice:
    it: int | str
