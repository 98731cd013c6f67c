"""Settings that several tasks have."""

from enum import StrEnum


class Normalise(StrEnum):
    """SAMPLES: a step's loss is the mean over its samples. TOKENS: over all positions of its samples that count."""

    SAMPLES = "samples"
    TOKENS = "tokens"
