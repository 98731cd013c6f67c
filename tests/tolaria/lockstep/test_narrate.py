"""What a tick tells of its decisions: each thing once."""

from typing import Any

from esper.leyline.commands import Command
from esper.leyline.events import CommandJudged, CommandRefused, Event, GateJudged
from esper.leyline.evidence import Check, GateResult
from esper.leyline.protocols import NullSink
from esper.leyline.stages import Gate, Op
from esper.tolaria.lockstep.narrate import Narrator

AXES = {"step": 10, "tick": 1, "epoch": 0}


class Kept(NullSink):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def told(events: list[Event], commands: dict[str, Command]) -> list[Any]:
    sink, terms, grown = Kept(), None, None
    Narrator(sink, grown).report_decisions(events, commands, terms)  # type: ignore[arg-type]
    return sink.events


def test_the_controllers_reason_is_told_once() -> None:
    asked = Command(slot="r0c0", op=Op.ADVANCE, reason="it helps", proposal=7)
    bare = Command(slot="r0c0", op=Op.ADVANCE, proposal=7)
    done, refused = told(
        [
            CommandJudged(**AXES, command=bare, applied=True, reason=""),
            CommandRefused(**AXES, command=bare, applied=False, reason="dwell is 0 of 1 ticks"),
        ],
        {"r0c0": asked},
    )
    assert (done.reason, done.command.reason) == ("it helps", "")
    assert (refused.reason, refused.command.reason) == ("dwell is 0 of 1 ticks", "it helps")


def test_a_passed_check_of_integrity_is_not_told() -> None:
    checks = tuple(
        Check(name=name, passed=passed, detail=name, integrity=integrity)
        for name, passed, integrity in (("stage", True, True), ("finite", False, True), ("newest look", True, False))
    )
    result = GateResult(gate=Gate.G3, passed=False, score=2 / 3, checks=checks)
    (judged,) = told([GateJudged(**AXES, slot="r0c0", enforced=True, result=result)], {})
    assert [check.name for check in judged.result.checks] == ["finite", "newest look"]
    assert (judged.result.score, judged.result.passed) == (2 / 3, False)
