"""The lives of seeds, read from the record: when each was born, what was measured, what was decided, how it ended.

Pure functions of event records, as `esper.nissa.reading.keep_latest` leaves them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from esper.leyline.stages import Stage
from esper.nissa.reading import Record

_OF_A_LIFE = ("stage", "contribution", "continued", "gate", "ramp", "worth", "degraded", "command", "refusal")


@dataclass(slots=True, kw_only=True)
class Life:
    """One seed from its birth to its end.

    Fields:
        slot: slot id.
        generation: births in the slot so far, from 1.
        blueprint: of the seed.
        proposal: id of the command that asked for it; 0 if nobody did.
        events: every record of the slot within this life, in order; the first is its birth.
    """

    slot: str
    generation: int
    blueprint: str
    proposal: int
    events: list[Record] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Record]:
        """The records of these kinds."""
        return [record for record in self.events if record["kind"] in kinds]

    @property
    def birth(self) -> Record:
        """The record of its germination."""
        return self.events[0]

    @property
    def stage(self) -> Stage:
        """The last stage that it reached."""
        return Stage[self.of("stage")[-1]["payload"]["target"]]

    def reached(self, stage: Stage) -> Record | None:
        """The record of its first move into a stage; None if it never was there."""
        return next((r for r in self.of("stage") if r["payload"]["target"] == stage.name), None)

    @property
    def end(self) -> Record | None:
        """The record of its fossilising or pruning; None while it lives."""
        return self.reached(Stage.FOSSILIZED) or self.reached(Stage.PRUNED)

    @property
    def fate(self) -> str:
        """``fossilised``, ``pruned`` or ``alive``."""
        if self.reached(Stage.FOSSILIZED):
            return "fossilised"
        return "pruned" if self.reached(Stage.PRUNED) else "alive"

    def command_of(self, move: Record) -> Record | None:
        """The command behind a move, by its proposal's id; None if nobody commanded it."""
        proposal = move["payload"]["proposal"]
        found = (r for r in self.of("command") if proposal and r["payload"]["command"]["proposal"] == proposal)
        return next(found, None)


def slot_of(record: Record) -> str | None:
    """The slot that a record is about, if it is about one."""
    payload = record["payload"]
    slot = payload.get("slot") or (payload.get("command") or {}).get("slot")
    return str(slot) if slot else None


def lives(records: Iterable[Record]) -> list[Life]:
    """The lives in a run's records, by the time of birth.

    Args:
        records: of the run, those without replaced ones, in order.
    """
    found: list[Life] = []
    present: dict[str, Life] = {}
    waiting: dict[str, list[Record]] = {}  # what was told of a slot without a seed: the proposal comes before the birth
    for record in records:
        slot = slot_of(record)
        if slot is None or record["kind"] not in _OF_A_LIFE:
            continue
        payload = record["payload"]
        if record["kind"] == "stage" and payload["target"] == Stage.GERMINATED.name:
            life = Life(
                slot=slot,
                generation=payload["generation"],
                blueprint=str(payload["blueprint"]),
                proposal=payload["proposal"],
            )
            asked = [r for r in waiting.pop(slot, []) if _proposal(r) == life.proposal and life.proposal]
            life.events = [record, *asked]
            present[slot] = life
            found.append(life)
        elif slot in present:
            life = present[slot]
            life.events.append(record)
            if record["kind"] == "stage" and not Stage[payload["target"]].has_seed:
                del present[slot]
        else:
            waiting.setdefault(slot, []).append(record)
    return found


def _proposal(record: Record) -> Any:
    return record["payload"].get("proposal") or (record["payload"].get("command") or {}).get("proposal")


def last_look(life: Life) -> dict[str, Any] | None:
    """The payload of the last measurement of a life; None if it was never looked at."""
    looks = life.of("contribution")
    return looks[-1]["payload"] if looks else None


def of_slot(found: Sequence[Life], slot: str) -> list[Life]:
    """The lives in one slot."""
    return [life for life in found if life.slot == slot]
