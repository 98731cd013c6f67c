"""Commands that end with their test, and one finished run that several tests look at."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from esper.leyline.events import Event, StageChanged, TickDone
from esper.nissa.envelope import from_record
from esper.nissa.reading import read_events
from tests.support.commands import GROWING, TRAIN, Command


class Start(Protocol):
    """Starts a command line in the test's own folder."""

    def __call__(self, program: list[str], *arguments: str, **more: str) -> Command: ...


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Commands of one test; whatever is left of them is ended."""
    started: list[Command] = []

    def begin(program: list[str], *arguments: str, **more: str) -> Command:
        started.append(Command(program, *arguments, folder=tmp_path, **more))
        return started[-1]

    yield begin
    for command in started:
        command.clear()


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that nobody disturbed: its folder, and what it said."""

    run: Path
    out: str
    err: str
    code: int


@pytest.fixture(scope="session")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two ranks on real digits that grew by the heuristic, on evidence, with wandb offline. Nobody changes it."""
    folder = tmp_path_factory.mktemp("grown")
    command = Command(TRAIN, *GROWING, "run.dir=run", folder=folder)
    try:
        code = command.end()
    finally:
        command.clear()
    return Finished(folder / "run", command.out, command.err, code)


@pytest.fixture(scope="session")
def records(grown: Finished) -> list[dict[str, Any]]:
    return read_events(grown.run / "events.jsonl")


@pytest.fixture(scope="session")
def events(records: list[dict[str, Any]]) -> list[Event]:
    """Read strictly: a missing, unknown or mistyped field is an error."""
    return [from_record(record) for record in records]


@pytest.fixture(scope="session")
def ticks(events: list[Event]) -> list[TickDone]:
    return [event for event in events if isinstance(event, TickDone)]


@pytest.fixture(scope="session")
def stages(events: list[Event]) -> list[StageChanged]:
    return [event for event in events if isinstance(event, StageChanged)]
