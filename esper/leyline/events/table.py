"""The table of event kinds, for reading an event file back."""

from esper.leyline.events.base import Event
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
from esper.leyline.events.health import HealthAlert, LossSettled
from esper.leyline.events.kernels import KernelsCompiled, Rewrapped
from esper.leyline.events.learning import PolicyAlarm, PolicySaved, PolicyUpdated
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
    StepSkipped,
    TickDone,
)
from esper.leyline.events.worth import FossilHurts, WorthMeasured

EVENTS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        RunStarted,
        SettingsChanged,
        RunExtended,
        EarlyStopped,
        RateCut,
        RunEnded,
        TickDone,
        CommandJudged,
        CommandRefused,
        GateJudged,
        StageChanged,
        RampCommitted,
        ContributionMeasured,
        FossilHurts,
        WorthMeasured,
        SeedContinued,
        Rewrapped,
        CheckpointSaved,
        SeedBorn,
        BirthVetoed,
        LibraryUsed,
        KernelsCompiled,
        SlotDegraded,
        StepSkipped,
        SnapshotTaken,
        Panic,
        LossShifted,
        RolledBack,
        BreakerChanged,
        OrderTaken,
        OrdersRefused,
        HealthAlert,
        LossSettled,
        PolicyUpdated,
        PolicyAlarm,
        PolicySaved,
        Fault,
    )
}
_all_kinds = {cls.kind for cls in (*Event.__subclasses__(), *CommandJudged.__subclasses__())}
if set(EVENTS) != _all_kinds:
    raise AssertionError(f"events without a row in the table: {_all_kinds ^ set(EVENTS)}")
