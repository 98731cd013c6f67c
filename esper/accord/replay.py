""""""

from dataclasses import dataclass, replace

from esper.accord.breaker import after_blame
from esper.accord.changes import Changes
from esper.accord.config import GovernorConfig
from esper.accord.effects import Outcome
from esper.accord.health import Skip
from esper.accord.lifecycle import SlotState
from esper.accord.state import RunState, Terms
from esper.accord.verdict import Symptom, Verdict
from esper.leyline.stages import Mechanical, Stage


@dataclass(frozen=True, slots=True)
class Replay:
    """What a replay does otherwise. ``outcome``: the state to go on from, effects on the model that was gone back to,
    events on its axes. ``blamed``: records of blamed slots at the panic. ``skip``: samples left out."""

    outcome: Outcome
    blamed: tuple[SlotState, ...]
    skip: Skip | None


def suspects(present: RunState, target: RunState, config: GovernorConfig) -> list[SlotState]:
    """Records at the panic that may be to blame, the newest change first.

    Args:
        present: the state that panicked. target: the one gone back to, where a fossil stays what it is.
    """
    oldest = present.governor.healthy_tick - config.blame_ticks
    found = [
        entry
        for entry in present.slots
        if entry.stage.is_blended and entry.changed_tick > oldest and not _is_fossil(target.slot(entry.slot), entry)
    ]
    return sorted(found, key=lambda entry: (-entry.changed_tick, entry.slot))


def _is_fossil(before: SlotState, entry: SlotState) -> bool:
    return before.stage is Stage.FOSSILIZED and before.generation == entry.generation


def replay(present: RunState, target: RunState, terms: Terms, config: GovernorConfig) -> Replay:
    """How training goes on from a generation so that it does not end as it did.

    Args:
        present: the state that panicked. target: the generation gone back to. terms, config: of the run.
    """
    trouble = present.governor
    number = trouble.replays + 1
    blamed = tuple(suspects(present, target, config)[:number])
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
    # What was spent stays spent, and ids stay unique.
    changes = Changes(
        replace(target, governor=governor, samples=present.samples, flops=present.flops, proposals=present.proposals),
        terms,
    )
    for entry in blamed:
        before = target.slot(entry.slot)
        if before.staged is not None:
            changes.put(replace(before, staged=None))
            changes.discard(before)
        elif before.stage.is_live and before.generation == entry.generation:
            changes.move(before, Mechanical.ROLLBACK, Stage.PRUNED)
    return Replay(changes.out, blamed, skip)
