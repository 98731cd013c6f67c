"""What reading a run's event files leaves: sums, the newest record of each kind, and what the caller takes.

The records are read one by one: what is held in memory grows with slots, attempts and what is taken, not with the
length of the record.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from esper.karn.lives import by_place
from esper.karn.store.finding import FoundRun
from esper.leyline.stages import Stage
from esper.nissa.reading import EventFile, LatestRecords, Record

Taker = Callable[[Record], object]
READINGS = ("tick", "snapshot", "library")  # told for machines and curves; of ticks only the newest is held
TROUBLES = ("fault", "panic", "rollback")


@dataclass(slots=True, kw_only=True)
class Digest:
    """What one reading of the event files of a run leaves.

    Fields:
        newest: the newest record of each kind but `READINGS`, of rank 0 and without replaced ones, in order.
        last_of: the newest of these of each attempt.
        stages: the stage that each slot went to last.
        births: seeds that were born.
        faults: faults, panics and rollbacks, of all ranks.
        last_step: the highest optimizer step that any record but `READINGS` is of.
        last_tick_told: the highest tick that any record is of.
        others: records of the other ranks, but `READINGS`.
        ends: how each attempt ended, where rank 0 could say so; replaced ones too.
        last_tick: the newest record of a tick.
        spans: first and last time of each attempt, seconds since 1970.
        torn: lines that a kill tore.
        latest: the records of rank 0 that were not replaced, to be read again; None without an event file.
    """

    newest: dict[str, Record] = field(default_factory=dict)
    last_of: dict[int, Record] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    births: int = 0
    faults: int = 0
    last_step: int = 0
    last_tick_told: int = 0
    others: list[Record] = field(default_factory=list)
    ends: list[Record] = field(default_factory=list)
    last_tick: Record | None = None
    spans: dict[int, tuple[float, float]] = field(default_factory=dict)
    torn: int = 0
    latest: LatestRecords | None = None

    @property
    def newest_record(self) -> Record | None:
        """The newest record of rank 0 but `READINGS`; None without any."""
        return max(self.newest.values(), key=by_place, default=None)

    def note(self, record: Record) -> None:
        """Takes any record, of any rank."""
        first, _ = self.spans.get(record["attempt"], (record["time"], 0.0))
        self.spans[record["attempt"]] = (first, record["time"])
        self.last_tick_told = max(self.last_tick_told, record["tick"])
        if record["kind"] == "tick":
            self.last_tick = record

    def count(self, record: Record) -> None:
        """Takes a record of rank 0 that is no reading and was not replaced."""
        kind = record["kind"]
        self.newest.pop(kind, None)  # the order is that of the newest records
        self.newest[kind] = self.last_of[record["attempt"]] = record
        self.last_step = max(self.last_step, record["step"])
        self.faults += kind in TROUBLES
        if kind == "stage":
            self.stages[record["payload"]["slot"]] = target = Stage[record["payload"]["target"]]
            self.births += target is Stage.GERMINATED


def read_digest(run: FoundRun, *takers: Taker) -> Digest:
    """Reads the event files of a run, record by record; that of rank 0 twice.

    Args:
        run: where it is.
        takers: each is called with every record of rank 0 but `READINGS` that was not replaced, in order.

    Raises:
        RunDirError: one of them was damaged.
    """
    digest = Digest()
    for path in run.event_files():
        if path == run.directory.events:
            digest.latest = latest = LatestRecords(path)
            for record, current in latest.judged():
                digest.note(record)
                if record["kind"] == "run_ended":
                    digest.ends.append(record)
                if current and record["kind"] not in READINGS:
                    digest.count(record)
                    for take in takers:
                        take(record)
            digest.torn += latest.torn
            continue
        file = EventFile(path)
        for record in file:
            digest.note(record)
            if record["kind"] not in READINGS:
                digest.others.append(record)
                digest.faults += record["kind"] in TROUBLES
        digest.torn += file.torn
    return digest


class Kept:
    """A taker that holds the newest records of each kind.

    Args:
        kinds: the kinds that are held; none: all.
        most: the most that are held of a kind; None: all.

    Attributes:
        told: how many there were of each kind that is held.
    """

    def __init__(self, *kinds: str, most: int | None = None) -> None:
        self.kinds, self.most, self.told = kinds, most, Counter[str]()
        self._held: dict[str, deque[Record]] = {}

    def __call__(self, record: Record) -> None:
        """Takes the next record."""
        kind = record["kind"]
        if not self.kinds or kind in self.kinds:
            self.told[kind] += 1
            self._held.setdefault(kind, deque(maxlen=self.most)).append(record)

    def of(self, *kinds: str) -> list[Record]:
        """Those of these kinds, in order."""
        return sorted(chain.from_iterable(self._held.get(kind, ()) for kind in kinds), key=by_place)

    def __iter__(self) -> Iterator[Record]:
        """Yields all that are held, in order."""
        return iter(self.of(*self._held))

    def left_out(self, *kinds: str) -> int:
        """How many of these kinds are not held any more."""
        return sum(self.told[kind] - len(self._held.get(kind, ())) for kind in kinds)
