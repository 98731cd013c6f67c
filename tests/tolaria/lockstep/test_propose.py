"""What a controller answers: commands that can travel, or one error that names slot and field."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from esper.leyline.alpha import Curve, Operator
from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError
from esper.leyline.stages import Op
from esper.tolaria.lockstep.propose import propose
from esper.tolaria.lockstep.words import decode_command, encode_command

RIGHT = Command(slot="r0c0", op=Op.GERMINATE, blueprint="mlp", ticks=2)
SLOTS: Any = SimpleNamespace(slots=[SimpleNamespace(slot="r0c0"), SimpleNamespace(slot="r0c1")])


def answer(given: Any) -> dict[str, Command]:
    controller: Any = SimpleNamespace(name="mine", decide=lambda observation: given)
    return propose(controller, SLOTS, 10, ["mlp"])


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("op", "GERMINATE", "'GERMINATE': expected one of Op.WAIT, Op.GERMINATE"),
        ("op", 1, "1: expected one of Op"),
        ("operator", "ADD", "'ADD': expected one of Operator.ADD"),
        ("operator", None, "None: expected one of Operator"),
        ("curve", "COSINE", "'COSINE': expected one of Curve"),
        ("ticks", 2**70, f"{2**70}: expected at most 2147483647"),
        ("ticks", -(2**70), "expected at most"),
        ("ticks", 2.7, "2.7: expected a whole number"),
        ("ticks", None, "None: expected a whole number"),
        ("ticks", True, "True: expected a whole number"),
        ("target", None, "None: expected a number"),
        ("target", "1", "'1': expected a number"),
        ("target", float("nan"), "nan: expected a finite number"),
        ("steepness", float("inf"), "inf: expected a finite number"),
    ],
)
def test_a_field_that_cannot_travel_is_named_with_its_slot(field: str, value: Any, text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        answer([replace(RIGHT, **{field: value})])
    assert str(raised.value).startswith(f"controller mine: r0c0.{field} = ")
    assert text in str(raised.value)


@pytest.mark.parametrize("given", [None, 3, [None], ["WAIT"], RIGHT])
def test_an_answer_that_is_no_list_of_commands_is_one_error(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"controller mine: decide returned .* expected (a list of )?Commands"):
        answer(given)


def test_whatever_passes_comes_out_of_the_wire_as_it_went_in() -> None:
    given = replace(RIGHT, ticks=np.int64(3), target=np.float32(0.5), curve=Curve.LINEAR, operator=Operator.GATE)  # type: ignore[arg-type]
    command = answer(iter([given]))["r0c0"]
    assert (type(command.ticks), type(command.target), command.proposal) == (int, float, 11)
    assert decode_command(encode_command(command, ["mlp"]), "r0c0", ["mlp"]) == command
