"""Settings of data in two phases."""

from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.fields import Checks
from esper.tolaria.data.registry import DataConfig


class Phase(StrEnum):
    """OLD: the old data alone. NEW: the new data with a share of the old replayed; both are held out."""

    OLD = "old"
    NEW = "new"


@dataclass(kw_only=True, slots=True)
class PhasedConfig(DataConfig):
    """What data of two phases share. Sizes of parts are per phase: the new one holds out as many old samples as new."""

    phase: Phase = Phase.OLD
    """``old``, or ``new``: the new data come, of the old ones only ``replay`` is left, and held-out parts have both."""

    replay: float = 0.5
    """Share of the old data in the training part of the new phase, 0 to below 1."""

    test: int = 100
    """Samples of each phase in the test part."""

    def check_phases(self, check: Checks) -> None:
        """Range checks of the shared fields, reported together with the subclass's own."""
        self.check_split(check)
        check("replay", 0 <= self.replay < 1, "share of the training part, must be >= 0 and < 1")


@dataclass(kw_only=True, slots=True)
class DigitsPhasesConfig(PhasedConfig):
    """scikit-learn's digits: the first classes, then the others. A host has ten logits in both phases."""

    kind: str = "digits_phases"
    """Registered name of this kind: ``digits_phases``."""

    validation: int = 150
    """Samples of each phase in the validation part; the rest is for training."""

    probe: int = 150
    """Samples of each phase in the probe part."""

    old_classes: int = 5
    """Classes of the old phase: the digits below this one."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_phases(check)
            check("old_classes", 1 <= self.old_classes <= 9, "must be 1 to 9")


@dataclass(kw_only=True, slots=True)
class TextPhasesConfig(PhasedConfig):
    """Bytes: this Python's standard library, then the C++ headers that torch ships. Needs no download."""

    kind: str = "text_phases"
    """Registered name of this kind: ``text_phases``."""

    block: int = 64
    """Bytes that the model sees of a sample."""

    max_bytes: int = 2_000_000
    """Size of each of the two corpora in bytes, at most."""

    validation: int = 128
    """Samples of each phase in the validation part; the rest is for training."""

    probe: int = 512
    """Samples of each phase in the probe part."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_phases(check)
            check("block", self.block >= 1, "bytes, must be >= 1")
            check("max_bytes", self.max_bytes >= 1, "must be >= 1")
