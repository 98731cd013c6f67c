"""Why a seed was born, kept, refused or pruned: the life of a slot in plain sentences."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from esper.karn.lives import Life, by_place, last_look, lives, slot_of
from esper.karn.why.sentence import Sentence, at, listed, say
from esper.leyline.stages import Mechanical, Stage
from esper.nissa.reading import Record

UNASKED = {
    Mechanical.RAMP_END: "the ramp down that its pruning had begun was over",
    Mechanical.QUARANTINE: "its own gradient was not finite, so it was taken out before it could reach the host",
    Mechanical.DEGRADED: "it ran by a fallback for too long on some rank",
    Mechanical.ROLLBACK: "it was blamed for what made the run sick, and undone when all ranks went back",
}


def explain_slot(records: Sequence[Record], slot: str) -> list[Sentence]:
    """The lives of the seeds in one slot, and the births that did not come about.

    Args:
        records: of the run, without replaced ones.
        slot: slot id.

    Raises:
        KeyError: the run has no such slot; the argument names those that it has.
    """
    slots = slots_of(records)
    if slot not in slots:
        raise KeyError(", ".join(slots) or "none")
    return tell_slot(slot, [life for life in lives(records) if life.slot == slot], records)


def tell_slot(slot: str, found: Sequence[Life], beside: Sequence[Record]) -> list[Sentence]:
    """The lives of the seeds in one slot, and the births that did not come about.

    Args:
        slot: slot id.
        found: the lives in it.
        beside: records with the panics, and the vetoes and refusals of this slot, among others.
    """
    panics = [record for record in beside if record["kind"] == "panic"]
    told = [sentence for life in found for sentence in explain_life(life, panics)]
    told += _births_refused(beside, slot, found)
    if not told:
        told = [say(f"Nothing was born in {slot}: the controller never asked for a seed there.")]
    return told


def slots_of(records: Sequence[Record]) -> list[str]:
    """The slots of a run."""
    begun = [record for record in records if record["kind"] == "run_started"]
    return [str(slot) for slot in begun[-1]["payload"]["slots"]] if begun else []


def explain_life(life: Life, panics: Sequence[Record]) -> list[Sentence]:
    """Birth, evidence and end of one seed, in a few sentences.

    Args:
        life: the seed's.
        panics: of the run, until then or longer.
    """
    asked = life.command_of(life.birth)
    why = f": {asked['payload']['reason'].rstrip('. ')}" if asked else ""
    number = f" (seed {life.generation} of this slot)" if life.generation > 1 else ""
    told = [say(f"{life.slot}: {life.blueprint} was born at {at(life.birth)}{number}{why}.", asked, life.birth)]
    if sentence := _looks(life):
        told.append(sentence)
    joined = life.reached(Stage.BLENDING)
    if joined is not None:
        command = life.command_of(joined)
        told.append(say(f"It joined the host at {at(joined)}: {_reason(command)}.", command, joined))
    told += _held_back(life)
    told.append(_end(life, panics))
    return told


def _reason(command: Record | None) -> str:
    """The reason of a command, up to its first semicolon; the rest, mostly figures told before, is in the event."""
    reason = str(command["payload"]["reason"]).split("; ")[0].rstrip(". ") if command else ""
    return reason or "no reason was given"


def _reading(reading: dict[str, Any]) -> str:
    value, error = reading["value"], reading["se"]
    if value is None:
        return "not measured"
    return f"{float(value):.4g}" + (f" ± {float(error):.2g}" if error is not None else "")


def _looks(life: Life) -> Sentence | None:
    looks = life.of("contribution")
    last = last_look(life)
    if last is None:
        return None
    times = "once" if life.looks == 1 else f"{life.looks} times"
    text = f"It was measured {times}. Over all looks since its alpha last moved it saves {_reading(last['running'])}"
    costs = last["running"]["value"] is not None and float(last["running"]["value"]) < 0
    below = "; below 0 it costs" if costs else ""
    text += f" of the loss of a sample ({last['clusters']} clusters of samples{below})"
    text += _weight(last)
    return say(text + ".", looks[-1])


def _weight(look: dict[str, Any]) -> str:
    """What a look says to what its gate asks for; empty where it says nothing."""
    if look["log_evidence"] is None or look["chance"] <= 0:
        return ""
    needed = -math.log(look["chance"])
    word = "enough" if look["log_evidence"] >= needed else "not enough"
    return f"; the log evidence that it helps is {look['log_evidence']:.3g}, its gate asks for {needed:.3g}: {word}"


def end_with_evidence(life: Life, panics: Sequence[Record]) -> Sentence:
    """The end of one seed in a sentence; of one that was pruned by command, with what its looks had come to."""
    told, last = _end(life, panics), last_look(life)
    if last is None or life.fate != "pruned" or life.end is None or life.command_of(life.end) is None:
        return told
    look = life.of("contribution")[-1]
    return Sentence(text=told.text.rstrip(".") + _weight(last) + ".", events=(*told.events, look))


def _held_back(life: Life) -> list[Sentence]:
    """The gates that said no, and the commands that were refused; each reason once."""
    told = []
    failed: dict[tuple[str, str], list[Record]] = {}
    for gate in life.of("gate"):
        result = gate["payload"]["result"]
        if not result["passed"]:
            names = listed([check["name"] for check in result["checks"] if not check["passed"]])
            failed.setdefault((result["gate"], names), []).append(gate)
    for (name, checks), gates in failed.items():
        last = [check for check in gates[-1]["payload"]["result"]["checks"] if not check["passed"]]
        detail = "; ".join(f"{check['name']}: {check['detail']}" for check in last)
        times = f"at {at(gates[0])}" if len(gates) == 1 else f"{len(gates)} times, the last at {at(gates[-1])}"
        told.append(say(f"{name} held it back {times} for {checks} ({detail}).", *gates))
    refusals = life.of("refusal")
    for (op, reason), count in Counter((r["payload"]["command"]["op"], _reason(r)) for r in refusals).items():
        of_it = [r for r in refusals if (r["payload"]["command"]["op"], _reason(r)) == (op, reason)]
        times = "" if count == 1 else f" {count} times, the last"
        told.append(say(f"{op} was refused{times} at {at(of_it[-1])}: {reason}.", *of_it))
    return told


def _end(life: Life, panics: Sequence[Record]) -> Sentence:
    end = life.end
    if end is None:
        last = life.of("stage")[-1]
        return say(f"It is alive, in {life.stage.name} since {at(last)}; nothing has been decided about its end.", last)
    command = life.command_of(end)
    gates = [g for g in life.of("gate") if g["payload"]["result"]["gate"] == "G5" and g["tick"] == end["tick"]]
    if life.fate == "fossilised":
        return say(f"It was kept: fossilised at {at(end)}, since {_reason(command)}.", *gates, command, end)
    cause = end["payload"]["cause"]
    if cause in Mechanical.__members__:
        return say(
            f"It was pruned at {at(end)}: {_unasked(life, Mechanical[cause], panics)}.", *_behind(life, end), end
        )
    return say(f"It was pruned at {at(end)}, since {_reason(command)}.", command, end)


def _unasked(life: Life, cause: Mechanical, panics: Sequence[Record]) -> str:
    """Why a seed went that nobody commanded to go, with what led to it."""
    text = UNASKED.get(cause, cause.value.lower())
    if cause is Mechanical.ROLLBACK:
        before = [panic for panic in panics if life.end is None or by_place(panic) < by_place(life.end)]
        return text + (f" ({before[-1]['payload']['words']})" if before else "")
    if cause is Mechanical.DEGRADED:
        reasons = [r["payload"]["reason"] for r in life.of("degraded")]
        return text + (f" ({reasons[-1]})" if reasons else "")
    if cause is Mechanical.RAMP_END:
        prunes = [r for r in life.of("command") if r["payload"]["command"]["op"] == "PRUNE" and r["payload"]["applied"]]
        return f"{_reason(prunes[-1])}; {text}" if prunes else text
    return text


def _behind(life: Life, end: Record) -> list[Record]:
    """The records that led to an end that nobody commanded at that tick."""
    prunes = [r for r in life.of("command") if r["payload"]["command"]["op"] == "PRUNE"]
    return [*life.of("degraded"), *(prunes if end["payload"]["cause"] == Mechanical.RAMP_END else [])]


def _births_refused(records: Sequence[Record], slot: str, found: Sequence[Life]) -> list[Sentence]:
    """Seeds that were asked for and not born: refused, or given up because a rank could not hold them."""
    told = []
    mine = [record for record in records if slot_of(record) == slot]
    for veto in (record for record in mine if record["kind"] == "veto"):
        payload = veto["payload"]
        text = f"{slot}: the birth of {payload['blueprint']} was given up on all ranks at {at(veto)}, since rank "
        told.append(say(f"{text}{payload['rank']} could not hold it: {payload['reason']}.", veto))
    inside = {id(record) for life in found for record in life.events}
    refused: dict[tuple[str, str], list[Record]] = {}
    for record in mine:
        if record["kind"] == "refusal" and id(record) not in inside:
            command = record["payload"]["command"]
            refused.setdefault((command["blueprint"] or command["op"], _reason(record)), []).append(record)
    for (what, reason), times in refused.items():
        often = "" if len(times) == 1 else f" {len(times)} times, the last"
        told.append(say(f"{slot}: {what} was refused{often} at {at(times[-1])}: {reason}.", *times))
    return told
