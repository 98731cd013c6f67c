"""CHANNEL's vector v, from a line of text: ``slots.channels: {r0c0: "1,0.5,0"}``, one value in [0, 1] per channel.

The text is capped before it is parsed: a file handed in by mistake costs nothing. Without a v CHANNEL is illegal in
that slot; it is never a silent scalar.
"""

from collections.abc import Mapping, Sequence

from esper.leyline.alpha import Operator, check_alpha
from esper.leyline.errors import ConfigError
from esper.leyline.observation import ChannelInfo

MAX_CHARACTERS = 65_536


def channels_path(slot: str) -> str:
    """How an error names the setting, without its perhaps long text."""
    return f"slots.channels = {{{slot}: ...}}"


def parse_channels(text: str, where: str) -> tuple[float, ...]:
    """The values of v.

    Args:
        text: numbers separated by commas. where: the config path, for messages.

    Raises:
        ConfigError: no text, too long, not a number, NaN, or outside [0, 1]; the text names the first bad channel.
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


def channel_info(values: Sequence[float]) -> ChannelInfo:
    """What a controller sees of v."""
    ordered = sorted(values)
    place = 0.95 * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ChannelInfo(
        mean=sum(ordered) / len(ordered),
        p95=ordered[low] + (place - low) * (ordered[high] - ordered[low]),
        sparsity=sum(value == 0.0 for value in ordered) / len(ordered),
    )


def usable_operators(slot: str, channels: Mapping[str, object], *, class_logits: bool) -> tuple[Operator, ...]:
    """Operators that a slot may use.

    Args:
        slot: slot id. channels: slots that have a v. class_logits: the model's output is logits [B, K >= 2].
    """
    missing = set() if slot in channels else {Operator.CHANNEL}
    missing |= set() if class_logits else {Operator.CONFIDENCE}
    return tuple(operator for operator in Operator if operator not in missing)
