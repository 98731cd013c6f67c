"""What the network of a checkpoint is worth, on any part of its data or on other data.

Evaluation runs alone, or on as many ranks as torchrun starts (``torchrun -m esper.cli eval RUN``): each takes its share
of the samples, and sums are added up once.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.table import Table

from esper.config.tree import EsperConfig, build_config, load_config
from esper.kasmina.blueprints import registry
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import ConfigError, DataError, one_line
from esper.leyline.events.task import MetricInfo, TaskInfo
from esper.leyline.evidence import Reading
from esper.leyline.files import RunDir
from esper.run.directory import find_run
from esper.run.export import choose_step
from esper.run.rebuild import rebuild_run
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data import load_data
from esper.tolaria.data.parts import PART_NAMES, Bundle
from esper.tolaria.ranks.config import Device
from esper.tolaria.ranks.world import World
from esper.tolaria.tasks.bind import bind
from esper.tolaria.training.evaluate import Evaluator
from esper.tolaria.training.result import read_part


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a network is worth on a part.

    Fields:
        run: run directory.
        step: of the checkpoint.
        part: of the data.
        data: digest of the data, as ranks compare it.
        samples: how many were measured.
        task: names, units and directions.
        loss: its mean and standard error.
        accuracy: the same; absent where there is no right or wrong.
        metrics: of the task, by name.
    """

    run: str
    step: int
    part: str
    data: int
    samples: int
    task: TaskInfo
    loss: Reading
    accuracy: Reading
    metrics: dict[str, float]

    def table(self) -> Table:
        """The numbers as a table."""
        table = Table(box=box.SIMPLE_HEAD, title=f"{self.run}, step {self.step}: {self.part}, {self.samples} samples")
        for head in ("", "value", "standard error"):
            table.add_column(head, justify="left" if not head else "right")
        rows = [("loss", self.loss, MetricInfo(name="loss", unit=self.task.unit, higher=False))]
        if self.task.graded:
            rows.append(("accuracy", self.accuracy, MetricInfo(name="accuracy", unit="share")))
        for name, reading, info in rows:
            cells = ("-" if value is None else info.show(value) for value in (reading.value, reading.se))
            table.add_row(name, *cells)
        for info in self.task.metrics:
            value = self.metrics.get(info.name)
            table.add_row(info.name, "-" if value is None else info.show(value), "")
        return table

    def text(self) -> str:
        """The numbers as JSON."""
        return json.dumps(asdict(self), indent=1, default=str)


def _with_settings(plain: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """A run's settings under other ones of its data.

    Raises:
        ConfigError: a setting is none of ``data``, or cannot be read.
    """
    wrong = [text for text in settings if not text.startswith("data.") or "=" not in text]
    if wrong:
        raise ConfigError(f"--data {wrong[0]}: write data.<setting>=<value>, for example data.root=/other/folder")
    kind = next((text for text in settings if text.startswith("data.kind=")), None)
    if kind is not None:
        raise ConfigError(f"--data {kind}: this run's network takes data={plain['data']['kind']}; leave it out")
    try:
        changed = OmegaConf.merge(OmegaConf.create(plain), OmegaConf.from_dotlist(settings))
        found: Any = OmegaConf.to_container(changed, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"--data {' '.join(settings)}: {one_line(error)}") from None
    return found


@dataclass(frozen=True, slots=True)
class Trained:
    """The network of a checkpoint.

    Fields:
        config: of its run, with the settings of other data if there are any.
        bundle: the data that it is measured on.
        step: of the checkpoint.
        grown: the network; its weights are the average of them where that is what the run validated.
    """

    config: EsperConfig
    bundle: Bundle
    step: int
    grown: Grown


def load_trained(run: Path, at: int | None, settings: list[str], trusted: bool) -> Trained:
    """Rebuilds the network of a checkpoint; see `evaluate_run` for the arguments."""
    files = find_run(run)
    config, plain = load_config(files.config, trusted=trusted, instead="type the command again with --trust")
    changed = build_config(_with_settings(plain, settings)) if settings else config
    registry.load_plugins()
    store = CheckpointStore.of_run(run)
    step = choose_step(store, at)
    own, bundle = _own_and_other(config, changed, files)
    grown, _, _ = rebuild_run(config, own, store, step, averaged=config.trainer.ema_validate)
    return Trained(changed, bundle, step, grown)


def _own_and_other(config: EsperConfig, changed: EsperConfig, files: RunDir) -> tuple[Bundle, Bundle]:
    """The data that a run was trained on, and other ones for the same network.

    Other data are made into inputs and targets by what the run's own training part holds: by its mean and deviation,
    its names of classes, its class weights. Where the other data are the run's own in another place, they are both.

    Raises:
        DataError: one of them cannot be read.
    """
    try:
        own = bind(load_data(config.data), config.task)
        if changed is config:
            return own, own
    except DataError as error:
        if changed is config:
            raise
        moved = bind(load_data(changed.data), config.task)
        if moved.digest == _kept_digest(files):
            return moved, moved
        raise DataError(
            f"{error}; other data are made into inputs as the run's own training part was, which must be there, too"
        ) from None
    other = load_data(changed.data, own.record.get("learned"))
    return own, bind(replace(other, classes=own.classes), config.task, own.learns)


def _kept_digest(files: RunDir) -> int | None:
    try:
        found: int | None = json.loads(files.data.read_text())["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def evaluate_run(
    run: Path, *, at: int | None = None, part: str = "test", settings: list[str] | None = None, trusted: bool = False
) -> Evaluation:
    """Measures the network of a checkpoint on a whole part, on this rank's CPU.

    Args:
        run: run directory.
        at: step of the checkpoint; None for the one that validation chose.
        part: ``train``, ``validation``, ``probe`` or ``test``.
        settings: other settings of the data, as ``data.root=/other``.
        trusted: whether the run may name code even if its config.yaml is not the caller's own.

    Returns:
        The same on every rank.

    Raises:
        EsperError: it cannot be measured.
    """
    if part not in PART_NAMES:
        raise ConfigError(f"--part {part}: no such part; there are {', '.join(PART_NAMES)}")
    loaded = load_trained(run, at, settings or [], trusted)
    config, bundle = loaded.config, loaded.bundle
    world = World(replace(config.world, device=Device.CPU), config.control)
    try:
        evaluator = Evaluator(
            loaded.grown,
            bundle,
            world,
            precision=config.trainer.precision,
            batch=config.trainer.eval_batch,
            seed=config.seed,
        )
        chosen = getattr(bundle, part)
        scores = read_part(evaluator, chosen, world, 0)
    finally:
        world.close()
    return Evaluation(
        run=str(run),
        step=loaded.step,
        part=part,
        data=bundle.digest,
        samples=len(chosen),
        task=evaluator.task.info(config.trainer.objective),
        loss=scores.loss,
        accuracy=scores.accuracy,
        metrics=scores.metrics,
    )
