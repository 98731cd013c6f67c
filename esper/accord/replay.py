"""The replay after a panic: a pure function of what all ranks agree on.

    replay   (state that panicked, cleared state restored) -> the state to go on from, which differs from the restored

A replay must differ, or it would end where the first run did. The newest change (birth, stage, ramp) among the seeds
that reach the host is blamed: its seed is pruned and its slot barred. An incubating seed cannot be the cause, since the
host computes and learns as if it were not there, bit for bit. If there is nothing to blame, the samples between the
last healthy tick and the panic are skipped. Each further replay without a recovery reaches further: one more change is
blamed, samples are skipped as well and twice as many each time, and the restored generation is one older.
"""

from dataclasses import dataclass, replace

from esper.accord.breaker import after_blame
from esper.accord.changes import Changes
from esper.accord.effects import Outcome
from esper.accord.governor.config import GovernorConfig
from esper.accord.health import Skip
from esper.accord.lifecycle import SlotState
from esper.accord.orders.steering import after_rollback
from esper.accord.state import RunState, Terms
from esper.accord.verdict import Symptom, Verdict
from esper.leyline.stages import Mechanical, Stage


@dataclass(frozen=True, slots=True)
class Replay:
    """The differences between a replay and the run before it.

    Fields:
        outcome: the state to go on from, effects on the restored model, and events on the axes of the restored state.
        blamed: records of the blamed slots at the panic.
        skip: window of samples that is left out, or None.
    """

    outcome: Outcome
    blamed: tuple[SlotState, ...]
    skip: Skip | None


def find_suspects(present: RunState, target: RunState, config: GovernorConfig) -> list[SlotState]:
    """Returns the records at the panic that may be to blame, the newest change first.

    Args:
        present: the state that panicked.
        target: the restored state; seeds that are fossils there are never blamed.
        config: settings of the governor.
    """
    oldest = present.governor.healthy_tick - config.blame_ticks
    suspects = [
        entry
        for entry in present.slots
        if entry.stage.is_blended and entry.changed_tick > oldest and not _is_fossil(target.slot(entry.slot), entry)
    ]
    return sorted(suspects, key=lambda entry: (-entry.changed_tick, entry.slot))


def _is_fossil(before: SlotState, entry: SlotState) -> bool:
    return before.stage is Stage.FOSSILIZED and before.generation == entry.generation


def replay(present: RunState, target: RunState, terms: Terms, config: GovernorConfig) -> Replay:
    """Decides how training goes on from a restored generation so that it does not end in the same panic.

    Args:
        present: the state that panicked.
        target: the state of the restored generation.
        terms: terms of the run.
        config: settings of the governor.
    """
    trouble = present.governor
    number = trouble.replays + 1
    blamed = tuple(find_suspects(present, target, config)[:number])
    skip = None
    if not blamed or number > 1:
        window = present.step - trouble.healthy_step
        skip = Skip(first_step=trouble.healthy_step, count=window * 2 ** (number - 1))
    breaker = trouble.breaker
    if blamed:
        names = ", ".join(f"{entry.slot} ({entry.blueprint})" for entry in blamed)
        breaker = after_blame(breaker, target.tick, config, f"{trouble.symptom.name} blamed on {names}")
    barred = {**trouble.barred, **{entry.slot: target.tick + config.embargo_ticks for entry in blamed}}
    governor = replace(
        target.governor,
        verdict=Verdict.HEALTHY,
        symptom=Symptom.NONE,
        words="",
        strikes=0,
        replays=number,
        trouble_tick=max(present.tick, trouble.trouble_tick),
        barred=barred,
        breaker=breaker,
        skips=trouble.skips if skip is None else (*trouble.skips, skip),
    )
    # The accounts of samples, FLOPs and births are not rolled back, and proposal ids stay unique.
    changes = Changes(
        replace(
            target,
            governor=governor,
            steering=after_rollback(
                present.steering,
                target.steering,
                tuple(entry.slot for entry in blamed),
                target.tick + 1,
                present.tick,
            ),
            continuing=None,  # begun anew where it is still due
            samples=present.samples,
            flops=present.flops,
            proposals=present.proposals,
            births=present.births,
        ),
        terms,
    )
    for entry in blamed:
        before = target.slot(entry.slot)
        if before.staged is not None:
            changes.put(replace(before, staged=None))
            changes.discard(before)
        elif before.stage.is_live and before.generation == entry.generation:
            changes.move(before, Mechanical.ROLLBACK, Stage.PRUNED)
    return Replay(changes.outcome, blamed, skip)
