"""Starts wandb and, where its service died or hangs, ends it."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from esper.nissa.wandb_env import WandbChoice


def start_wandb(
    choice: WandbChoice,
    run_id: str,
    config_dict: Mapping[str, Any],
    *,
    init_timeout_s: float = 60.0,
    finish_timeout_s: float = 60.0,
    on_stop: Callable[[], None] | None = None,
) -> Any:
    """Starts a run of wandb and returns it.

    Args:
        choice: mode, names and folder.
        run_id: wandb's id.
        config_dict: the resolved configuration as plain data.
        init_timeout_s: seconds after which starting is an error.
        finish_timeout_s: seconds after which ending is one.
        on_stop: called once, on a thread of wandb's, when somebody stops the run in wandb's page. Without it wandb
            sends this process a SIGINT.

    Raises:
        Exception: the network, the key, the disk, or the import fails.
    """
    import wandb  # here, since it takes half a second, and if it is broken the run goes on without it

    values: dict[str, Any] = {
        "init_timeout": init_timeout_s,
        "finish_timeout": finish_timeout_s,  # otherwise `finish` waits for a dead network for ever
        "console": "off",
        "silent": True,
        "x_transaction_log_flush_interval": 2.0,  # instead of 15 s: a SIGKILL loses what is not flushed
        "stop_fn": on_stop,
    }
    known = wandb.Settings.model_fields  # releases differ, and an unknown setting is an error
    settings = wandb.Settings(**{name: value for name, value in values.items() if name in known and value is not None})
    quiet = wandb.Settings(silent=True, login_timeout=1)  # on a terminal without a key: fail instead of asking
    wandb.setup(quiet)
    run = wandb.init(
        id=run_id,
        resume="allow",
        project=choice.project,
        group=choice.group,
        job_type=choice.job_type,
        name=choice.name,
        tags=list(choice.tags),
        config=dict(config_dict),
        dir=choice.dir,
        mode=choice.mode.value,
        settings=settings,
    )
    run.define_metric("train/step", summary="none")
    run.define_metric("tick", summary="none")
    run.define_metric("*", step_metric="train/step", summary="none")  # the summary is ours: a few numbers
    return run


def abandon_wandb() -> None:
    """Ends a service that died or hangs; otherwise wandb waits for it, or complains, when the interpreter exits."""
    with contextlib.suppress(Exception):  # wandb has no public way to end a hung service, and its internals change
        from wandb.sdk import wandb_setup

        setup: Any = wandb_setup.singleton()
        setup._connection._proc._process.kill()
    with contextlib.suppress(Exception, SystemExit):  # teardown leaves the process with the service's exit code
        import wandb

        wandb.teardown()
