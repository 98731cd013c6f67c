"""A command as eight int64 words: how it travels in a commit."""

import struct
from collections.abc import Sequence

from esper.leyline.alpha import Curve, Operator
from esper.leyline.commands import Command, wait
from esper.leyline.stages import Op

WORDS = 8


def _float_bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _bits_float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def encode_command(command: Command, names: Sequence[str]) -> list[int]:
    """Eight int64 words.

    Args:
        command: a command whose blueprint, if any, is one of ``names``.
        names: the agreed catalogue; what travels is the position in it.
    """
    index = -1 if command.blueprint is None else list(names).index(command.blueprint)
    return [
        command.proposal,
        int(command.op),
        index,
        int(command.operator),
        int(command.curve),
        command.ticks,
        _float_bits(command.target),
        _float_bits(command.steepness),
    ]


def decode_command(words: Sequence[int], slot: str, names: Sequence[str]) -> Command:
    """Inverse of `encode_command`; the reason stays behind on rank 0."""
    proposal, op, index, operator, curve, ticks, target, steepness = words
    return Command(
        slot=slot,
        op=Op(op),
        blueprint=None if index < 0 else names[index],
        operator=Operator(operator),
        curve=Curve(curve),
        ticks=ticks,
        target=_bits_float(target),
        steepness=_bits_float(steepness),
        proposal=proposal,
    )


WAITING = encode_command(wait(""), ())
