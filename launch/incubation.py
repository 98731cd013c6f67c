"""Compares the incubations shadow, ste and immediate at equal training FLOPs.

    python launch/incubation.py                                  # both digits tasks, seeds 1-5: minutes on one core
    python launch/incubation.py --tasks text --seeds 1,2,3

A host trains alone for a while; then a seed of one blueprint germinates and learns by the arm's incubation. All arms of
a random seed share host, data order and FLOPs; an arm with cheaper steps (ste, immediate) takes more of them. Two
questions:

    A   after the same FLOPs since germination: validation loss with the seed at alpha 1 minus the loss at alpha 0
        (shadow and ste have not blended yet; immediate has been in the host's forward from the start)
    B   after blending and the same FLOPs in all: validation loss of the network as it is, minus that of `none`, which
        spends everything on the host

The learning rate is constant, so that no arm profits from another's schedule; gates only observe.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from esper.config.digest import lasting_digest
from esper.config.strict import as_plain
from esper.config.tree import build_config
from esper.kasmina.attribution.worth import evaluating
from esper.launcher.compose import conf_folder
from esper.leyline.commands import Command
from esper.leyline.observation import Observation
from esper.leyline.protocols import NullSink
from esper.leyline.stages import Op
from esper.run.assembly import assemble
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data import load_data
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.world import World
from esper.tolaria.training.engine import Engine

ARMS = ("shadow", "ste", "immediate", "none")


@dataclass(frozen=True, slots=True)
class Setting:
    """One task.

    Fields:
        overrides: Hydra overrides.
        slot: of the seed.
        blueprint: of the seed.
        alone: length before germination, in steps of the host alone.
        learning: the FLOPs of question A, in the same unit.
        after: the FLOPs of the rest, in the same unit.
        every: optimizer steps between ticks.
        ramp: length of the blending, in ticks.
    """

    overrides: tuple[str, ...]
    slot: str
    blueprint: str
    alone: int
    learning: int
    after: int
    every: int = 10
    ramp: int = 6


_DIGITS = ("host=cnn", "data=digits", "optim.lr=0.01", "trainer.batch=64")
TASKS = {
    "digits": Setting(_DIGITS, "r0c0", "conv_light", alone=150, learning=600, after=900),
    "noisy": Setting((*_DIGITS, "data.label_noise=0.4"), "r0c0", "conv_light", alone=150, learning=600, after=900),
    "text": Setting(
        ("host=gpt", "data=pysource", "trainer=language", "trainer.batch=16", "optim.lr=0.001"),
        "r1c0",
        "mlp",
        alone=200,
        learning=300,
        after=500,
    ),
}


class NextCommands:
    """A controller that proposes the commands in ``next``, once."""

    name = "told"

    def __init__(self) -> None:
        self.next: list[Command] = []

    def decide(self, observation: Observation) -> Sequence[Command]:
        """The commands set since the last tick."""
        commands, self.next = self.next, []
        return commands

    def state_dict(self) -> dict[str, Any]:
        """Empty: the controller has no state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing: the controller has no state."""


def build(setting: Setting, arm: str, seed: int, folder: Path) -> Engine:
    """Builds an engine on one process with a `NextCommands` controller."""
    overrides = [
        *setting.overrides,
        f"seed={seed}",
        f"control.every={setting.every}",
        "optim.schedule=constant",
        "gates=observe",
        "gates.first_look=100000",
        "checkpoint.every_ticks=0",
        "control.validate_every=100000",
        "trainer.epochs=100000",
        f"run.dir={folder}",
        "controller=none",
        f"slots.incubation={'shadow' if arm == 'none' else arm}",
    ]
    with initialize_config_dir(str(conf_folder()), version_base=None):
        composed = OmegaConf.to_container(compose("config", overrides), resolve=True)
    assert isinstance(composed, dict)
    composed.pop("launch")
    config = build_config(composed)
    torch.set_num_threads(1)
    world = World(config.world, config.control)
    heartbeat = world.heartbeat = Heartbeat(folder / "heartbeat", 0, 1)
    engine = assemble(
        config,
        world=world,
        heartbeat=heartbeat,
        bundle=load_data(config.data),
        store=CheckpointStore(folder / "checkpoints", attempt=1, keep=1),
        sink=NullSink(),
        digest=lasting_digest(as_plain(config)),
        run_id="incubation",
    )
    engine.controller = NextCommands()
    engine.begin(None)
    return engine


def train_to_tick(engine: Engine, *commands: Command) -> None:
    """Trains to the next tick, which sees the commands."""
    assert isinstance(engine.controller, NextCommands)
    engine.controller.next = list(commands)
    engine.train_step()
    while not engine.tick_due():
        engine.train_step()
    engine.tick()


def train_to_flops(engine: Engine, flops: int) -> None:
    """Trains, tick by tick, until the account reaches ``flops``."""
    while (engine.state.flops or 0) < flops:
        train_to_tick(engine)


def validation_losses(engine: Engine, alphas: dict[str, float]) -> Tensor:
    """Loss of each validation sample under these alphas, nats [N]."""
    part = engine.bundle.validation
    with engine.grown.override(alphas), evaluating(engine.grown.model):
        rows = torch.arange(len(part)).split(256)
        return torch.cat([engine.evaluator._losses(part, chosen)[0] for chosen in rows])


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one arm and random seed; losses are of validation, in nats.

    Fields:
        with_seed: loss of question A at alpha 1; None in the arm `none`.
        without_seed: loss of question A at alpha 0; None in the arm `none`.
        steps_a: steps until question A; None in the arm `none`.
        final: loss of question B.
        steps: steps in all.
        flops: training FLOPs in all.
    """

    with_seed: float | None
    without_seed: float | None
    steps_a: int | None
    final: float
    steps: int
    flops: int


def run(setting: Setting, arm: str, seed: int) -> Outcome:
    """Trains one arm with one random seed; see the module's docstring."""
    with tempfile.TemporaryDirectory() as folder:
        engine = build(setting, arm, seed, Path(folder))
        costs = engine.terms.costs
        assert costs is not None
        step = engine.settings.trainer.batch * (costs.host.forward + costs.host.backward)
        bounds = [setting.alone * step, (setting.alone + setting.learning) * step]
        whole = bounds[1] + setting.after * step
        train_to_flops(engine, bounds[0])
        with_seed = without = steps_a = None
        if arm != "none":
            slot = setting.slot
            birth = Command(slot=slot, op=Op.GERMINATE, blueprint=setting.blueprint, ticks=setting.ramp)
            train_to_tick(engine, birth)
            train_to_tick(engine)
            train_to_tick(engine, Command(slot=slot, op=Op.ADVANCE))
            train_to_flops(engine, bounds[1])
            with_seed = float(validation_losses(engine, {slot: 1.0}).mean())
            without = float(validation_losses(engine, {slot: 0.0}).mean())
            steps_a = engine.step
            if arm != "immediate":
                train_to_tick(engine, Command(slot=slot, op=Op.ADVANCE))
        train_to_flops(engine, whole)
        final = float(validation_losses(engine, {}).mean())
        return Outcome(with_seed, without, steps_a, final, engine.step, engine.state.flops or 0)


def _mean_se(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


def table(task: str, outcomes: dict[str, list[Outcome]]) -> Table:
    """Means over seeds with standard errors; differences are paired by seed."""
    seeds = len(outcomes["none"])
    shown = Table(
        title=f"{task}: {seeds} seeds, validation loss in nats", title_justify="left", box=None, padding=(0, 2)
    )
    for head in (
        "arm",
        "A: alpha 1 minus alpha 0",
        "below in",
        "B: minus none",
        "better in",
        "B: loss",
        "steps A / B",
        "MFLOP",
    ):
        shown.add_column(head, justify="left" if head == "arm" else "right")
    for arm, rows in outcomes.items():
        gains = [r.with_seed - r.without_seed for r in rows if r.with_seed is not None and r.without_seed is not None]
        against = [row.final - other.final for row, other in zip(rows, outcomes["none"], strict=True)]
        shown.add_row(
            arm,
            _mean_se(gains) if gains else "-",
            f"{sum(gain < 0 for gain in gains)} of {seeds}" if gains else "-",
            _mean_se(against) if arm != "none" else "-",
            f"{sum(value < 0 for value in against)} of {seeds}" if arm != "none" else "-",
            f"{statistics.fmean(row.final for row in rows):.4f}",
            f"{rows[0].steps_a or '-'} / {rows[0].steps}",
            f"{statistics.fmean(row.flops for row in rows) / 1e6:,.0f}",
        )
    return shown


def main(arguments: list[str]) -> int:
    """Runs the chosen tasks and prints a table for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", default="digits,noisy", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    options = parser.parse_args(arguments)
    unknown = [task for task in options.tasks.split(",") if task not in TASKS]
    if unknown:
        print(f"incubation: --tasks {','.join(unknown)}: there are {', '.join(TASKS)}", file=sys.stderr)
        return 78
    seeds = [int(seed) for seed in options.seeds.split(",")]
    for task in options.tasks.split(","):
        outcomes = {arm: [run(TASKS[task], arm, seed) for seed in seeds] for arm in ARMS}
        Console(width=160).print(table(task, outcomes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
