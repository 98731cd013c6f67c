"""``esper export RUN``: the network of one checkpoint of a run, rebuilt on the CPU and written as plain files.

No process group and no training data but an example of the input: the host from the run's config, a seed for every slot
that the checkpoint's record gives one, then every weight, phase and alpha.
"""

import sys
from pathlib import Path

from esper.config.tree import build_config, load_config
from esper.kasmina.blueprints import registry
from esper.kasmina.export.exporter import export
from esper.kasmina.export.record import Way
from esper.kasmina.export.writing import save_exported
from esper.leyline.errors import CheckpointError
from esper.run.directory import find_run
from esper.run.rebuild import rebuild_run
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data import load_data


def choose_step(store: CheckpointStore, at: int | None) -> int:
    """Step to export: ``at``, or the one that validation chose; a damaged one is passed over with a line on stderr.

    Raises:
        CheckpointError: there is none, it is damaged, or no checkpoint was scored.
    """
    steps = ", ".join(map(str, sorted(store.steps()))) or "none"
    if at is not None:
        if at not in store.steps():
            raise CheckpointError(f"--at {at}: no checkpoint of that step in {store.folder}; there are {steps}")
        store.verify(at, ("state.pt",))
        return at
    for step in store.ranked():
        try:
            store.verify(step, ("state.pt",))
        except CheckpointError as error:
            print(f"esper: passed over a damaged checkpoint: {error}", file=sys.stderr)
            continue
        return step
    raise CheckpointError(
        f"{store.folder}: no valid checkpoint with a validation score (there are {steps}); name one by --at STEP"
    )


def export_run(run: Path, at: int | None, to: Path | None, *, fold: bool, partial: bool) -> str:
    """Writes the network of a run as a plain model; returns what to tell.

    Args:
        run: run directory. at: step of a checkpoint; None: the one that validation chose.
        to: a new folder; None: ``export-STEP`` in the run directory.
        fold, partial: see `esper.kasmina.export.exporter.export`.

    Raises:
        EsperError: it cannot be done.
    """
    files = find_run(run)
    _, plain = load_config(files.config)
    config = build_config(plain)
    registry.load_plugins()
    store = CheckpointStore.of_run(run)
    step = choose_step(store, at)
    grown, state, run_id = rebuild_run(config, load_data(config.data), store, step)
    exported = export(grown, fold=fold, partial=partial)
    seeds = {
        entry.slot: {"blueprint": entry.blueprint, "stage": entry.stage.name, "generation": entry.generation}
        for entry in state.slots
        if entry.stage.has_seed
    }
    about = {"run_id": run_id, "step": step, "tick": state.tick, "host": plain["host"], "seeds": seeds}
    folder = save_exported(exported, to or files.export(step), about)
    lines = [f"esper: step {step} of {run} as a plain model in {folder}"]
    for slot in exported.slots:
        where = f" {'into' if slot.way is Way.FOLDED else 'in'} {slot.where}" if slot.where else ""
        lines.append(f"  {slot.slot}  {seeds[slot.slot]['blueprint']}  {slot.way.value}{where}")
    return "\n".join(lines)
