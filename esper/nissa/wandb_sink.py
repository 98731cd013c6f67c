"""wandb, from rank 0: a view of the run. Our own event files are the truth, and no outage of wandb stops training.

Every call into wandb after `wandb.init` is made on a thread of the sink's own, because a call to a wandb service that
hangs blocks its caller for ever. After its first failure the sink writes one line, emits one `Fault`, and then does
nothing any more. Values are reduced before they come here. ``step=`` is never passed: wandb drops a row whose step is
lower than the last, and every resume has such rows. The axes ``train/step`` and ``tick`` are logged as values instead.

Values logged at a tick:

    train/step, tick, epoch            axes: optimizer steps, control ticks, passes over the training part
    train/loss, train/accuracy         mean since the last tick (the task's unit, per sample; share)
    validation/loss, validation/accuracy                  accuracy where the task knows right and wrong
    train/<metric>, validation/<metric>                   the task's own
    lr, host_gradient_norm, parameters, live_seeds, training_flops
    host_gradient_vanishing, _exploding, _nans, _infs     shares of the host's parameters; tensors of its gradient
    time/steps_ms, time/tick_ms, time/digest_ms
    slots/<slot>/stage                 `Stage.code`: 0 EMPTY, 1 GERMINATED, 2 TRAINING, 3 BLENDING, 4 HOLDING, ...
    slots/<slot>/alpha
    slots/<slot>/effective_alpha       alpha times gate_mean, where the operator is gated
    slots/<slot>/gate_mean, gate_std   openness of the gate, over the training samples since the last tick
    slots/<slot>/contribution          paired loss without minus with the seed (nats; positive helps), with _se
    slots/<slot>/solo, leave_one_out, shapley             what the seed is worth (nats), with _se; with
                                       control.attribute_every alone
    all_seeds                          the same of all blended seeds together, with _se
    slots/<slot>/gradient_norm, gradient_ratio            the ratio is to the host's norm
    slots/<slot>/gradient_vanishing, _exploding, _nans, _infs

Values logged at an update of a policy: the axes (optimizer steps of the policy, steps of each environment, updates),
the numbers that docs/policy.md explains, time/collect_ms and time/update_ms.

A reading that is absent or stale is left out of the row, since it is neither zero nor of this tick. At the end the
table ``growth`` (the stage changes of this attempt) and the run's summary are logged.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from esper.leyline.events import Event, Fault, PolicyUpdated, RunEnded, StageChanged, TickDone
from esper.leyline.evidence import GradientHealth, Reading
from esper.leyline.plain import to_plain
from esper.nissa.config import WandbConfig, WandbMode
from esper.nissa.lane import Lane, say
from esper.nissa.wandb_env import WandbChoice, choose_wandb

GROWTH_COLUMNS = ("step", "tick", "slot", "from", "to", "cause", "blueprint")
_CLOSE = object()


def tick_row(event: TickDone) -> dict[str, float]:
    """Returns the values of one tick under their wandb names, as listed in the module."""
    row: dict[str, float] = {
        "train/step": event.step,
        "tick": event.tick,
        "epoch": event.epoch,
        "lr": event.lr,
        "parameters": event.parameters,
        "live_seeds": event.live_seeds,
        "time/steps_ms": event.steps_ms,
        "time/tick_ms": event.tick_ms,
        "time/digest_ms": event.digest_ms,
    }

    if event.flops is not None:
        row["training_flops"] = event.flops

    def add(name: str, reading: Reading, *, with_se: bool = False) -> None:
        if reading.is_measured and reading.value is not None:
            row[name] = reading.value
            if with_se and reading.se is not None:
                row[f"{name}_se"] = reading.se

    add("train/loss", event.train_loss)
    add("train/accuracy", event.train_accuracy)
    add("validation/loss", event.validation_loss)
    add("validation/accuracy", event.validation_accuracy)
    for name, reading in event.metrics.items():
        if reading.tick == event.tick:
            add(name.replace("_", "/", 1), reading)
    add("all_seeds", event.together, with_se=True)
    add("host_gradient_norm", event.host_gradient_norm)

    def add_health(name: str, health: GradientHealth) -> None:
        add(f"{name}_vanishing", health.vanishing)
        add(f"{name}_exploding", health.exploding)
        row[f"{name}_nans"], row[f"{name}_infs"] = health.nans, health.infs

    add_health("host_gradient", event.host_health)
    for line in event.slots:
        name = f"slots/{line.slot}"
        row[f"{name}/stage"] = line.stage.code
        row[f"{name}/alpha"] = line.alpha
        add(f"{name}/effective_alpha", line.effective_alpha)
        add(f"{name}/gate_mean", line.gate_mean)
        add(f"{name}/gate_std", line.gate_std)
        add(f"{name}/contribution", line.contribution, with_se=True)
        for kind in ("solo", "leave_one_out", "shapley"):
            add(f"{name}/{kind}", getattr(line.worth, kind), with_se=True)
        add(f"{name}/gradient_norm", line.gradient_norm)
        add(f"{name}/gradient_ratio", line.gradient_ratio)
        if line.stage.has_seed:
            add_health(f"{name}/gradient", line.health)
            add(f"{name}/moved", line.health.moved)
    return row


def update_row(event: PolicyUpdated) -> dict[str, float]:
    """Returns the values of one update of a policy under their wandb names: those of docs/policy.md, axes and times."""
    axes = {"train/step": event.step, "tick": event.tick, "epoch": event.epoch}
    return {**axes, **event.numbers, "time/collect_ms": event.collect_ms, "time/update_ms": event.update_ms}


_FLUSH_S = 5.0


class WandbSink:
    """Shows one run in wandb.

    Args:
        config: mode, project and names; see `esper.nissa.wandb_env` for wandb's own variables.
        run_dir: run directory; wandb's own files go to ``run_dir/wandb``, or below WANDB_DIR.
        run_id: wandb's id, the same in every attempt, so that a second attempt continues the run (offline it creates a
            second folder, which ``wandb sync`` merges).
        group: group of a sweep; ``config.group`` takes precedence.
        config_dict: the resolved configuration as plain data.
        on_fault: takes the one `Fault`, on the sink's thread, if wandb fails.
        init_timeout_s: seconds after which the sink gives up on wandb at the start.
        finish_timeout_s: seconds after which the sink gives up on wandb at the end.

    Attributes:
        dropped: ticks refused by a full queue.
    """

    def __init__(
        self,
        config: WandbConfig,
        *,
        run_dir: str | os.PathLike[str],
        run_id: str,
        group: str | None,
        config_dict: Mapping[str, Any],
        on_fault: Callable[[Fault], None],
        init_timeout_s: float = 60.0,
        finish_timeout_s: float = 60.0,
    ) -> None:
        self.dropped = 0
        self._on_fault, self._finish_timeout_s = on_fault, finish_timeout_s
        self._axes = (0, 0, 0)  # step, tick, epoch of the newest event
        self._growth: list[list[Any]] = []
        self._exit_code = 1  # until a RunEnded says otherwise
        self._lane: Lane[Any] | None = None
        self._run: Any = None
        self._once, self._failed = threading.Lock(), False
        choice = choose_wandb(config, run_dir=os.fspath(run_dir), run_id=run_id, group=group)
        for note in choice.notes:
            say(f"telemetry: {note}")
        if choice.mode is WandbMode.DISABLED:
            return
        hooks = sys.exit, sys.excepthook  # wandb replaces both to learn the exit code, which we pass to it
        try:
            self._run = _start(choice, run_id, config_dict, init_timeout_s, finish_timeout_s)
            self._lane = Lane("esper-wandb", self._write, capacity=4096)
        except Exception as error:  # network, key, disk, or an import that fails: a view must not stop a run
            self._fail(error)
        finally:
            sys.exit, sys.excepthook = hooks

    def emit(self, event: Event) -> None:
        """Takes one event; returns at once."""
        self._axes = (event.step, event.tick, event.epoch)
        if self._lane is None or not isinstance(event, TickDone | PolicyUpdated | StageChanged | RunEnded):
            return
        if not self._lane.put(event, priority=not isinstance(event, TickDone | PolicyUpdated)):
            self.dropped += 1

    def flush(self) -> None:
        """Hands all events taken so far to wandb, which writes its file within two seconds.

        If the service does not take them within ``_FLUSH_S``, the sink gives up on it: a view must not delay training
        at every save.
        """
        if self._lane is not None and not self._failed and not self._lane.flush(min(_FLUSH_S, self._finish_timeout_s)):
            self._fail(TimeoutError(f"wandb took nothing for {_FLUSH_S:g} s; try `wandb sync` later"))

    def close(self) -> None:
        """Logs growth and summary and finishes the wandb run; safe to call twice."""
        lane, self._lane = self._lane, None
        if lane is None:
            return
        lane.put(_CLOSE, priority=True)
        if not lane.close(self._finish_timeout_s + 2.0):
            self._fail(TimeoutError(f"wandb did not finish in {self._finish_timeout_s:g} s; try `wandb sync` later"))

    def _write(self, batch: list[Any], urgent: bool) -> None:
        for item in batch:
            if self._run is None:
                return
            try:
                if item is _CLOSE:
                    self._finish()
                else:
                    self._log(item)
            except Exception as error:  # the service died, the connection broke
                self._fail(error)

    def _log(self, event: Event) -> None:
        if isinstance(event, TickDone):
            self._run.log(tick_row(event))
        elif isinstance(event, PolicyUpdated):
            self._run.log(update_row(event))
        elif isinstance(event, StageChanged):
            names = event.source.name, event.target.name
            self._growth.append([event.step, event.tick, event.slot, *names, event.cause, event.blueprint])
        elif isinstance(event, RunEnded):
            self._exit_code = 0 if event.status in ("done", "preempted") else 1
            self._run.summary.update({"status": event.status, **to_plain(event.summary)})
            if event.status == "preempted":
                self._run.mark_preempting()

    def _finish(self) -> None:
        import wandb  # already loaded

        if self._growth:
            table = wandb.Table(columns=list(GROWTH_COLUMNS), data=self._growth)
            self._run.log({"growth": table, "train/step": self._axes[0], "tick": self._axes[1]})
        self._run.finish(exit_code=self._exit_code)
        self._run = None

    def _fail(self, error: Exception) -> None:
        with self._once:
            if self._failed:
                return
            self._failed = True
        if self._run is not None:
            self._run = None
            _abandon()
        text = " ".join(str(error).split()) or type(error).__name__
        say(f"telemetry: wandb is off for the rest of this run: {text}; training goes on, our event files are complete")
        step, tick, epoch = self._axes
        self._on_fault(Fault(step=step, tick=tick, epoch=epoch, what=f"wandb: {text}", where="wandb"))


def _abandon() -> None:
    """Ends a service that died or hangs; otherwise wandb waits for it, or complains, when the interpreter exits."""
    with contextlib.suppress(Exception):  # wandb has no public way to end a hung service, and its internals change
        from wandb.sdk import wandb_setup

        setup: Any = wandb_setup.singleton()
        setup._connection._proc._process.kill()
    with contextlib.suppress(Exception, SystemExit):  # teardown leaves the process with the service's exit code
        import wandb

        wandb.teardown()


def _start(
    choice: WandbChoice,
    run_id: str,
    config_dict: Mapping[str, Any],
    init_timeout_s: float,
    finish_timeout_s: float,
) -> Any:
    import wandb  # here, since it takes half a second, and if it is broken the run goes on without it

    values: dict[str, Any] = {
        "init_timeout": init_timeout_s,
        "finish_timeout": finish_timeout_s,  # otherwise `finish` waits for a dead network for ever
        "console": "off",
        "silent": True,
        "x_transaction_log_flush_interval": 2.0,  # instead of 15 s: a SIGKILL loses what is not flushed
    }
    known = wandb.Settings.model_fields  # releases differ, and an unknown setting is an error
    settings = wandb.Settings(**{name: value for name, value in values.items() if name in known})
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
    run.define_metric("train/step")
    run.define_metric("tick")
    run.define_metric("*", step_metric="train/step")
    return run
