"""A sentence and the events that it stands on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esper.nissa.reading import Record

MOST_NAMES = 8  # events that a sentence names, where it stands on no more


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """What is told, and what tells it.

    Fields:
        text: one or two plain sentences.
        events: the records that they stand on.
    """

    text: str
    events: tuple[Record, ...] = ()


def say(text: str, *events: Record | None) -> Sentence:
    """A sentence that stands on these events."""
    return Sentence(text=text, events=tuple(event for event in events if event is not None))


def name_event(record: Record) -> str:
    """How an event is found again: its number in its process, with attempt and rank where they are not the first.

    ``#76`` is the record of rank 0's file with ``"attempt":1`` and ``"seq":76``.
    """
    attempt = f" of attempt {record['attempt']}" if record["attempt"] > 1 else ""
    rank = f" of rank {record['rank']}" if record["rank"] else ""
    return f"#{record['seq']}{attempt}{rank}"


def name_events(events: Iterable[Record]) -> str:
    """The names of events, in square brackets; empty without any. Of many the first ones and the last."""
    names = list(dict.fromkeys(map(name_event, events)))
    if len(names) > MOST_NAMES:
        first = MOST_NAMES // 2
        names = [*names[:first], f"{len(names) - first - 1} more", names[-1]]
    return f" [{', '.join(names)}]" if names else ""


def at(record: Record) -> str:
    """``step 36 (tick 3)``."""
    return f"step {record['step']:,} (tick {record['tick']:,})"


def listed(words: Sequence[str]) -> str:
    """``a``, ``a and b`` or ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
