"""The shape of a sample of each kind of data, as far as the settings say it."""

from typing import Any

from esper.tolaria.data import (
    Cifar10Config,
    DigitsConfig,
    DigitsPhasesConfig,
    ImagesConfig,
    PySourceConfig,
    RecallConfig,
    TextConfig,
    TextPhasesConfig,
    TokensConfig,
)

_ANY_SIDE = 1 << 14  # stands for the side of images whose size only the files know


def sample_of(data: Any) -> tuple[tuple[int, ...], int] | None:
    """Shape of one sample, without the batch axis, and number of classes; None if only the files know."""
    match data:
        case PySourceConfig() | TextConfig():
            return (data.block,), 256
        case TokensConfig():
            return (data.block,), data.vocabulary
        case RecallConfig():
            return (data.length,), data.vocabulary
        case TextPhasesConfig():
            return (data.block,), 256
        case DigitsConfig() | DigitsPhasesConfig():
            return (1, 8, 8), 10
        case Cifar10Config():
            return (data.channels, 32, 32), data.classes
        case ImagesConfig():
            return (data.channels, _ANY_SIDE, _ANY_SIDE), data.classes
    return None
