"""What a stage means for the slot that is in it: its `Phase`, and whether its seed learns. Data, in `PHASES`.

stage                    phase       seed's input    learns
EMPTY, cooling           OFF         -               -
GERMINATED               OFF         -               no
TRAINING  (shadow)       OFF         -               in a forward of its own (see incubation)
TRAINING  (ste)          STRAIGHT    detached        yes
BLENDING, HOLDING        BLEND       attached        yes (not while a prune ramp runs)
FOSSILIZED               BLEND       attached        by config
"""

from enum import StrEnum

from esper.leyline.stages import Incubation, Stage


class Phase(StrEnum):
    """What the slot does in the host's forward."""

    OFF = "off"
    STRAIGHT = "straight"
    BLEND = "blend"


PHASES: dict[Stage, Phase] = {stage: Phase.BLEND if stage.is_blended else Phase.OFF for stage in Stage}


def phase_of(stage: Stage, incubation: Incubation) -> Phase:
    """The row of the table above."""
    if stage is Stage.TRAINING and incubation == Incubation.STE:
        return Phase.STRAIGHT
    return PHASES[stage]
