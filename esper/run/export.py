"""``esper export RUN``: the network of one checkpoint of a run, rebuilt on the CPU and written as plain files.

It needs no process group, and no training data except an example of the input. It builds the host from the run's
config and a seed for every slot that has one in the checkpoint's record, then loads every weight, phase and alpha.
"""

import shlex
import sys
from pathlib import Path

from esper.config.tree import load_config
from esper.kasmina.blueprints import registry
from esper.kasmina.export.exporter import export
from esper.kasmina.export.native import native, save_native
from esper.kasmina.export.record import Way
from esper.kasmina.export.writing import save_exported
from esper.leyline.errors import CheckpointError, EsperError, one_line
from esper.nissa.wandb_artifacts import log_model
from esper.run.directory import find_run
from esper.run.rebuild import rebuild_run
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data import load_data


def choose_step(store: CheckpointStore, at: int | None) -> int:
    """Chooses the step to export: ``at``, or the step with the best validation score.

    A damaged checkpoint is skipped with a line on stderr.

    Raises:
        CheckpointError: there is no checkpoint of step ``at``, it is damaged, or no valid checkpoint has a score.
    """
    steps = ", ".join(map(str, sorted(store.steps()))) or "none"
    if at is not None:
        if at not in store.steps():
            raise CheckpointError(f"--at {at}: no checkpoint of that step in {store.folder}; there are {steps}")
        store.verify(at, ("state.pt",))
        return at
    for step in store.rank_steps():
        try:
            store.verify(step, ("state.pt",))
        except CheckpointError as error:
            print(f"esper: passed over a damaged checkpoint: {error}", file=sys.stderr)
            continue
        return step
    raise CheckpointError(
        f"{store.folder}: no valid checkpoint with a validation score (there are {steps}); name one by --at STEP"
    )


def export_run(
    run: Path,
    at: int | None,
    to: Path | None,
    *,
    fold: bool,
    partial: bool,
    averaged: bool = False,
    trusted: bool = False,
    as_native: bool = False,
    to_wandb: bool = False,
) -> str:
    """Writes the network of a run as a plain model; returns lines that describe it.

    Args:
        run: run directory.
        at: step of a checkpoint; None for the one that validation chose.
        to: a new folder; None for ``export-STEP`` (of an average ``export-STEP-ema``) in the run directory.
        fold: whether to fold seeds into weights, see `esper.kasmina.export.exporter.export`.
        partial: whether to export seeds with an alpha between 0 and 1, see there.
        averaged: whether to export the average of the weights, see `esper.tolaria.lockstep.ema`.
        as_native: whether to write the host's own class with more blocks, see `esper.kasmina.export.native`.
        trusted: whether the run may name code even if its config.yaml is not the caller's own.
        to_wandb: whether wandb gets the model too, as an artifact that says which checkpoint it was made from.

    Raises:
        EsperError: the run cannot be exported.
    """
    files = find_run(run)
    again = shlex.join(["esper", "export", str(run), "--trust"])
    config, plain = load_config(files.config, trusted=trusted, instead=f"type {again}")
    registry.load_plugins()
    store = CheckpointStore.of_run(run)
    step = choose_step(store, at)
    grown, state, run_id = rebuild_run(config, load_data(config.data), store, step, averaged=averaged)
    seeds = {
        entry.slot: {"blueprint": entry.blueprint, "stage": entry.stage.name, "generation": entry.generation}
        for entry in state.slots
        if entry.stage.has_seed
    }
    about = {"run_id": run_id, "step": step, "tick": state.tick, "host": plain["host"], "seeds": seeds}
    place, what = files.export(step), f"step {step} of {run}"
    if averaged:
        place, what = place.with_name(f"{place.name}-ema"), f"the average of the weights at {what}"
        about["ema"] = config.trainer.ema
    if as_native:
        place = place.with_name(f"{place.name}-native")
        made = native(grown)
        folder = save_native(made, to or place, about)
        lines = [f"esper: {what} as a native model in {folder}"]
        lines += [f"  {slot}  copy  {made.blocks}.{index}" for slot, index in made.places.items()]
    else:
        exported = export(grown, fold=fold, partial=partial)
        folder = save_exported(exported, to or place, about)
        lines = [f"esper: {what} as a plain model in {folder}"]
        for slot in exported.slots:
            where = f" {'into' if slot.way is Way.FOLDED else 'in'} {slot.where}" if slot.where else ""
            lines.append(f"  {slot.slot}  {seeds[slot.slot]['blueprint']}  {slot.way.value}{where}")
    if to_wandb:
        try:
            lines.append(f"esper: {log_model(config.telemetry.wandb, run, run_id, step, folder)}")
        except Exception as error:  # wandb has errors of its own, and the model is written
            raise EsperError(f"{folder} is written, but wandb did not take it: {one_line(error)}") from None
    return "\n".join(lines)
