"""Every fault of the table in every phase where it can strike, in a run that a person started."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.tolaria.data import TextConfig
from tests.faults.launching import Mounted, Place, Told, may_mount, plain_of, strike, text_of
from tests.faults.table import TABLE, After, Fault
from tests.support.killed_runs import assert_same_run, final, live, prepare_run

CELLS = [(name, phase) for name, fault in TABLE.items() if fault.strikes is not None for phase in fault.phases]


@pytest.mark.parametrize("name", TABLE)
def test_every_row_is_shown_by_tests_that_exist(name: str) -> None:
    fault = TABLE[name]
    assert fault.strikes is not None or fault.tests
    for pointer in fault.tests:
        path, function = pointer.split("::")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        assert callable(getattr(module, function))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run comes to that nobody disturbs, by its task."""
    known: dict[str, dict[str, Any]] = {}

    def of(**settings: Any) -> dict[str, Any]:
        key = json.dumps(settings, default=str)
        if key not in known:
            run = tmp_path_factory.mktemp("undisturbed") / "run"
            prepare_run(run, plain_of(run, **settings))
            assert live(run, 2) == [0, 0]
            known[key] = final(run)
        return known[key]

    return of


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    return text_of(tmp_path_factory.mktemp("data") / "text")


def place_for(fault: Fault, folder: Path) -> Place:
    if fault.size and not may_mount():
        pytest.skip("needs the right to mount in a namespace of its own")
    return Mounted(folder, fault.size) if fault.size else Place(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "phase"), CELLS)
def test_cell(
    name: str,
    phase: str,
    undisturbed: Any,
    text: TextConfig,
    tmp_path: Path,
    record_property: Callable[[str, Any], None],
) -> None:
    fault = TABLE[name]
    assert fault.strikes is not None
    settings = {**fault.settings, **({"data": text} if fault.text else {})}
    with place_for(fault, tmp_path) as place:
        place.make(**settings)
        says = fault.says_in.get(phase, fault.says)
        told = strike(place, fault.strikes(phase, place), says, mend=fault.mend, **fault.environment)
        for figure in ("code", "named_s", "again_s", "lost", "attempts", "resumed"):  # launch/matrix.py keeps them
            record_property(figure, getattr(told, figure))
        check(fault, told, says)
        found = final(place.seen)
        if fault.same:
            assert_same(found, undisturbed(**settings), silent=fault.silent)


def check(fault: Fault, told: Told, says: str) -> None:
    """The run got over it in the way the table says, and the user has read the line."""
    assert told.code == fault.code, told
    if says:
        assert told.named_s is not None, f"{says!r} was not said in\n{told.err}"
    assert "Traceback" not in told.err, told.err
    assert told.resumed == (1 if fault.after is After.RESUMED else 0)
    if fault.after is After.GOES_ON:
        assert told.attempts == [None]


def assert_same(found: dict[str, Any], wanted: dict[str, Any], *, silent: bool) -> None:
    """Bit for bit; of events that could not be written nothing is asked."""
    if silent:
        found, wanted = (
            {**o, "plain": {k: v for k, v in o["plain"].items() if k != "events"}} for o in (found, wanted)
        )
    assert_same_run(found, wanted)
