"""A window of a few optimizer steps through torch's profiler, on rank 0 (``telemetry.profile_at``).

RUN/profile-00000100.json    a trace, for chrome://tracing or Perfetto
RUN/profile-00000100.txt     operators by the time that they took themselves
"""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from esper.leyline.files import write_whole
from esper.nissa.config import TelemetryConfig
from esper.tolaria.growth.guard import Judgement, StepReport
from esper.tolaria.lockstep.observers import Observer
from esper.tolaria.lockstep.tick import Marks
from esper.tolaria.ranks.heartbeat import Heartbeat

ROWS = 40


def build_profiler(config: TelemetryConfig, heartbeat: Heartbeat, run_dir: Path) -> tuple[Observer, ...]:
    """The observer that the settings ask for; empty if they ask for none."""
    if config.profile_at is None:
        return ()
    folder = run_dir if heartbeat.rank == 0 else None
    return (ProfileWindow(heartbeat, folder, config.profile_at, config.profile_steps),)


class ProfileWindow(Observer):
    """Profiles some steps once. Every rank has it, so that all have the same observers; rank 0 alone profiles.

    Args:
        marks: this rank's, which know its step.
        folder: RUN; None on other ranks.
        first: optimizer steps done when it begins.
        steps: optimizer steps that it lasts.
    """

    name = "profiler"

    def __init__(self, marks: Marks, folder: Path | None, first: int, steps: int) -> None:
        self._marks, self._folder, self._first, self._last = marks, folder, first, first + steps
        self._running: profile | None = None

    def after_step(self, report: StepReport | Judgement) -> None:
        """Begins or ends the window where it is due."""
        done = self._marks.step + 1  # the mark is of the step that has just been taken
        if self._folder is not None and done == self._first:
            devices = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._running = profile(activities=[ProfilerActivity.CPU, *devices])
            self._running.__enter__()
        elif self._running is not None and done >= self._last:
            running, self._running = self._running, None
            running.__exit__(None, None, None)
            self._write(running)

    def _write(self, found: profile) -> None:
        assert self._folder is not None
        path = self._folder / f"profile-{self._first:08d}.json"
        try:
            found.export_chrome_trace(str(path))
            table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=ROWS)
            write_whole(path.with_suffix(".txt"), table + "\n")
        except OSError as error:
            print(f"esper: no profile: {path}: {error.strerror}", flush=True)
            return
        print(f"esper: profile of steps {self._first} to {self._last}: {path} and .txt beside it", flush=True)
