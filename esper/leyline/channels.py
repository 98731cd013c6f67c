"""The vector v of the CHANNEL operator, parsed from text: ``slots.channels: {r0c0: "1,0.5,0"}``.

The text holds one value in [0, 1] per channel. Its length is checked before it is parsed, so a file passed by mistake
costs nothing. In a slot without a v, CHANNEL is illegal; it never falls back to a scalar.
"""

from collections.abc import Mapping, Sequence

from esper.leyline.alpha import Operator, check_alpha
from esper.leyline.errors import ConfigError
from esper.leyline.observation import ChannelInfo

MAX_CHARACTERS = 65_536


def channels_path(slot: str) -> str:
    """The name of the setting in error texts, without its value, which may be long."""
    return f"slots.channels = {{{slot}: ...}}"


def parse_channels(text: str, where: str) -> tuple[float, ...]:
    """Returns the values of v.

    Args:
        text: numbers separated by commas.
        where: config path, for error texts.

    Raises:
        ConfigError: ``text`` is not text or is too long, or a value is not a number, NaN or outside [0, 1]; the error
            names the first bad channel.
    """
    if not isinstance(text, str):
        raise ConfigError(
            f'{where}: {type(text).__name__} is no text; write one value in [0, 1] per channel, such as "1,0.5,0"'
        )
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{where}: {len(text)} characters, at most {MAX_CHARACTERS} are read; shorten the decimals")
    values = []
    for index, item in enumerate(text.split(",")):
        try:
            values.append(check_alpha(float(item)))
        except ValueError:
            raise ConfigError(
                f"{where}: channel {index} is {item.strip()[:40]!r}, must be a number in [0, 1]"
            ) from None
    return tuple(values)


def summarize_channels(values: Sequence[float]) -> ChannelInfo:
    """Summarises v for controllers."""
    ordered = sorted(values)
    position = 0.95 * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ChannelInfo(
        mean=sum(ordered) / len(ordered),
        p95=ordered[low] + (position - low) * (ordered[high] - ordered[low]),
        sparsity=sum(value == 0.0 for value in ordered) / len(ordered),
    )


def usable_operators(slot: str, channels: Mapping[str, object], *, class_logits: bool) -> tuple[Operator, ...]:
    """Returns the operators that a slot may use.

    Args:
        slot: slot id.
        channels: slots that have a v.
        class_logits: whether the model's output is logits [B, K >= 2].
    """
    excluded = set() if slot in channels else {Operator.CHANNEL}
    excluded |= set() if class_logits else {Operator.CONFIDENCE}
    return tuple(operator for operator in Operator if operator not in excluded)
