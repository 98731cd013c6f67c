"""How long a start took: told once the first optimizer step of an attempt is done."""

from pathlib import Path

from esper.run.attempt import Attempt
from esper.run.environment import Phases, write_start
from esper.tolaria.growth.guard import Judgement, StepReport
from esper.tolaria.lockstep.observers import Observer


class FirstStep(Observer):
    """Ends the last phase of a start at the first step; rank 0 writes the seconds of all into RUN.

    Args:
        phases: of the start.
        run_dir: RUN.
        attempt: this start's right to write.
        rank: this rank.
    """

    name = "first_step"

    def __init__(self, phases: Phases, run_dir: Path, attempt: Attempt, rank: int) -> None:
        self._phases, self._run_dir, self._attempt, self._rank = phases, run_dir, attempt, rank

    def after_step(self, report: StepReport | Judgement) -> None:
        """Tells the first time, and nothing later."""
        if self._phases.has("step"):
            return
        self._phases.end("step")
        if self._rank == 0 and self._attempt.holds():
            write_start(self._run_dir, self._phases.seconds())
