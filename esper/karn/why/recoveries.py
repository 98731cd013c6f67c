"""What a run got over by itself: vetoes, steps that were left out, panics, rollbacks, and faults that ended nothing."""

import re

from esper.karn.store.digest import Digest, Kept
from esper.karn.why.sentence import Sentence, at, say
from esper.nissa.reading import Record

BEFELL = ("veto", "skipped", "panic", "rollback", "fault")
MOST = 100  # of each of these, the newest, that are told


def held_recoveries() -> Kept:
    """A taker of the records of rank 0 that tell of these."""
    return Kept(*BEFELL, most=MOST)


def tell_recoveries(digest: Digest, befell: Kept) -> list[Sentence]:
    """What a run got over by itself, in sentences.

    Args:
        digest: of its events.
        befell: see `held_recoveries`; all that was told.
    """
    told = []
    if older := befell.left_out(*BEFELL):
        text = f"{older:,} older vetoes, skipped steps, panics, rollbacks and faults are left out here; all of them: "
        told.append(say(text + "esper query, view events."))
    faults: dict[str, list[Record]] = {}  # those that differ in their numbers alone are told once
    for record in sorted([*befell, *digest.others], key=lambda r: (r["attempt"], r["step"], r["rank"])):
        payload = record["payload"]
        where = f"At step {record['step']:,} (tick {record['tick']:,})"
        if record["kind"] == "veto":
            text = f"the birth of {payload['blueprint']} in {payload['slot']} was given up on all ranks, since rank "
            told.append(say(f"{where} {text}{payload['rank']} could not hold it: {payload['reason']}.", record))
        elif record["kind"] == "skipped":
            ranks = f" on ranks {', '.join(map(str, payload['ranks']))}" if payload["ranks"] else ""
            text = f"{payload['count']} steps were left out: a gradient or loss was not finite{ranks}."
            told.append(say(f"{where} {text}", record))
        elif record["kind"] == "panic":
            told.append(
                say(f"{where} the governor took the run for sick ({payload['symptom']}): {payload['words']}.", record)
            )
        elif record["kind"] == "rollback":
            blamed = f" {', '.join(payload['blamed'])} was blamed." if payload["blamed"] else ""
            told.append(say(f"{where} all ranks went back to step {payload['to_step']:,}.{blamed}", record))
        elif record["kind"] == "fault" and not _ends(record, digest):
            faults.setdefault(re.sub(r"\d+", "0", payload["what"].splitlines()[0]), []).append(record)
    for like in faults.values():
        first, last = like[0], like[-1]
        times = "" if len(like) == 1 else f", and the like {len(like) - 1} times more until step {last['step']:,}"
        words = first["payload"]["what"].splitlines()[0]
        told.append(say(f"At {at(first)} rank {first['rank']} said: {words}{times}.", *like))
    return told


def _ends(record: Record, digest: Digest) -> bool:
    """Whether a fault is the end of its attempt, which is told in any case."""
    words = record["payload"]["what"]
    ends = [r["payload"]["summary"].get("message") for r in digest.ends]
    last = [r for r in digest.others if r["attempt"] == record["attempt"]][-1:]
    return words in ends or (last == [record] and words.startswith(("lost contact", "ranks parted")))
