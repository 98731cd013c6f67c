"""The `Phase` of a slot in each stage, and whether its seed learns; `PHASES` holds the table as data.

stage                    phase       seed's input    learns
EMPTY, cooling           OFF         -               -
GERMINATED               OFF         -               no
TRAINING  (shadow)       OFF         -               in a forward of its own (see incubation)
TRAINING  (ste)          STRAIGHT    detached        yes
BLENDING, HOLDING        BLEND       attached        yes (not while a prune ramp runs)
FOSSILIZED               BLEND       attached        by config (not while a prune ramp runs)
"""

from enum import StrEnum

from esper.leyline.stages import Incubation, Stage


class Phase(StrEnum):
    """The role of a slot in the host's forward."""

    OFF = "off"
    STRAIGHT = "straight"
    BLEND = "blend"


PHASES: dict[Stage, Phase] = {stage: Phase.BLEND if stage.is_blended else Phase.OFF for stage in Stage}


def phase_of(stage: Stage, incubation: Incubation) -> Phase:
    """Looks up a stage in the table above."""
    if stage is Stage.TRAINING and incubation == Incubation.STE:
        return Phase.STRAIGHT
    return PHASES[stage]
