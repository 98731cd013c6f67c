"""What happened at one tick, and a run as a whole, in plain sentences."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from esper.karn.lives import Life, LivesReader, by_birth, slot_of
from esper.karn.store.digest import Digest, Kept, read_digest
from esper.karn.store.facts import describe
from esper.karn.store.finding import FoundRun
from esper.karn.why.fates import end_with_evidence, explain_life, explain_slot
from esper.karn.why.sentence import Sentence, listed, say
from esper.leyline.errors import ConfigError, RunDirError
from esper.nissa.reading import Record

T = TypeVar("T")


def explain(path: Path, what: str) -> list[Sentence]:
    """What a slot or a tick of a run came to, and why.

    Args:
        path: RUN.
        what: a slot id, or the number of a tick.

    Raises:
        ConfigError: the run has no such slot or tick.
        RunDirError: this is no run directory, or a file of it is damaged.
    """
    tick = int(what) if what.isdecimal() else None
    wanted: list[Record] = []

    def take(record: Record) -> None:
        of_run = record["kind"] in ("run_started", "panic")
        if record["tick"] == tick if tick is not None else of_run or slot_of(record) == what:
            wanted.append(record)

    digest = read_digest(FoundRun(name=".", path=path), take)
    if digest.newest_record is None:
        raise RunDirError(f"{path}: no events; `esper why {path} --end` says how it ended")
    try:
        return explain_slot(wanted, what) if tick is None else _explain_tick(digest, wanted, tick)
    except KeyError as error:
        known = f"the last tick is {error.args[0]}" if what.isdecimal() else f"its slots are {error.args[0]}"
        raise ConfigError(f"{path}: no {'tick' if what.isdecimal() else 'slot'} {what}; {known}") from None


def _explain_tick(digest: Digest, records: Sequence[Record], tick: int) -> list[Sentence]:
    """Everything but measurements of health that was told at one tick, in order.

    Args:
        digest: of the run.
        records: of rank 0 and that tick, without replaced ones.
        tick: number of the tick.

    Raises:
        KeyError: the run did not get to that tick; the argument names the last one.
    """
    told = []
    for record in [*records, *(record for record in digest.others if record["tick"] == tick)]:
        payload = record["payload"]
        if record["kind"] == "gate":
            result = payload["result"]
            failed = [f"{c['name']}: {c['detail']}" for c in result["checks"] if not c["passed"]]
            verdict = "passed" if result["passed"] else f"held back: {'; '.join(failed)}"
            told.append(say(f"{payload['slot']}: {result['gate']} {verdict}.", record))
        elif record["kind"] == "command":
            command = payload["command"]
            told.append(
                say(f"{command['slot']}: {command['op']} was applied: {payload['reason'].rstrip('.')}.", record)
            )
        elif record["kind"] == "contribution":
            reading = payload["contribution"]
            if reading["value"] is not None:
                error = f" ± {float(reading['se']):.2g}" if reading["se"] is not None else ""
                saved = f"{float(reading['value']):.4g}{error} of the loss of a sample"
                told.append(say(f"{payload['slot']}: look {payload['look']} at it: it saves {saved}.", record))
        elif words := describe(record):
            told.append(say(f"{words.split('  ', 1)[-1]}.", record))
    if not told:
        if tick > digest.last_tick_told:
            raise KeyError(str(digest.last_tick_told))
        told = [say(f"At tick {tick} nothing was decided, moved or measured.")]
    return told


class Growth(Generic[T]):
    """A taker that tells birth and end of every seed, in two sentences.

    Args:
        form: what is held of these.
    """

    def __init__(self, form: Callable[[Sentence], T]) -> None:
        self._form, self._panics, self._starts = form, Kept("panic"), Kept("run_started", most=1)
        self._grown: set[str] = set()
        self._told: list[tuple[tuple[int, int], T]] = []
        self._reader = LivesReader(self._tell, most_looks=1)

    def __call__(self, record: Record) -> None:
        """Takes the next record."""
        self._panics(record)
        self._starts(record)
        self._reader.take(record)

    def _tell(self, life: Life) -> None:
        self._grown.add(life.slot)
        panics = self._panics.of("panic")
        first, last = explain_life(life, panics)[0], end_with_evidence(life, panics)
        told = say(f"{first.text} {last.text}", *first.events, *last.events)
        self._told.append((by_birth(life), self._form(told)))

    def told(self) -> list[T]:
        """What was made of each seed, by the time of birth, then a sentence on the slots in which nothing was born."""
        for life in self._reader.present.values():
            self._tell(life)
        self._reader.present.clear()
        one_by_one = [told for _, told in sorted(self._told, key=lambda pair: pair[0])]
        if not one_by_one:
            return [self._form(say("Nothing was born in this run."))]
        started = self._starts.of("run_started")[-1:]
        empty = [str(slot) for start in started for slot in start["payload"]["slots"] if slot not in self._grown]
        if empty:
            one_by_one.append(self._form(say(f"Nothing was born in {listed(empty)}.", *started)))
        return one_by_one


def explain_growth(records: Iterable[Record]) -> list[Sentence]:
    """Birth and end of every seed of a run, two sentences each."""
    growth: Growth[Sentence] = Growth(lambda sentence: sentence)
    for record in records:
        growth(record)
    return growth.told()
