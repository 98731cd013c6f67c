"""A fixed list of (tick, slot, action): the simple schedule that a clever controller has to beat.

An entry is proposed at its tick, legal or not. A refusal is then an event that people see; to skip the entry silently
would hide that the schedule was not followed. Entries are plain mappings, which YAML can write:

    actions:
      - {tick: 2, slot: r0c0, op: GERMINATE, blueprint: conv_small, ticks: 4, curve: COSINE}
      - {tick: 6, slot: r0c0, op: ADVANCE}
      - {tick: 30, slot: r0c0, op: PRUNE, ticks: 2}
"""

import math
from dataclasses import dataclass, field
from typing import Any

from esper.leyline.alpha import Curve, Operator, steepness_fits
from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks
from esper.leyline.observation import Observation
from esper.leyline.slots import parse_slot, sort_slots
from esper.leyline.stages import Op
from esper.tamiyo.common import Stateless, check_observation
from esper.tamiyo.registry import register

_ALWAYS = ("tick", "slot", "op")
_RAMP = ("curve", "ticks", "steepness")
_SHAPE = ("operator", *_RAMP)
_REQUIRED: dict[Op, tuple[str, ...]] = {Op.GERMINATE: ("blueprint",), Op.SET_ALPHA_TARGET: ("target",)}
_OPTIONAL: dict[Op, tuple[str, ...]] = {
    Op.GERMINATE: ("target", *_SHAPE),
    Op.SET_ALPHA_TARGET: _SHAPE,
    Op.PRUNE: _RAMP,
}


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """The list of actions."""

    kind: str = "schedule"
    """Registered name of this kind: ``schedule``."""

    actions: list[dict[str, Any]] = field(default_factory=list)
    """Mappings, as {tick: 2, slot: r0c0, op: GERMINATE, blueprint: conv_small, ticks: 4}, at most one for a tick and
    slot. Each has ``tick`` (control tick, from 1), ``slot``, ``op`` (WAIT, GERMINATE, ADVANCE, SET_ALPHA_TARGET, PRUNE
    or FOSSILIZE), and what the op uses: ``blueprint`` (GERMINATE, needed); ``target`` (alpha in [0, 1]; GERMINATE, and
    needed for SET_ALPHA_TARGET); for the coming ramp of GERMINATE and SET_ALPHA_TARGET ``operator`` (ADD, MULTIPLY,
    GATE, CONFIDENCE, CHANNEL); and for that of these and PRUNE ``curve`` (LINEAR, COSINE, SIGMOID), ``ticks`` (0 to
    10000; 0 is at once) and ``steepness`` (SIGMOID's k, 0.01 to 50). Left out, these keep the defaults of `Command`.
    Empty: nothing ever grows.
    """

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("kind", self.kind == "schedule", "must be 'schedule'")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_RULES: dict[str, tuple[Any, str]] = {
    "tick": (lambda v: _is_int(v) and v >= 1, "must be a whole number >= 1"),
    "blueprint": (lambda v: isinstance(v, str) and v != "", "must be a blueprint's name"),
    "target": (lambda v: _is_number(v) and 0 <= v <= 1, "alpha, must be 0 to 1"),
    "ticks": (lambda v: _is_int(v) and 0 <= v <= 10_000, "must be a whole number, 0 to 10000"),
    "steepness": (lambda v: _is_number(v) and steepness_fits(v), "must be 0.01 to 50"),
    "op": (lambda v: v in Op.__members__, f"must be one of {', '.join(Op.__members__)}"),
    "operator": (lambda v: v in Operator.__members__, f"must be one of {', '.join(Operator.__members__)}"),
    "curve": (lambda v: v in Curve.__members__, f"must be one of {', '.join(Curve.__members__)}"),
}


def _find_problems(entry: dict[str, Any], slots: tuple[str, ...]) -> list[str]:
    """Returns the problems of one entry, each as ``field = value: expected``."""
    problems = [f"{key}: missing" for key in _ALWAYS if key not in entry]
    for key, (rule, expected) in _RULES.items():
        if key in entry and not (isinstance(entry[key], str | int | float) and rule(entry[key])):
            problems.append(f"{key} = {entry[key]!r}: {expected}")
    if "slot" in entry:
        try:
            parse_slot(entry["slot"], slots)
        except ConfigError as error:
            problems += error.problems
    op = Op.__members__.get(entry["op"]) if isinstance(entry.get("op"), str) else None
    used = {*_RULES, "slot"} if op is None else {*_ALWAYS, *_REQUIRED.get(op, ()), *_OPTIONAL.get(op, ())}
    if op is not None:
        problems += [f"{key}: missing, {op.name} needs it" for key in _REQUIRED.get(op, ()) if key not in entry]
    owner = "an entry" if op is None else op.name
    problems += [
        f"{key}: {owner} has no such field; it takes {', '.join(sorted(used))}" for key in sorted(set(entry) - used)
    ]
    return problems


def _parse_command(entry: dict[str, Any]) -> Command:
    arguments = {key: value for key, value in entry.items() if key not in _ALWAYS}
    if "curve" in arguments:
        arguments["curve"] = Curve[arguments["curve"]]
    if "operator" in arguments:
        arguments["operator"] = Operator[arguments["operator"]]
    for key in {"target", "steepness"} & set(arguments):
        arguments[key] = float(arguments[key])
    return Command(slot=entry["slot"], op=Op[entry["op"]], reason=f"scheduled for tick {entry['tick']}", **arguments)


def parse_actions(actions: list[dict[str, Any]], slots: tuple[str, ...]) -> dict[int, list[Command]]:
    """Returns the commands by tick, row-major within a tick.

    Raises:
        ConfigError: some entries are bad; the text lists all problems, each with its place in the list.
    """
    problems: list[str] = []
    due: dict[int, dict[str, Command]] = {}
    for index, entry in enumerate(actions):
        path = f"controller.actions[{index}]"
        if not isinstance(entry, dict):
            problems.append(f"{path} = {entry!r}: must be a mapping with {', '.join(_ALWAYS)}")
            continue
        entry_problems = _find_problems(entry, slots)
        problems += [f"{path}.{line}" for line in entry_problems]
        if not entry_problems:
            command, commands = _parse_command(entry), due.setdefault(entry["tick"], {})
            if command.slot in commands:
                problems.append(f"{path}: slot {command.slot} has an entry at tick {entry['tick']} already")
            commands[command.slot] = command
    if problems:
        raise ConfigError(problems)
    return {tick: [commands[slot] for slot in sort_slots(commands)] for tick, commands in due.items()}


@register("schedule", ScheduleConfig)
class ScheduleController(Stateless):
    """Proposes each entry at its tick."""

    name = "schedule"

    def __init__(self, config: ScheduleConfig, *, slots: tuple[str, ...], seed: int) -> None:
        self._slots = slots
        self._due = parse_actions(config.actions, slots)

    def decide(self, observation: Observation) -> list[Command]:
        """Returns the entries due at this tick."""
        check_observation(observation, self._slots)
        return list(self._due.get(observation.tick, ()))
