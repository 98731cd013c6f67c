"""One event of every class, with values that tell fields apart."""

from esper.leyline.alpha import Curve
from esper.leyline.breaker import BreakerPhase
from esper.leyline.commands import Command
from esper.leyline.events import (
    Ailment,
    BirthVetoed,
    BreakerChanged,
    CheckpointSaved,
    CommandJudged,
    CommandRefused,
    ContributionMeasured,
    EarlyStopped,
    Fault,
    FossilHurts,
    GateJudged,
    HealthAlert,
    KernelsCompiled,
    LibraryUsed,
    LossSettled,
    LossShifted,
    OrdersRefused,
    OrderTaken,
    Panic,
    PolicyAlarm,
    PolicySaved,
    PolicySymptom,
    PolicyUpdated,
    RampCommitted,
    RateCut,
    Rewrapped,
    RolledBack,
    RunEnded,
    RunExtended,
    RunStarted,
    SeedBorn,
    SeedContinued,
    SettingsChanged,
    SlotDegraded,
    SlotLine,
    SnapshotTaken,
    StageChanged,
    StepSkipped,
    TickDone,
    WorthMeasured,
)
from esper.leyline.evidence import (
    ABSENT,
    NO_HEALTH,
    Check,
    GateResult,
    GradientHealth,
    Reading,
    SeedWorth,
    Status,
    measured,
)
from esper.leyline.stages import Gate, Op, Stage

PROBE = "1024 samples in 1024 clusters: 7 looks of 128 a life, 1 in reserve"
SLOTS = ("r0c0", "r0c1")


def axes(tick, every=10):
    return {"step": tick * every, "tick": tick, "epoch": tick // 5}


def health(tick, **counts):
    return GradientHealth(
        vanishing=measured(0.5 / tick, tick=tick, n=3), exploding=measured(0.125, tick=tick, n=3), **counts
    )


def slot_line(slot, tick, stage=Stage.TRAINING):
    contribution = measured(0.01 * tick, tick=tick, n=256, se=0.004) if tick % 2 == 0 else ABSENT
    return SlotLine(
        slot=slot,
        stage=stage,
        alpha=1.0 if stage is Stage.FOSSILIZED else tick / 100 if stage.has_seed else 0.0,
        effective_alpha=measured(tick / 200, tick=tick, n=20, se=0.001) if stage is Stage.BLENDING else ABSENT,
        gate_mean=measured(0.5, tick=tick, n=20, se=0.01) if stage is Stage.BLENDING else ABSENT,
        gate_std=measured(0.04, tick=tick, n=20) if stage is Stage.BLENDING else ABSENT,
        blueprint="conv_light" if stage.has_seed else None,
        contribution=contribution if stage.has_seed else ABSENT,
        gradient_norm=measured(0.5 + tick, tick=tick, n=10) if stage.has_seed else ABSENT,
        gradient_ratio=measured(0.25, tick=tick, n=10) if stage.has_seed else ABSENT,
        gradient_parity=measured(0.5, tick=tick, n=10) if stage.has_seed else ABSENT,
        health=health(tick, nans=3) if stage.has_seed else NO_HEALTH,
    )


def tick_done(tick, stage=Stage.TRAINING):
    return TickDone(
        **axes(tick),
        train_loss=measured(2.0 / tick, tick=tick, n=640),
        train_accuracy=measured(1.0 - 0.5 / tick, tick=tick, n=640),
        validation_loss=measured(2.5 / tick, tick=tick, n=300, se=0.02),
        validation_accuracy=Reading(status=Status.STALE, value=0.5, se=0.03, n=300, tick=tick - 1),
        lr=1e-3 / tick,
        host_gradient_norm=measured(1.5, tick=tick, n=10),
        host_health=health(tick, infs=2),
        slots=(slot_line("r0c0", tick, stage), slot_line("r0c1", tick, Stage.EMPTY)),
        parameters=1000 + tick,
        live_seeds=1,
        flops=1_000_000,
        interval_flops=1_000,
        samples=320,
        data_ms=0.25,
        own_ms=5.0,
        steps_ms=12.5,
        tick_ms=1.25,
        digest_ms=0.5,
    )


def run_started(step=0, resumed_from=None, uncounted=()):
    return RunStarted(
        step=step,
        tick=step // 10,
        epoch=0,
        world_size=2,
        resumed_from=resumed_from,
        parameters=1000,
        total_steps=300,
        slots=SLOTS,
        uncounted=uncounted,
        probe=PROBE,
        copies="",
    )


def stage_changed(tick, source, target, slot="r0c0"):
    return StageChanged(
        **axes(tick),
        slot=slot,
        source=source,
        target=target,
        cause="ADVANCE",
        generation=1,
        blueprint="conv_light",
        proposal=7,
    )


def refused(tick, reason="dwell is 0 of 1 ticks"):
    command = Command(slot="r0c0", op=Op.ADVANCE, curve=Curve.SIGMOID, reason="try", proposal=8)
    return CommandRefused(**axes(tick), command=command, applied=False, reason=reason)


def fault(tick, what="rank 1 is gone"):
    return Fault(**axes(tick), what=what, where="lockstep")


GATE = GateResult(
    gate=Gate.G2,
    passed=False,
    score=0.5,
    checks=(
        Check(name="finite", passed=True, detail="yes", integrity=True),
        Check(name="contribution", passed=False, detail="0.001 ± 0.004", integrity=False),
    ),
)

SAMPLES = (
    run_started(),
    run_started(step=120, resumed_from=120),
    tick_done(4),
    CommandJudged(**axes(4), command=Command(slot="r0c1", op=Op.GERMINATE, blueprint="norm"), applied=True, reason=""),
    refused(4),
    GateJudged(**axes(4), slot="r0c0", enforced=True, result=GATE),
    stage_changed(4, Stage.TRAINING, Stage.BLENDING),
    RampCommitted(
        **axes(4),
        slot="r0c0",
        start=0.0,
        target=1.0,
        first_step=40,
        last_step=80,
        curve="COSINE",
        operator="GATE",
        fades_from="ADD",
    ),
    ContributionMeasured(
        **axes(5),
        slot="r0c0",
        stage=Stage.HOLDING,
        look=2,
        alpha=1.0,
        contribution=measured(0.02, tick=5, n=256, se=0.005),
        running=measured(0.021, tick=5, n=512, se=0.0035),
        log_evidence=5.5,
        chance=0.0073,
        clusters=512,
        refill=True,
        counts=True,
    ),
    WorthMeasured(
        **axes(5),
        slot="r0c0",
        blueprint="conv_light",
        worth=SeedWorth(solo=measured(0.03, tick=5, n=128, se=0.004), shapley=measured(0.02, tick=5, n=128, se=0.004)),
        together=measured(0.05, tick=5, n=128, se=0.006),
    ),
    FossilHurts(
        **axes(5),
        slot="r0c0",
        blueprint="mlp",
        running=measured(-0.02, tick=5, n=256, se=0.004),
        chance=0.05,
        clusters=256,
    ),
    SeedContinued(**axes(5), slot="r0c0", number=1, first=0.02, last=0.018, expected=0.0078, lower=0.0051, ahead=660),
    Rewrapped(**axes(5), cause="birth in r0c0", parameters=1100, wrap_ms=3.5),
    CheckpointSaved(**axes(5), saved_step=50, path="checkpoints/step-50", bytes=4096, save_ms=7.5, stall_ms=0.5),
    LibraryUsed(
        **axes(6),
        births=7,
        memory_hits=1,
        memory_misses=6,
        disk_hits=2,
        built=3,
        failed=4,
        evicted=5,
        entries=8,
        bytes=9,
        oldest_ticks=10,
        waited_ms=0.5,
    ),
    KernelsCompiled(**axes(6), where="r0c1", compile_ms=2100.5, hits=5, misses=1),
    SeedBorn(**axes(6), slot="r0c1", blueprint="norm", generation=2, proposal=9, parameters=16, flops=640),
    BirthVetoed(**axes(6), slot="r0c1", blueprint="norm", rank=1, reason="out of memory", proposal=9),
    SlotDegraded(**axes(6), slot="r0c0", blueprint="norm", ranks=1, reason="recompile limit", pruned=False),
    StepSkipped(**axes(6), count=2, ranks=(1,), first_step=55),
    fault(6),
    SnapshotTaken(**axes(6), bytes=4096, copy_ms=0.25),
    SettingsChanged(**axes(6), key="governor.rise", before=0.1, after=0.3),
    EarlyStopped(**axes(6), metric="validation_loss", best=0.5, ticks=3),
    RateCut(**axes(6), metric="validation_loss", lr=0.001),
    RunExtended(**axes(6), before=100, after=200, schedule="cosine", lr_before=0.001, lr_after=0.0055),
    LossShifted(**axes(6), words="training loss 2, out of line for 3 ticks and at rest; it had been 1"),
    Panic(**axes(7), symptom="DIVERGENCE", words="training loss 9 against 1", healthy_step=50),
    RolledBack(
        **axes(7),
        to_step=40,
        to_tick=4,
        source="ram",
        replay=2,
        blamed=("r0c1",),
        blamed_ticks=(3,),
        skipped_from=50,
        skipped_steps=20,
        recovery_ms=12.5,
        budget_ms=500.0,
    ),
    PolicyUpdated(**axes(3), numbers={"losses/entropy": 0.5, "heads/op/share": 1.0}, collect_ms=12.5, update_ms=3.25),
    PolicyAlarm(**axes(3), symptom=PolicySymptom.DEAD_HEAD, head="tempo", value=0.0, limit=1e-4, updates=5),
    PolicySaved(**axes(3), path="update-00000003"),
    HealthAlert(
        **axes(7),
        ailment=Ailment.STRAGGLER,
        rank=1,
        value=2.5,
        limit=1.5,
        words="rank 1 worked 25 ms, the ranks' median is 10 ms",
        look_at="that rank's machine",
    ),
    LossSettled(**axes(7), slot="r0c0", blueprint="mlp", after="birth", height=0.25, recovery=20),
    BreakerChanged(
        **axes(7),
        source=BreakerPhase.ALLOWED,
        target=BreakerPhase.COOLING,
        ticks_left=20,
        reason="blamed",
        manual=False,
    ),
    OrderTaken(
        **axes(7),
        number=1,
        sender="ana@host",
        words="germinate r0c0 conv_light",
        slot="r0c0",
        applied=True,
        reason="staged",
        why="to see it",
        again=False,
    ),
    OrdersRefused(**axes(7), refusal="forged", count=3, total=8, words="its signature is not by this run's key"),
    RunEnded(**axes(7), status="done", summary={"accuracy": 0.9, "grown": ["r0c0"], "nested": {"a": None}}),
)
