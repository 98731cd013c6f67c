"""Checkpoints and exported models as wandb's artifacts, so that its graph shows what was made from what.

    training run --> checkpoint-<run id>:step-N --> export run --> model-<run id>:step-N

A checkpoint is a reference by default: name, step, size and place, and no byte of it is copied or sent. Old ones are
deleted by the run (`checkpoint.keep`); their references stay. wandb cannot look an artifact up without its server, so
offline a model says in its metadata which checkpoint it was made from.
"""

from pathlib import Path
from typing import Any

from esper.leyline.events import CheckpointSaved
from esper.nissa.config import ArtifactMode, WandbConfig, WandbMode
from esper.nissa.wandb_env import choose_wandb
from esper.nissa.wandb_start import start_wandb


def checkpoint_name(run_id: str) -> str:
    """Name of the artifact that holds a run's checkpoints; each step is a version of it."""
    return f"checkpoint-{run_id}"


def log_checkpoint(run: Any, run_id: str, run_dir: Path, event: CheckpointSaved, mode: ArtifactMode) -> None:
    """Logs a checkpoint as an artifact.

    Args:
        run: wandb's run.
        run_id: the run's id.
        run_dir: RUN.
        event: of the save.
        mode: reference or upload.

    Raises:
        Exception: whatever wandb or the disk say, as where an old checkpoint is gone already.
    """
    import wandb  # already loaded

    folder = (run_dir / event.path).absolute()
    about = {"run_id": run_id, "step": event.saved_step, "tick": event.tick, "bytes": event.bytes}
    artifact = wandb.Artifact(checkpoint_name(run_id), type="checkpoint", metadata={**about, "folder": str(folder)})
    if mode is ArtifactMode.UPLOAD:
        artifact.add_dir(str(folder))
    else:
        artifact.add_reference(folder.as_uri(), name=folder.name, checksum=False)
    run.log_artifact(artifact, aliases=["latest", f"step-{event.saved_step}"])


def log_model(config: WandbConfig, run_dir: Path, run_id: str, step: int, folder: Path) -> str:
    """Logs an exported model, in a wandb run of its own beside the run that trained it; returns a line about it.

    Args:
        config: the run's settings of wandb.
        run_dir: RUN.
        run_id: the run's id.
        step: of the checkpoint that it was made from.
        folder: the exported model.

    Raises:
        Exception: whatever wandb says; the model itself is written.
    """
    choice = choose_wandb(
        config, run_dir=str(run_dir), run_id=run_id, name=f"export {run_id}", group=run_id, job_type="export"
    )
    if choice.mode is WandbMode.DISABLED:
        return "wandb is disabled in this run, so it does not hear of the model"
    source = f"{checkpoint_name(run_id)}:step-{step}"
    run = start_wandb(choice, f"{run_id}-export-{step}", {"made_from": source, "run_id": run_id})
    import wandb

    if choice.mode is WandbMode.ONLINE:
        run.use_artifact(source)
    artifact = wandb.Artifact(f"model-{run_id}", type="model", metadata={"made_from": source, "step": step})
    artifact.add_dir(str(folder))
    run.log_artifact(artifact, aliases=["latest", f"step-{step}"])
    run.finish()
    return f"wandb: model-{run_id}, made from {source} ({choice.mode.value})"
