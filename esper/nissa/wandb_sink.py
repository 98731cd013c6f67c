"""wandb, from rank 0: a view of the run. Our own event files are the truth, and no outage of wandb stops training.

Every call into wandb after `wandb.init` is made on a thread of the sink's own, because a call to a wandb service that
hangs blocks its caller for ever. After its first failure the sink writes one line, emits one `Fault`, and then does
nothing any more. Values are reduced before they come here. ``step=`` is never passed: wandb drops a row whose step is
lower than the last, and every resume has such rows. The axes ``train/step`` and ``tick`` are logged as values instead.

    rows        a tick, or an update of a policy                        `esper.nissa.wandb_rows`
    tables      growth, decisions, births, incidents; and the summary   `esper.nissa.wandb_tables`
    alerts      what somebody should know now                           `esper.nissa.wandb_alerts`
    artifacts   checkpoints                                             `esper.nissa.wandb_artifacts`
    stop        asked for in wandb's page: the run's own agreed stop
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from esper.leyline.errors import one_line
from esper.leyline.events import CheckpointSaved, Event, Fault, PolicyUpdated, RunEnded, RunStarted, TickDone
from esper.nissa.config import ArtifactMode, WandbConfig, WandbMode
from esper.nissa.console import describe_event
from esper.nissa.lane import Lane, say
from esper.nissa.wandb_alerts import AlertLimit, title_of
from esper.nissa.wandb_artifacts import log_checkpoint
from esper.nissa.wandb_env import choose_wandb
from esper.nissa.wandb_rows import tick_row, update_row
from esper.nissa.wandb_start import abandon_wandb, start_wandb
from esper.nissa.wandb_tables import COLUMNS, INCIDENTS, LIFE, Story

_CLOSE = object()
_FLUSH_S = 5.0
_SUMMARY_S = 30.0  # between two summaries of a run that goes on
_NOTED = (*INCIDENTS, *LIFE, RunStarted, RunEnded, CheckpointSaved)
_ROWS = (TickDone, PolicyUpdated)

Past = Callable[[RunStarted], Iterable[Event]]


def _no_past(start: RunStarted) -> Iterable[Event]:
    return ()


class WandbSink:
    """Shows one run in wandb.

    Args:
        config: mode, project and names; see `esper.nissa.wandb_env` for wandb's own variables.
        run_dir: run directory; wandb's own files go to ``run_dir/wandb``, or below WANDB_DIR.
        run_id: wandb's id, the same in every attempt, so that a second attempt continues the run (offline it creates a
            second folder, which ``wandb sync`` merges).
        name: display name, where the settings have none.
        group: group of a sweep; ``config.group`` takes precedence.
        job_type: kind of run, where the settings have none.
        config_dict: the resolved configuration as plain data.
        on_fault: takes the one `Fault`, on the sink's thread, if wandb fails.
        on_stop: called, on another thread, when somebody stops the run in wandb's page.
        peak_flops: floating-point operations a second of all ranks' devices at their best; None: not known.
        past: the events of earlier attempts that a start goes on from, so that tables and counts are the whole run's.
        init_timeout_s: seconds after which the sink gives up on wandb at the start.
        finish_timeout_s: seconds after which the sink gives up on wandb at the end.

    Attributes:
        dropped: events refused by a full queue.
        sent: rows handed to wandb.
    """

    def __init__(
        self,
        config: WandbConfig,
        *,
        run_dir: str | os.PathLike[str],
        run_id: str,
        name: str,
        group: str | None,
        config_dict: Mapping[str, Any],
        on_fault: Callable[[Fault], None],
        on_stop: Callable[[], None] | None = None,
        past: Past = _no_past,
        job_type: str = "train",
        peak_flops: float | None = None,
        init_timeout_s: float = 60.0,
        finish_timeout_s: float = 60.0,
    ) -> None:
        self.dropped = self.sent = 0
        self._run_dir, self._run_id, self._artifacts = Path(run_dir), run_id, config.artifacts
        self._on_fault, self._finish_timeout_s, self._past = on_fault, finish_timeout_s, past
        self._axes = (0, 0, 0)  # step, tick, epoch of the newest event
        self._story, self._limit = Story(describe_event), AlertLimit(config.alert_every_s)
        self._summed_at, self._peak_flops = -_SUMMARY_S, peak_flops
        self._exit_code = 1  # until a RunEnded says otherwise
        self._lane: Lane[Any] | None = None
        self._run: Any = None
        self._once, self._failed, self._missed = threading.Lock(), False, False
        choice = choose_wandb(
            config, run_dir=os.fspath(run_dir), run_id=run_id, name=name, group=group, job_type=job_type
        )
        for note in choice.notes:
            say(f"telemetry: {note}")
        if choice.mode is WandbMode.DISABLED:
            return
        hooks = sys.exit, sys.excepthook  # wandb replaces both to learn the exit code, which we pass to it
        try:
            self._run = start_wandb(
                choice,
                run_id,
                config_dict,
                init_timeout_s=init_timeout_s,
                finish_timeout_s=finish_timeout_s,
                on_stop=on_stop,
            )
            self._lane = Lane("esper-wandb", self._write, capacity=4096)
        except Exception as error:  # network, key, disk, or an import that fails: a view must not stop a run
            self._fail(error)
        finally:
            sys.exit, sys.excepthook = hooks

    def emit(self, event: Event) -> None:
        """Takes one event; returns at once."""
        self._axes = (event.step, event.tick, event.epoch)
        row = isinstance(event, _ROWS)
        if self._lane is None or not (row or isinstance(event, _NOTED)):
            return
        keep = event.critical or isinstance(event, RunStarted | RunEnded)
        if not self._lane.put(event, priority=not row, keep=keep):
            self.dropped += 1

    def flush(self) -> None:
        """Hands all events taken so far to wandb, which writes its file within two seconds.

        If the service does not take them within ``_FLUSH_S``, the sink gives up on it: a view must not delay training
        at every save.
        """
        if self._lane is not None and not self._failed and not self._lane.flush(min(_FLUSH_S, self._finish_timeout_s)):
            self._fail(TimeoutError(f"wandb took nothing for {_FLUSH_S:g} s; try `wandb sync` later"))

    def close(self) -> None:
        """Sends tables and summary and finishes the wandb run; safe to call twice."""
        lane, self._lane = self._lane, None
        if lane is None:
            return
        lane.put(_CLOSE, priority=True, keep=True)
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
        if isinstance(event, RunStarted):
            for earlier in self._past(event):
                self._story.take(earlier)
        self._story.take(event)
        if isinstance(event, TickDone):
            row = tick_row(event) | {f"counts/{name}": n for name, n in self._story.counts.items()}
            if self._peak_flops is not None and "throughput/flops_per_s" in row:
                row["throughput/mfu"] = row["throughput/flops_per_s"] / self._peak_flops
            self._send(row)
        elif isinstance(event, PolicyUpdated):
            self._send(update_row(event))
        elif isinstance(event, CheckpointSaved):
            self._log_checkpoint(event)
        elif isinstance(event, RunEnded):
            self._exit_code = 0 if event.status in ("done", "preempted") else 1
            if event.status == "preempted":
                self._run.mark_preempting()
        titled = title_of(event)
        if titled is not None:
            self._alert(*titled, (describe_event(event) or ("", ""))[0])
        if time.monotonic() - self._summed_at >= _SUMMARY_S or isinstance(event, RunEnded):
            self._summed_at = time.monotonic()
            self._run.summary.update(self._story.summary())

    def _send(self, row: dict[str, Any]) -> None:
        self._run.log(row)
        self.sent += 1

    def _alert(self, title: str, level: str, text: str) -> None:
        admitted = self._limit.admit(title, text)
        if admitted is not None:
            self._run.alert(title=title, text=admitted, level=level)

    def _log_checkpoint(self, event: CheckpointSaved) -> None:
        if self._artifacts is not ArtifactMode.NONE:
            try:
                log_checkpoint(self._run, self._run_id, self._run_dir, event, self._artifacts)
            except Exception as error:  # its files are gone already, or the server refuses it; rows go on
                self._miss(f"checkpoint {event.saved_step}", error)
        self._send_tables(whole=False)

    def _miss(self, what: str, error: Exception) -> None:
        """Says once that something beside the rows did not get there."""
        if not self._missed:
            say(f"telemetry: wandb did not take {what}: {one_line(error)}; its rows go on")
        self._missed = True

    def _send_tables(self, *, whole: bool) -> None:
        import wandb  # already loaded

        for name, table in self._story.tables.items():
            if table.taken > table.sent if whole else table.doubled:
                rows = [list(row) for row in table.rows]
                found = wandb.Table(columns=list(COLUMNS[name]), data=rows)
                table.sent = table.taken
                try:
                    self._run.log({f"tables/{name}": found, "train/step": self._axes[0], "tick": self._axes[1]})
                except Exception as error:  # wandb keeps tables as artifacts
                    self._miss(f"the table {name}", error)

    def _finish(self) -> None:
        self._send_tables(whole=True)
        held_back = {"alerts_held_back": self._limit.held_back} if self._limit.held_back else {}
        self._run.summary.update({**self._story.summary(), **held_back})
        self._run.finish(exit_code=self._exit_code)
        self._run = None

    def _fail(self, error: Exception) -> None:
        with self._once:
            if self._failed:
                return
            self._failed = True
        if self._run is not None:
            self._run = None
            abandon_wandb()
        text = " ".join(str(error).split()) or type(error).__name__
        say(f"telemetry: wandb is off for the rest of this run: {text}; training goes on, our event files are complete")
        step, tick, epoch = self._axes
        self._on_fault(Fault(step=step, tick=tick, epoch=epoch, what=f"wandb: {text}", where="wandb"))
