"""What a policy may choose from, head by head, and the command that a choice becomes.

op         WAIT, GERMINATE, ADVANCE, SET_ALPHA_TARGET, PRUNE, FOSSILIZE
slot       of every op but WAIT
blueprint  GERMINATE: an entry of the slot's catalogue
operator   GERMINATE, SET_ALPHA_TARGET
tempo      GERMINATE: ticks of its ramp
target     GERMINATE, SET_ALPHA_TARGET: alpha to blend to
speed      SET_ALPHA_TARGET, PRUNE: ticks of the ramp; a PRUNE of 0 is at once
curve      of a ramp that takes time
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from esper.leyline.alpha import Curve, Operator
from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError
from esper.leyline.observation import Observation
from esper.leyline.plain import from_plain, to_plain
from esper.leyline.stages import Op

HEADS = ("op", "slot", "blueprint", "operator", "tempo", "target", "speed", "curve")
WITH_OPERATOR = (Op.GERMINATE, Op.SET_ALPHA_TARGET)
WITH_SPEED = (Op.SET_ALPHA_TARGET, Op.PRUNE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of the heads that have a fixed number of them. Slots and blueprints are the observation's.

    Fields:
        ops: WAIT is the first.
        operators: by which a seed joins.
        tempos: ticks of a birth's ramp, 0 to 10,000.
        targets: alphas, 0 to 1.
        speeds: ticks of a retarget's or prune's ramp, 0 to 10,000; one of them is 0, since a prune by ramp is not
            always legal, and one is not, since a switch of the operator needs a ramp.
        curves: shapes of a ramp.
    """

    ops: tuple[Op, ...]
    operators: tuple[Operator, ...]
    tempos: tuple[int, ...]
    targets: tuple[float, ...]
    speeds: tuple[int, ...]
    curves: tuple[Curve, ...]

    def __post_init__(self) -> None:
        ticks = (*self.tempos, *self.speeds)
        if self.ops[:1] != (Op.WAIT,) or not all((self.operators, self.tempos, self.targets, self.curves)):
            raise ValueError("options: the first op must be WAIT, and no head may be without options")
        if not all(0 <= one <= 10_000 for one in ticks) or not all(0.0 <= one <= 1.0 for one in self.targets):
            raise ValueError(f"options: ticks {ticks} must be 0 to 10000, targets {self.targets} 0 to 1")
        if 0 not in self.speeds or not any(self.speeds):
            raise ValueError(f"options: speeds {self.speeds}: 0 and one above are needed")

    def plain(self) -> dict[str, Any]:
        """Returns the options as plain data, by name."""
        return to_plain(self)


OPTIONS = Options(
    ops=tuple(Op),
    operators=tuple(Operator),
    tempos=(0, 1, 2, 3, 5, 8),
    targets=(0.25, 0.5, 0.75, 1.0),
    speeds=(0, 1, 2, 3, 5, 8),
    curves=tuple(Curve),
)
"""What a new policy may choose from."""


def read_options(plain: Mapping[str, Any], where: str) -> Options:
    """Returns the options that a checkpoint was made with.

    Raises:
        ConfigError: an op, operator or curve that this code does not have; the text names it.
    """
    try:
        return from_plain(Options, dict(plain), "options")
    except ValueError as error:
        raise ConfigError(f"{where}: {error}; run the policy with the code that it was trained by") from None


def to_choice(observation: Observation, command: Command, options: Options = OPTIONS) -> dict[str, int]:
    """Returns the choice that comes closest to a command: `to_commands` the other way round.

    Ticks and targets become the nearest option, the shorter or lower of two. What it has no option for is left out, so
    the choice may be illegal where the command is not; ask the masks.

    Args:
        observation: the one that the command was given on.
        command: of a rule, of one of the observation's slots.
        options: what the heads choose from.
    """
    view = observation.slot(command.slot)
    choice = dict.fromkeys(HEADS, 0) | {"op": options.ops.index(command.op)}
    if command.op is Op.WAIT:
        return choice
    choice["slot"] = observation.slots.index(view)
    if command.op is Op.GERMINATE:
        choice["blueprint"] = [info.name for info in view.catalogue].index(str(command.blueprint))
        choice["tempo"] = _nearest(options.tempos, command.ticks)
    if command.op in WITH_OPERATOR:
        if command.operator in options.operators:
            choice["operator"] = options.operators.index(command.operator)
        choice["target"] = _nearest(options.targets, command.target)
    if command.op in WITH_SPEED:
        choice["speed"] = _nearest(options.speeds, command.ticks)
    takes_time = options.tempos[choice["tempo"]] if command.op is Op.GERMINATE else options.speeds[choice["speed"]]
    if command.op in (Op.GERMINATE, *WITH_SPEED) and takes_time and command.curve in options.curves:
        choice["curve"] = options.curves.index(command.curve)
    return choice


def _nearest(options: Sequence[float], wanted: float) -> int:
    return min(range(len(options)), key=lambda place: (abs(options[place] - wanted), options[place]))


def to_commands(
    observation: Observation, choice: Mapping[str, int], options: Options = OPTIONS, reason: str = ""
) -> list[Command]:
    """Returns the command of one choice; none for WAIT.

    Args:
        observation: the one that the choice was made from.
        choice: option by head, of `HEADS`; those that do not matter are not read.
        options: what the heads chose from.
        reason: for people.
    """
    op = options.ops[choice["op"]]
    if op is Op.WAIT:
        return []
    view = observation.slots[choice["slot"]]
    fields: dict[str, Any] = {}
    if op is Op.GERMINATE:
        fields = {"blueprint": view.catalogue[choice["blueprint"]].name, "ticks": options.tempos[choice["tempo"]]}
    if op in WITH_OPERATOR:
        fields |= {"operator": options.operators[choice["operator"]], "target": options.targets[choice["target"]]}
    if op in WITH_SPEED:
        fields["ticks"] = options.speeds[choice["speed"]]
    if fields.get("ticks"):
        fields["curve"] = options.curves[choice["curve"]]
    return [Command(slot=view.slot, op=op, reason=reason, **fields)]
