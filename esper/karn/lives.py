"""The lives of seeds, read from the record: when each was born, what was measured, what was decided, how it ended.

Pure functions of event records, as `esper.nissa.reading.keep_latest` leaves them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from esper.leyline.stages import Stage
from esper.nissa.reading import Record

WAITING = 64  # records of a slot without a seed that are held: the command comes a few ticks before its birth
_OF_A_LIFE = ("stage", "contribution", "continued", "gate", "ramp", "worth", "degraded", "command", "refusal")


@dataclass(slots=True, kw_only=True)
class Life:
    """One seed from its birth to its end.

    Fields:
        slot: slot id.
        generation: births in the slot so far, from 1.
        blueprint: of the seed.
        proposal: id of the command that asked for it; 0 if nobody did.
        events: every record of the slot within this life, in order; the first is its birth. Of its looks some may be
            left out; the newest never is.
        looks: how often it was looked at.
    """

    slot: str
    generation: int
    blueprint: str
    proposal: int
    events: list[Record] = field(default_factory=list)
    looks: int = 0
    _held: int = 0

    def add(self, record: Record, most_looks: int | None) -> None:
        """Takes its next record.

        Args:
            record: the next one.
            most_looks: where more than twice as many looks would be held, every second one is let go; None: all stay.
        """
        self.events.append(record)
        if record["kind"] != "contribution":
            return
        self.looks, self._held = self.looks + 1, self._held + 1
        if most_looks is not None and self._held > 2 * most_looks:
            let_go = {id(look) for look in self.of("contribution")[-2::-2]}
            self.events = [event for event in self.events if id(event) not in let_go]
            self._held -= len(let_go)

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

    def lasts(self, tick: int) -> bool:
        """Whether its seed was in the slot at a tick; at that of its birth and of its end, too."""
        gone = self.reached(Stage.PRUNED)
        return self.birth["tick"] <= tick and (gone is None or tick <= gone["tick"])

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


class LivesReader:
    """Follows the lives of seeds, record by record.

    Args:
        end: called with each life when its seed is gone from the slot; it is not held any longer.
        most_looks: about how many looks of a life are held; None: all.

    Attributes:
        present: the lives that go on, by slot; fossils too.
    """

    def __init__(self, end: Callable[[Life], object], most_looks: int | None = None) -> None:
        self._end, self._most_looks = end, most_looks
        self.present: dict[str, Life] = {}
        self._waiting: dict[str, deque[Record]] = {}

    def take(self, record: Record) -> bool:
        """Takes the next record of a run, of those without replaced ones; returns whether it belongs to a life."""
        slot = slot_of(record)
        if slot is None or record["kind"] not in _OF_A_LIFE:
            return False
        payload = record["payload"]
        if record["kind"] == "stage" and payload["target"] == Stage.GERMINATED.name:
            life = Life(
                slot=slot,
                generation=payload["generation"],
                blueprint=str(payload["blueprint"]),
                proposal=payload["proposal"],
            )
            asked = [r for r in self._waiting.pop(slot, []) if _proposal(r) == life.proposal and life.proposal]
            life.events = [record, *asked]
            if slot in self.present:
                self._end(self.present[slot])
            self.present[slot] = life
        elif slot in self.present:
            life = self.present[slot]
            life.add(record, self._most_looks)
            if record["kind"] == "stage" and not Stage[payload["target"]].has_seed:
                self._end(self.present.pop(slot))
        else:
            self._waiting.setdefault(slot, deque(maxlen=WAITING)).append(record)
            return False
        return True


def by_place(record: Record) -> tuple[int, int]:
    """A key that sorts the records of rank 0 as they were told: attempt, number."""
    return record["attempt"], record["seq"]


def by_birth(life: Life) -> tuple[int, int]:
    """A key that sorts lives by the time of birth."""
    return by_place(life.birth)


def lives(records: Iterable[Record]) -> list[Life]:
    """The lives in a run's records, by the time of birth.

    Args:
        records: of the run, those without replaced ones, in order.
    """
    found: list[Life] = []
    reader = LivesReader(found.append)
    for record in records:
        reader.take(record)
    return sorted([*found, *reader.present.values()], key=by_birth)


def _proposal(record: Record) -> Any:
    return record["payload"].get("proposal") or (record["payload"].get("command") or {}).get("proposal")


def last_look(life: Life) -> dict[str, Any] | None:
    """The payload of the last measurement of a life; None if it was never looked at."""
    looks = life.of("contribution")
    return looks[-1]["payload"] if looks else None


def of_slot(found: Sequence[Life], slot: str) -> list[Life]:
    """The lives in one slot."""
    return [life for life in found if life.slot == slot]
