"""What the network of a checkpoint is worth on any part of its data or on other data, and what it says of new inputs.

Evaluation runs alone, or on as many ranks as torchrun starts (``torchrun -m esper.cli eval RUN``): each takes its share
of the samples, and sums are added up once.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from esper.config.strict import override_text
from esper.config.tree import EsperConfig, build_config, load_config
from esper.kasmina.blueprints import registry
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.sites import arguments
from esper.leyline.errors import ConfigError, DataError, one_line
from esper.leyline.events.task import MetricInfo, TaskInfo
from esper.leyline.evidence import Reading
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
    try:
        changed = OmegaConf.merge(OmegaConf.create(plain), OmegaConf.from_dotlist(settings))
        found: Any = OmegaConf.to_container(changed, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"--data {' '.join(settings)}: {one_line(error)}") from None
    return found


@dataclass(frozen=True, slots=True)
class _Loaded:
    config: EsperConfig
    bundle: Bundle
    step: int
    grown: Any


def _load(run: Path, at: int | None, settings: list[str], trusted: bool) -> _Loaded:
    files = find_run(run)
    config, plain = load_config(files.config, trusted=trusted, instead="type the command again with --trust")
    if settings:
        config = build_config(_with_settings(plain, settings))
    registry.load_plugins()
    store = CheckpointStore.of_run(run)
    step = choose_step(store, at)
    bundle = bind(load_data(config.data), config.task)
    grown, _, _ = rebuild_run(config, bundle, store, step)
    return _Loaded(config, bundle, step, grown)


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
    loaded = _load(run, at, settings or [], trusted)
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


def _read_inputs(path: Path) -> Tensor | dict[str, Tensor]:
    """Inputs out of a file: one tensor of .npy, .pt, or .csv of numbers without a header; several, by name, of .npz."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as found:
                return {name: torch.from_numpy(found[name]) for name in found.files}
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        if path.suffix == ".pt":
            found = torch.load(path, weights_only=True)
            if not isinstance(found, Tensor):
                raise DataError(f"--input {path}: holds {type(found).__name__}, need one tensor [N, ...]")
            return found
        if path.suffix == ".csv":
            return torch.from_numpy(np.loadtxt(path, delimiter=",", ndmin=2))
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"--input {path}: cannot be read ({one_line(error)})") from None
    raise DataError(f"--input {path}: unknown kind; write .npy, .pt (a tensor), .csv (numbers) or .npz (several)")


def _fit_inputs(found: Tensor | dict[str, Tensor], example: Any, dtype: torch.dtype, source: Path) -> Any:
    """Inputs in the form in which the host takes them: a tensor, a tuple, or a dict of keywords.

    Args:
        found: one tensor, or several by name; those of a tuple in their order.
        example: two inputs.
        dtype: of numbers in the host.
        source: where they are from, for an error.

    Raises:
        DataError: names, number or shapes differ from the example's.
    """
    leaves, spec = tree_flatten(example)
    names = list(example) if isinstance(example, Mapping) else [f"input {place}" for place in range(len(leaves))]
    given = list(found.values()) if isinstance(found, dict) else [found]
    if len(names) != len(leaves) or not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise DataError(f"--input {source}: the host takes a tree of inputs, which no file holds")
    if isinstance(found, dict) and isinstance(example, Mapping):
        if set(found) != set(names):
            raise DataError(f"--input {source}: holds {', '.join(found)}, the host takes {', '.join(names)}")
        given = [found[name] for name in names]
    if len(given) != len(leaves):
        wanted = f"{len(leaves)} ({', '.join(names)})"
        raise DataError(f"--input {source}: holds {len(given)} tensors, the host takes {wanted}; write .npz")
    for name, one, leaf in zip(names, given, leaves, strict=True):
        if one.shape[1:] != leaf.shape[1:] or len(one) != len(given[0]):
            what = "inputs are" if len(leaves) == 1 else f"{name} is"
            raise DataError(f"--input {source}: {what} {list(one.shape)}, the host takes {['N', *leaf.shape[1:]]}")
    pairs = zip(given, leaves, strict=True)
    return tree_unflatten([one.to(dtype if leaf.is_floating_point() else leaf.dtype) for one, leaf in pairs], spec)


def predict_run(run: Path, source: Path, target: Path, *, at: int | None = None, trusted: bool = False) -> str:
    """Writes what the network of a checkpoint says of new inputs.

    Args:
        run: run directory.
        source: inputs as the model takes them, [N, ...]: .npy, .pt or .csv; .npz where it takes several.
        target: a new file: .npz, or .csv where an answer is a number or a row of them.
        at: step of the checkpoint; None for the one that validation chose.
        trusted: as for `evaluate_run`.

    Returns:
        What was written, in a line.

    Raises:
        EsperError: inputs do not fit the model, the task says no answers, or the file is there already.
    """
    if target.suffix not in (".npz", ".csv"):
        raise ConfigError(f"--output {target}: unknown kind; write .npz or .csv")
    if target.exists():
        raise ConfigError(f"--output {target}: it is there already; name another")
    loaded = _load(run, at, [], trusted)
    bundle, task = loaded.bundle, loaded.bundle.learns
    weight = next(loaded.grown.model.parameters())
    inputs = _fit_inputs(_read_inputs(source), bundle.example(), weight.dtype, source)
    count = len(tree_leaves(inputs)[0])
    pieces: list[dict[str, Tensor]] = []
    with evaluating(loaded.grown.model):
        for rows in torch.arange(count).split(loaded.config.trainer.eval_batch):
            args, kwargs = arguments(tree_map_only(Tensor, itemgetter(rows), inputs))
            pieces.append(task.answers(loaded.grown.model(*args, **kwargs)))
    answers = {name: torch.cat([piece[name] for piece in pieces]).cpu().numpy() for name in pieces[0]}
    if target.suffix == ".npz":
        with target.open("xb") as file:
            np.savez(file, **answers)  # type: ignore[arg-type]
    else:
        columns = {name: column.reshape(len(column), -1) for name, column in answers.items()}
        heads = [f"{n}{k}" if c.shape[1] > 1 else n for n, c in columns.items() for k in range(c.shape[1])]
        rows = np.concatenate([column.astype(np.float64) for column in columns.values()], axis=1)
        with target.open("x") as text:
            print(",".join(heads), file=text)
            np.savetxt(text, rows, delimiter=",", fmt="%.10g")
    said = override_text(sorted(answers))
    return f"esper: {count} answers {said} of step {loaded.step} of {run} in {target}"
