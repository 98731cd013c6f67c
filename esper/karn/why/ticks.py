"""What happened at one tick, and a run as a whole, in plain sentences."""

from collections.abc import Sequence
from pathlib import Path

from esper.karn.lives import lives
from esper.karn.store.facts import describe, read_digest
from esper.karn.store.finding import FoundRun
from esper.karn.why.fates import end_with_evidence, explain_life, explain_slot
from esper.karn.why.sentence import Sentence, say
from esper.leyline.errors import ConfigError, RunDirError
from esper.nissa.reading import Record


def explain(path: Path, what: str) -> list[Sentence]:
    """What a slot or a tick of a run came to, and why.

    Args:
        path: RUN.
        what: a slot id, or the number of a tick.

    Raises:
        ConfigError: the run has no such slot or tick.
        RunDirError: this is no run directory, or a file of it is damaged.
    """
    digest = read_digest(FoundRun(name=".", path=path))
    if not digest.records:
        raise RunDirError(f"{path}: no events; `esper why {path} --end` says how it ended")
    try:
        if what.isdecimal():
            return explain_tick([*digest.records, *digest.others], int(what))
        return explain_slot(digest.records, what)
    except KeyError as error:
        known = f"the last tick is {error.args[0]}" if what.isdecimal() else f"its slots are {error.args[0]}"
        raise ConfigError(f"{path}: no {'tick' if what.isdecimal() else 'slot'} {what}; {known}") from None


def explain_tick(records: Sequence[Record], tick: int) -> list[Sentence]:
    """Everything but measurements of health that was told at one tick, in order.

    Args:
        records: of the run and of its other ranks, without replaced ones.
        tick: number of the tick.

    Raises:
        KeyError: nothing is known of that tick; the argument names the last one.
    """
    told = []
    for record in (record for record in records if record["tick"] == tick):
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
        last = max((record["tick"] for record in records), default=0)
        if tick > last:
            raise KeyError(str(last))
        told = [say(f"At tick {tick} nothing was decided, moved or measured.")]
    return told


def explain_growth(records: Sequence[Record]) -> list[Sentence]:
    """Birth and end of every seed of a run, two sentences each."""
    told = []
    for life in lives(records):
        first, last = explain_life(life, records)[0], end_with_evidence(life, records)
        told.append(say(f"{first.text} {last.text}", *first.events, *last.events))
    return told or [say("Nothing was born in this run.")]
