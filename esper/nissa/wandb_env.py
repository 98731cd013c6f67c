"""wandb's own variables: obeyed where the config says nothing, and named where the config says something else.

    WANDB_MODE, _PROJECT, _NAME, _TAGS, _RUN_GROUP, _JOB_TYPE    stand in for a setting of ``telemetry.wandb``
    WANDB_DIR                                                    folder of wandb's files; without it RUN
    WANDB_RUN_ID, WANDB_RESUME                                   overruled: a run's attempts share the run's own id

A setting that is null or empty says nothing. wandb reads all other variables itself, WANDB_ENTITY among them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from esper.nissa.config import WandbConfig, WandbMode

_MODES = {
    "online": WandbMode.ONLINE,
    "run": WandbMode.ONLINE,
    "offline": WandbMode.OFFLINE,
    "dryrun": WandbMode.OFFLINE,
    "disabled": WandbMode.DISABLED,
}


@dataclass(frozen=True, slots=True)
class WandbChoice:
    """What wandb is started with.

    Fields:
        mode: the mode.
        project: project.
        name: display name.
        group: group, or None for wandb's own choice.
        job_type: kind of run, or None for wandb's own choice.
        tags: labels.
        dir: folder in which wandb makes its folder ``wandb``.
        notes: one line for each variable that is set and not obeyed.
    """

    mode: WandbMode
    project: str
    name: str
    group: str | None
    job_type: str | None
    tags: tuple[str, ...]
    dir: str
    notes: tuple[str, ...]


def choose_wandb(
    config: WandbConfig,
    *,
    run_dir: str,
    run_id: str,
    name: str,
    group: str | None,
    job_type: str = "train",
    environ: Mapping[str, str] = os.environ,
) -> WandbChoice:
    """Joins the settings with wandb's variables.

    Args:
        config: the settings; they come first.
        run_dir: RUN.
        run_id: the run's id.
        name: display name, where ``config.name`` is null.
        group: group of a sweep, where ``config.group`` is null.
        job_type: kind of run, where ``config.job_type`` is null.
        environ: the variables.
    """
    notes: list[str] = []

    def given(variable: str) -> str | None:
        return environ.get(variable) or None

    def choose(setting: str, value: str | None, variable: str) -> str | None:
        theirs = given(variable)
        if value is not None and theirs is not None and theirs != value:
            notes.append(f"{variable}={theirs} is overruled by telemetry.wandb.{setting}={value}")
        return theirs if value is None else value

    mode, wanted = config.mode, given("WANDB_MODE")
    theirs = None if wanted is None else _MODES.get(wanted.lower())
    if wanted is not None and theirs is None:
        here = WandbMode.OFFLINE if mode is None else mode
        notes.append(f"WANDB_MODE={wanted}: not one of {', '.join(_MODES)}; wandb is {here.value}")
    elif wanted is not None and mode is not None and theirs is not mode:
        notes.append(f"WANDB_MODE={wanted} is overruled by telemetry.wandb.mode={mode.value}")
    mode = mode or theirs or WandbMode.OFFLINE
    if mode is WandbMode.DISABLED:
        return WandbChoice(mode, "", "", None, None, (), run_dir, tuple(notes))
    own_tags = ",".join(config.tags) or None
    tags = choose("tags", own_tags, "WANDB_TAGS")
    for variable in ("WANDB_RUN_ID", "WANDB_RESUME"):
        if given(variable) is not None:
            notes.append(f"{variable}={given(variable)} is overruled: the attempts of a run share its id, {run_id}")
    return WandbChoice(
        mode=mode,
        project=choose("project", config.project, "WANDB_PROJECT") or "esper",
        name=choose("name", config.name, "WANDB_NAME") or name,
        group=choose("group", config.group or group, "WANDB_RUN_GROUP"),
        job_type=choose("job_type", config.job_type, "WANDB_JOB_TYPE") or job_type,
        tags=tuple(tag for tag in (tags or "").split(",") if tag),
        dir=given("WANDB_DIR") or run_dir,
        notes=tuple(notes),
    )
