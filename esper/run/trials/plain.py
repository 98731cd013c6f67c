"""Trials by the run's own engine, one host after the other in this process: the plain path, and the oracle of others.

A trial is a run without a run directory. Its engine is the one that `esper train` runs, put together by the same
function, and it takes the same ticks; only its controller is whoever gives the commands. It writes no file, emits no
event and makes no test. Trials of one process share data and terms, and each keeps random streams of its own.

Over ranks each host is trained by all of them: every rank makes the same calls, and rank 0 has the commands.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esper.accord.observation import make_report
from esper.kasmina.streams import Streams, cuda_devices, read_streams, set_streams, undisturbed
from esper.leyline.commands import Command
from esper.leyline.errors import EsperError
from esper.leyline.observation import Observation
from esper.leyline.protocols import Ending, NullSink, Report
from esper.leyline.stages import Stage
from esper.run.assembly import assemble
from esper.run.trials.parts import TaskParts, TrialMaker
from esper.tamiyo.common import Stateless
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.lockstep.observers import Turn
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.lastword import LastWord
from esper.tolaria.ranks.world import World
from esper.tolaria.training.engine import Engine


class Told(Stateless):
    """A controller that says what it was told for this tick."""

    name = "told"

    def __init__(self) -> None:
        self.commands: list[Command] = []

    def decide(self, observation: Observation) -> list[Command]:
        """Returns the commands."""
        return self.commands


@dataclass(slots=True, kw_only=True)
class Trial:
    """One host in training, between the two halves of a tick.

    Fields:
        engine: trains it.
        told: the engine's controller, on rank 0.
        parts: of its task.
        streams: the global random streams as this trial left them.
        turn: the tick that waits for its commands.
        report: the latest.
    """

    engine: Engine
    told: Told
    parts: TaskParts
    streams: Streams
    turn: Turn
    report: Report


class PlainTrials:
    """See `esper.leyline.protocols.Trials`.

    Args:
        size: hosts.
        maker: makes their parts; None makes those of a `esper.simic.env.tasks.GrowthTask`.
        world: the ranks; None joins those that the environment describes, on CPUs.

    Fields:
        trials: the hosts; None where none has begun.
    """

    def __init__(self, size: int, *, maker: TrialMaker | None = None, world: World | None = None) -> None:
        self.world = world or World(WorldConfig(), ControlConfig())
        if self.world.heartbeat is None:
            self.world.heartbeat = LastWord(self.world.store, self.world.rank, self.world.size)
        self.maker = maker or TrialMaker(device=self.world.device, world_size=self.world.size)
        self.trials: list[Trial | None] = [None] * size

    def __len__(self) -> int:
        return len(self.trials)

    def begin_many(self, trials: Sequence[tuple[int, Any, int]]) -> list[Report]:
        """`begin` for several places, one after the other."""
        return [self.begin(*trial) for trial in trials]

    def begin(self, index: int, task: Any, seed: int) -> Report:
        """Starts a trial; see `Trials`. Every rank gets the same report.

        Raises:
            ConfigError: settings of the task are wrong.
            LockstepError: ranks parted, or one is lost.
        """
        old, self.trials[index] = self.trials[index], None
        if old is not None:
            _leave(old.engine)
        parts, config = self.maker.shared(task, seed)
        assert self.world.heartbeat is not None
        with undisturbed(self.world.device):
            engine = assemble(
                config,
                world=self.world,
                heartbeat=self.world.heartbeat,
                bundle=parts.bundle,
                store=CheckpointStore(Path("never-written"), attempt=1, keep=1),
                sink=NullSink(),
                digest=0,
                run_id="trial",
                terms=parts.terms,
            )
            told = Told()
            engine.controller = told if self.world.rank == 0 else None
            engine.begin(None)
            turn = _train(engine)
            streams = read_streams(cuda_devices(self.world.device))
        report = _report(turn, parts, engine, births=0, prunes=0)
        self.trials[index] = Trial(engine=engine, told=told, parts=parts, streams=streams, turn=turn, report=report)
        return report

    def advance(self, commands: Sequence[Sequence[Command]]) -> tuple[Report, ...]:
        """Takes every trial to its next tick; see `Trials`.

        Args:
            commands: for each host; on other ranks than 0 they are not looked at.

        Raises:
            EsperError: a place has no trial, or there are more or fewer lists of commands than hosts.
            LockstepError: a command cannot be proposed, ranks parted, or one is lost.
        """
        if self.world.rank == 0 and len(commands) != len(self):
            raise EsperError(f"commands for {len(commands)} of {len(self)} trials; give a list, maybe empty, for each")
        for index, trial in enumerate(self.trials):
            if trial is None:
                raise EsperError(f"trial {index} has not begun; call begin({index}, task, seed) first")
            if trial.report.ending is Ending.RUNNING:
                trial.told.commands = list(commands[index]) if self.world.rank == 0 else []
                with self._own_streams(trial):
                    self._advance(trial)
            else:
                trial.report = replace(trial.report, births=0, prunes=0)
        return tuple(trial.report for trial in self.trials if trial is not None)

    def close(self) -> None:
        """Ends all trials, and leaves the ranks."""
        for trial in self.trials:
            if trial is not None:
                _leave(trial.engine)
        self.trials = [None] * len(self)
        self.world.close()

    def _advance(self, trial: Trial) -> None:
        engine, before = trial.engine, trial.turn.state
        engine.close_tick(trial.turn)
        trial.turn = _train(engine)
        state = trial.turn.state
        prunes = sum(
            line.target is Stage.PRUNED and line.tick >= before.tick for entry in state.slots for line in entry.history
        )
        births = state.births - before.births
        trial.report = _report(trial.turn, trial.parts, engine, births=births, prunes=prunes)

    @contextmanager
    def _own_streams(self, trial: Trial) -> Iterator[None]:
        devices = cuda_devices(self.world.device)
        with undisturbed(self.world.device):
            set_streams(trial.streams, devices)
            yield
            trial.streams = read_streams(devices)


def _train(engine: Engine) -> Turn:
    """Trains to the next tick, and takes its first half."""
    engine.train_step()
    while not engine.tick_due():
        engine.train_step()
    return engine.open_tick()


def _leave(engine: Engine) -> None:
    engine.growth.call = engine.grown.model  # lets go of the reducer
    engine.growth.close()
    engine.saver.close()


def _report(turn: Turn, parts: TaskParts, engine: Engine, *, births: int, prunes: int) -> Report:
    """The report of a tick before its decision; the same on all ranks."""
    return make_report(
        turn.state,
        parts.terms,
        budget=parts.budget,
        parameters=parts.parameters,
        max_consecutive=engine.settings.trainer.max_consecutive,
        births=births,
        prunes=prunes,
    )
