"""Typed, frozen events: each records one thing that happened in a run, on the axes step, tick and epoch.

The emitter adds the envelope (run id, attempt, sequence number, rank, schema version, wall-clock time). Events whose
class sets ``priority`` (refusals, vetoes, faults) are written at every telemetry level and flushed at once. The
``critical`` ones among them (fault, panic, rollback, fallback of a seed) are never dropped.
"""

from esper.leyline.events.base import READABLE, SCHEMA_VERSION, Event
from esper.leyline.events.growth import (
    BirthVetoed,
    CommandJudged,
    CommandRefused,
    ContributionMeasured,
    GateJudged,
    LibraryUsed,
    RampCommitted,
    SeedBorn,
    SeedContinued,
    SlotDegraded,
    StageChanged,
)
from esper.leyline.events.health import Ailment, HealthAlert, LossSettled
from esper.leyline.events.kernels import KernelsCompiled, Rewrapped
from esper.leyline.events.learning import PolicyAlarm, PolicySaved, PolicySymptom, PolicyUpdated
from esper.leyline.events.orders import OrdersRefused, OrderTaken
from esper.leyline.events.recovery import BreakerChanged, LossShifted, Panic, RolledBack, SnapshotTaken
from esper.leyline.events.run import (
    CheckpointSaved,
    EarlyStopped,
    Fault,
    RateCut,
    RunEnded,
    RunExtended,
    RunStarted,
    SettingsChanged,
    SlotLine,
    StepSkipped,
    TickDone,
)
from esper.leyline.events.table import EVENTS
from esper.leyline.events.worth import FossilHurts, WorthMeasured

__all__ = [
    "EVENTS",
    "READABLE",
    "SCHEMA_VERSION",
    "Ailment",
    "BirthVetoed",
    "BreakerChanged",
    "CheckpointSaved",
    "CommandJudged",
    "CommandRefused",
    "ContributionMeasured",
    "EarlyStopped",
    "Event",
    "Fault",
    "FossilHurts",
    "GateJudged",
    "HealthAlert",
    "KernelsCompiled",
    "LibraryUsed",
    "LossSettled",
    "LossShifted",
    "OrderTaken",
    "OrdersRefused",
    "Panic",
    "PolicyAlarm",
    "PolicySaved",
    "PolicySymptom",
    "PolicyUpdated",
    "RampCommitted",
    "RateCut",
    "Rewrapped",
    "RolledBack",
    "RunEnded",
    "RunExtended",
    "RunStarted",
    "SeedBorn",
    "SeedContinued",
    "SettingsChanged",
    "SlotDegraded",
    "SlotLine",
    "SnapshotTaken",
    "StageChanged",
    "StepSkipped",
    "TickDone",
    "WorthMeasured",
]
