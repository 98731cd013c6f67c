"""The answer to an order, signed by the run, so that what a person reads is the run's own word."""

import json
from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.orders.seal import is_signed, sign
from esper.leyline.plain import from_plain, to_plain

HEADING = "esper answer 1\n"


class Outcome(StrEnum):
    """APPLIED: done, or with a dry run: it would be. REFUSED: not done. EXPIRED: no tick took it in time."""

    APPLIED = "applied"
    REFUSED = "refused"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What became of an order.

    Fields:
        nonce: of the order.
        outcome: whether it was done.
        words: what came of it, or why not.
        tick: that took it; None if none did.
        step: optimizer steps done at that tick, or None.
        number: line in the journal; None if it is not in there.
        dry_run: whether nothing was done in any case.
    """

    nonce: str
    outcome: Outcome
    words: str
    tick: int | None
    step: int | None
    number: int | None
    dry_run: bool


def _text(answer: Answer) -> bytes:
    return (HEADING + json.dumps(to_plain(answer), sort_keys=True, separators=(",", ":"))).encode("ascii")


def write_answer(key: bytes, answer: Answer) -> str:
    """The answer with its signature, as JSON."""
    return json.dumps({"answer": to_plain(answer), "signature": sign(key, _text(answer))}) + "\n"


def read_answer(key: bytes, data: bytes, nonce: str) -> Answer:
    """Reads the answer to the order with this nonce.

    Raises:
        ValueError: it is not signed by the run, or is another order's.
    """
    try:
        letter = json.loads(data)
        answer = from_plain(Answer, letter["answer"], "answer")
        good = is_signed(key, _text(answer), str(letter["signature"]))
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no answer ({error})") from None
    if not good or answer.nonce != nonce:
        raise ValueError("not signed by this run")
    return answer
