"""Controllers of a user's own that fail or wait, and a Hydra callback that records what a sweep's jobs return."""

import json
import time
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from esper.leyline.commands import Command
from esper.leyline.observation import Observation
from esper.leyline.stages import Op


class Failing:
    """Does nothing, and at its third tick raises."""

    name = "failing"

    def __init__(self, *, slots: tuple[str, ...], seed: int) -> None:
        self.ticks = 0

    def decide(self, observation: Observation) -> list[Command]:
        self.ticks += 1
        if self.ticks == 3:
            raise ZeroDivisionError("no luck today")
        return []

    def state_dict(self) -> dict[str, Any]:
        return {"ticks": self.ticks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ticks = state["ticks"]


class Waiting:
    """Grows one seed; from its fourth tick on it waits until the file ``go`` exists, and leaves ``go.waits`` meanwhile.

    What it decides does not depend on the waiting, so a run that was held up, and stopped, ends like one that was not.
    """

    name = "waiting"

    def __init__(self, *, slots: tuple[str, ...], seed: int, go: str) -> None:
        self.ticks, self.slot, self.go = 0, slots[0], Path(go)

    def decide(self, observation: Observation) -> list[Command]:
        self.ticks += 1
        if self.ticks >= 4 and not self.go.exists():
            waits = self.go.with_suffix(".waits")
            waits.touch()
            while not self.go.exists():
                time.sleep(0.05)
            waits.unlink()
        if self.ticks == 2:
            return [Command(slot=self.slot, op=Op.GERMINATE, blueprint="conv_small", ticks=2)]
        return [Command(slot=self.slot, op=Op.ADVANCE)] if self.ticks in (4, 6) else []

    def state_dict(self) -> dict[str, Any]:
        return {"ticks": self.ticks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ticks = state["ticks"]


class Objectives(Callback):
    """Writes what each job returned to Hydra, and so to any sweeper, as one line of a file.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        value = job_return.return_value if job_return.status is JobStatus.COMPLETED else "failed"
        with self.path.open("a") as file:
            file.write(json.dumps(value) + "\n")
