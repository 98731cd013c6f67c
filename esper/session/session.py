"""Growth in a user's own training loop, on one process or under torchrun, by the same lockstep code as the trainer's.

session = esper.Session(grown, optimizer, controller="heuristic", loss=loss_fn, probe=val_loader)
for batch in session.epoch(loader):
    loss = session.loss(batch)      # reads as the host's loss; its backward serves the seeds that incubate, too
    loss.backward()
    session.step()                  # optimizer, scheduler, ramps, and a tick when one is due

session.save(path); session = esper.Session.restore(path, build_host, loss=loss_fn, probe=val_loader)
"""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from esper.accord.state import RunState
from esper.kasmina.export import export
from esper.kasmina.precision import seed_dtype
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import CheckpointError, ConfigError, LoopError, one_line
from esper.leyline.events import Event
from esper.leyline.imports import refuse_foreign_code
from esper.leyline.protocols import Controller, EventSink
from esper.nissa.screen import safe
from esper.session.average import Ema, begin_average
from esper.session.config import SessionConfig, make_config, read_restored_config
from esper.session.file import read_session_file, write_session_file
from esper.session.loop import Loop, Parts
from esper.session.model import LiveModel, UserLoss
from esper.session.order import LOOP
from esper.session.parts import Given, assemble_session
from esper.session.record import collect, load, rebuild_host, rebuild_optimizer
from esper.tolaria.growth.guard import StepReport
from esper.tolaria.ranks.world import World


class Session:
    """Growth in a user's own loop.

    Every rank makes the same calls in the same order. A wrong order (a forgotten step, two losses for one step, the
    optimizer stepped without the session) raises a `LoopError` that says which call comes first.
    """

    def __init__(
        self,
        grown: Grown,
        optimizer: torch.optim.Optimizer,
        *,
        controller: Any = "heuristic",
        loss: UserLoss | None = None,
        probe: Iterable[Any] | None = None,
        cluster: Iterable[Hashable] | str | None = None,
        validation: Iterable[Any] | None = None,
        statistics: Iterable[Any] | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        sink: EventSink | str | os.PathLike[str] | None = None,
        every: int | None = None,
        slots: Any = None,
        gates: Any = None,
        control: Any = None,
        **settings: Any,
    ) -> None:
        """Joins the ranks, checks that all have the same model, and takes over the optimizer.

        Args:
            grown: from `esper.attach`, its slots empty; equal weights on all ranks.
            optimizer: the host's, of any torch class that takes groups; only the session steps it.
            controller: name of a kind, a mapping or config object of a kind, or a `Controller`.
            loss: (model, batch) -> loss [B] in nats, or (loss [B], correct [B] in 0 to 1); it calls the model once.
            probe: the data that evidence is drawn from, 1,000 samples or more; report no number on them. A
                `DataLoader` over a map-style dataset, or a list of batches; the same on every rank, sharded here.
            cluster: which samples of ``probe`` depend on each other: one value (document, patient) for each sample of
                its dataset, or each batch of its list; "sample": none do, in a list of batches either. None: no samples
                of a dataset do, but those of a batch.
            validation: held-out data, measured at ticks; given like ``probe``.
            statistics: training data, given like ``probe``, from which a model with BatchNorm takes running statistics
                anew for each arm of a comparison (``gates.statistics_samples``); None for the inputs of ``probe``.
            scheduler: of the optimizer; the session steps it once per optimizer step, or once per epoch
                (``scheduler_per="epoch"``).
            scaler: a `torch.amp.GradScaler`; `loss` applies it, `step` undoes it.
            sink: takes events on rank 0; a path becomes a file of JSON lines.
            every: optimizer steps between ticks (``control.every``); 0 for one at the end of each epoch.
            slots: a `SlotsConfig`, or a mapping of what differs from its defaults.
            gates: a `GateConfig`, or such a mapping.
            control: a `ControlConfig`, or such a mapping.
            settings: the other fields of `esper.session.config.SessionConfig`, such as ``steps``, ``seed``.

        Raises:
            ConfigError: the arguments cannot work; one line for each problem.
            LockstepError: the ranks did not meet, or differ (weights, settings, machine); the text names them.
        """
        config = make_config(slots, gates, control, every, settings, has_loss=loss is not None)
        given = Given(
            controller=controller,
            loss=loss,
            probe=probe,
            cluster=cluster,
            validation=validation,
            statistics=statistics,
            scheduler=scheduler,
            scaler=scaler,
            sink=sink,
        )
        self._loop = begin_loop(config, grown, optimizer, given)
        if self.world.rank == 0 and (loss is None or probe is None):
            missing = " and ".join(name for name, part in (("loss", loss), ("probe", probe)) if part is None)
            text = f"esper: Session without {missing}: evidence gates will refuse everything"
            print(text, file=safe(sys.stderr), flush=True)

    # the loop -----------------------------------------------------------------------------------------------------

    def epoch(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yields the loader's batches, as many on every rank.

        Loaders with a length agree once on the smallest. Without a length the ranks ask each other before every batch
        (one all-reduce of 8 bytes), and the first rank that has no more ends the epoch for all.

        Raises:
            ConfigError: a loader is empty, ends before its own length, or has a length on some ranks only.
        """
        return self._loop.epoch(loader)

    def loss(self, batch: Any) -> Tensor:
        """The host's mean loss on this rank's batch, 0-D; its backward also trains the seeds that incubate.

        With a scaler the gradient is scaled, the value is not. With gradients disabled it only evaluates.

        Raises:
            LoopError: `step` was not called after the last loss.
            ConfigError: ``loss`` did not return one value per sample.
        """
        return self._loop.loss(batch)

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """Within the block gradients add up on this rank only; the window's last loss goes after it, then `step`.

        The window's gradient is the mean over its passes; do not divide the loss.
        """
        return self._loop.accumulate()

    def step(self) -> StepReport:
        """Takes one optimizer step, judged and clipped per owner, one of the scheduler, and a tick if one is due.

        Returns:
            Norms per owner, owners whose gradient was not finite, whether the step was skipped.

        Raises:
            LoopError: there was no loss, or no backward, before.
            DivergedError: too many steps in a row were skipped.
            LockstepError: at a tick, ranks differ or one is lost.
        """
        return self._loop.step()

    def ema(self, decay: float) -> Ema:
        """The average of the weights, which `step` updates from now on; asked for again, the same one.

        It grows and is pruned with the model, is saved and restored with the session, and lies on every rank: all of
        them ask for it. See docs/ema.md.

        Args:
            decay: share of the average that one optimizer step keeps, in (0, 1), such as 0.999.

        Raises:
            ConfigError: the decay is outside (0, 1), or not that of the average that there is.
        """
        self._loop.check_between("session.ema()")
        return Ema(self._loop, begin_average(self._loop, decay))

    def discard(self) -> None:
        """Drops the step under way: gradients, losses since the last `step`, and their samples and random numbers.

        For a step that was interrupted, by Ctrl-C or for lack of memory, or that is not wanted; also after
        ``requires_grad`` of a parameter was changed. Every rank calls it. The model is wrapped anew, so nothing that an
        interrupted backward left behind reaches the next step. What a forward has written into buffers stays.

        Raises:
            LoopError: an interruption struck in the middle of an optimizer step or a tick; only a load helps then.
            LockstepError: the ranks stand at different steps.
        """
        self._loop.check_open()
        self._loop.discard()

    # looking ------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> LiveModel:
        """The grown model, one object for the whole session; it calls the present wrapper of the model."""
        return self._loop.model

    @property
    def grown(self) -> Grown:
        """The model and its slots, as `esper.attach` returned them."""
        return self._loop.grown

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The user's optimizer, with groups for the seeds."""
        return self._loop.adopted.optimizer

    @property
    def steps(self) -> int:
        """Optimizer steps done; a skipped one counts."""
        return self._loop.steps

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return self._loop.epochs

    @property
    def state(self) -> RunState:
        """The record that all ranks agree on."""
        return self._loop.state

    @property
    def config(self) -> SessionConfig:
        """The settings."""
        return self._loop.config

    @property
    def world(self) -> World:
        """This process's place among the ranks."""
        return self._loop.world

    @property
    def parts(self) -> Parts:
        """The parts of the session."""
        return self._loop.parts

    @property
    def events(self) -> deque[Event]:
        """The newest events, on every rank."""
        return self.parts.recorder.events

    @property
    def sink(self) -> EventSink:
        """The sink that takes all events; on another rank than 0 it does nothing."""
        return self.parts.recorder.sink

    def export(self, example: Any = None, *, fold: bool = True, partial: bool = False, ema: bool = False) -> nn.Module:
        """A plain module that computes what the model computes now; see `esper.kasmina.export.export`.

        Args:
            example: one batch of inputs to trace and to check with; None for the one given to `attach` (a restored
                session has none).
            fold: as there.
            partial: as there.
            ema: whether to export the average of the weights.

        Raises:
            LoopError: ``ema`` without `Session.ema`.
        """
        if ema:
            if self._loop.average is None:
                raise LoopError("session.export(ema=True) without an average; call session.ema(decay) before the loop")
            return Ema(self._loop, self._loop.average).export(example, fold=fold, partial=partial)
        return export(self.grown, example, fold=fold, partial=partial).module

    def status(self, console: Console | None = None) -> Table:
        """Prints, and returns, a table of the slots: site, stage, blueprint, alpha, parameters, contribution.

        Args:
            console: where to print; None for standard output.
        """
        table = Table(title=f"step {self.steps}, tick {self.state.tick}, epoch {self.epochs}")
        for column in ("slot", "site", "stage", "blueprint", "alpha", "parameters", "contribution"):
            table.add_column(column, overflow="fold")
        for entry in self.state.slots:
            alpha = f"{entry.alpha(self.steps):.3f}" if entry.stage.has_seed else "-"
            table.add_row(
                entry.slot,
                self.grown.sites[entry.slot].module,
                entry.stage.name,
                entry.blueprint or "-",
                alpha,
                f"{self.grown.seed_parameters(entry.slot):,}",
                str(entry.contribution),
            )
        (console or Console(file=safe(sys.stdout))).print(table)
        return table

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Moves or casts model, optimizer moments and staged seeds, as ``nn.Module.to``; on every rank alike."""
        loop = self._loop
        loop.check_between("session.to")
        loop.growth.call = self.grown.model  # the old reducer must be gone first
        loop.state = loop.parts.evaluator.continue_anew(loop.state)
        self.grown.model.to(*args, **kwargs)
        first = next(self.grown.model.parameters())
        loop.growth.host_dtype, loop.growth.dtype = first.dtype, seed_dtype(first.dtype)
        for seed in loop.growth.staged.values():
            seed.to(device=first.device, dtype=loop.growth.dtype)
        for parameter, entries in self.optimizer.state.items():
            for key, value in entries.items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    entries[key] = value.to(device=parameter.device, dtype=parameter.dtype)
        self.world.device = first.device
        loop.window.move(first.device)
        loop.follow(force=True)
        if loop.average is not None:
            loop.average.follow()
        return self

    # saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a restore needs, tensors copied to the CPU. Every rank calls it; only rank 0's result holds
        the state of the controller.

        Between a loss and its step, on any rank, the step under way is dropped as by `discard`: what is returned is the
        state after the last whole step.

        Raises:
            LoopError: it was called within `accumulate`, or an interruption has torn the network.
            LockstepError: the ranks no longer hold the same network.
        """
        return collect(self._loop)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a `state_dict` in place; seeds that have grown since are removed from model, optimizer and reducer.

        A step under way is dropped first, as by `discard`. It also mends what an interruption has torn.

        Raises:
            CheckpointError: the state does not fit this session.
        """
        self._loop.begin_load()
        load(self._loop, state, "state")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes `state_dict` to one file, whole or not at all. Every rank calls it; rank 0 writes.

        A call on rank 0 alone waits for the others, and ends after ``control.timeout_s`` with an error that says so.

        Raises:
            CheckpointError: the file could not be written; on every rank alike. An earlier file is unchanged.
        """
        payload, error = collect(self._loop, keep=self.world.rank == 0), ""
        if self.world.rank == 0:
            try:
                write_session_file(Path(path), payload)
            except (OSError, RuntimeError) as failure:  # torch.save reports a full disk as RuntimeError
                error = one_line(failure)
        (error_of_rank_0, *_) = self.world.gather_text(error, what="save")
        if error_of_rank_0:
            raise CheckpointError(f"{path}: not saved: {error_of_rank_0}")
        self._loop.marks.mark(LOOP)

    @classmethod
    def restore(
        cls,
        path: str | os.PathLike[str],
        build_host: Callable[[], nn.Module],
        *,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        scaler: Any = None,
        controller: Controller | Mapping[str, Any] | None = None,
        loss: UserLoss | None = None,
        probe: Iterable[Any] | None = None,
        cluster: Iterable[Hashable] | str | None = None,
        validation: Iterable[Any] | None = None,
        statistics: Iterable[Any] | None = None,
        sink: EventSink | str | os.PathLike[str] | None = None,
    ) -> Self:
        """Returns a session that goes on where the saved one was: rebuilds the topology, then loads every tensor.

        Settings and slots come from the file. On the same number of ranks it goes on bit for bit. The position of the
        user's loader is not saved; the user restores it.

        Args:
            path: a file of `save`; every rank reads it.
            build_host: builds the host as it was before `esper.attach`, on its device.
            optimizer: builds the host's optimizer; None for the recorded one, if it is one of torch's.
            scheduler: builds the scheduler of that optimizer, if the saved session had one.
            scaler: a scaler, if the saved session had one.
            controller: the controller, if the saved session was given an object; its settings, if they name code
                and the file is not your own (not yours, or others may write it).
            loss: as at construction.
            probe: as at construction.
            cluster: as at construction.
            validation: as at construction.
            statistics: as at construction.
            sink: as at construction.

        Raises:
            CheckpointError: the file is damaged, or does not fit; the text names the key.
            ConfigError: ``build_host`` is a module, or no function; or the file is not your own and names code.
        """
        where = str(path)
        if isinstance(build_host, nn.Module) or not callable(build_host):
            raise ConfigError(
                f"build_host = {type(build_host).__name__}: expected a function that builds the host as it was before "
                "esper.attach; for example lambda: MyModel()"
            )
        payload, foreign = read_session_file(Path(path))
        config = read_restored_config(payload["settings"], where)
        recorded = payload["controller"]["config"]
        if controller is None and recorded is None:
            raise CheckpointError(f"{where}: its controller was an object; pass controller=")
        if controller is None and isinstance(recorded, Mapping) and "path" in recorded:
            code = {"controller.path": recorded["path"]}
            refuse_foreign_code(Path(path), foreign, code, f"pass controller={recorded!r} to restore")
        grown = rebuild_host(payload, build_host(), where)
        host_optimizer = rebuild_optimizer(payload, grown.model, where) if optimizer is None else optimizer(grown.model)
        given = Given(
            controller=recorded if controller is None else controller,
            loss=loss,
            probe=probe,
            cluster=cluster,
            validation=validation,
            statistics=statistics,
            scheduler=None if scheduler is None else scheduler(host_optimizer),
            scaler=scaler,
            sink=sink,
            restored=True,
        )
        loop = begin_loop(config, grown, host_optimizer, given)
        try:
            load(loop, payload, where)
        except Exception as error:
            loop.leave(one_line(error))
            raise
        session = cls.__new__(cls)  # without __init__, which would begin another loop
        session._loop = loop
        return session

    # ending -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Gives model and optimizer back and leaves the ranks; safe to call twice. A user's process group stays up."""
        self._loop.leave("closed its session")

    def __enter__(self) -> Self:
        if self._loop.closed:
            raise LoopError("the session is closed")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the session; the other ranks can read the error that ended the block."""
        self._loop.leave("closed its session" if error is None else f"failed: {one_line(error)}")


def begin_loop(config: SessionConfig, grown: Grown, optimizer: torch.optim.Optimizer, given: Given) -> Loop:
    """Joins the ranks, builds the parts, and brings the model into the state of the first record."""
    loop = Loop(assemble_session(config, grown, optimizer, given))
    loop.growth.plant_record(loop.state)  # seeds that are planted from the start
    loop.follow(force=True)
    loop.parts.narrator.report_start(loop.state, loop.terms, None)
    return loop
