"""What the network of a checkpoint says of new inputs, in the number format in which its run computed."""

import csv
import io
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from esper.config.strict import override_text
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.sites import arguments
from esper.leyline.errors import ConfigError, DataError, one_line
from esper.leyline.files import write_whole
from esper.run.using.evaluation import load_trained
from esper.tolaria.data.own.table import encode_rows
from esper.tolaria.data.parts import Bundle
from esper.tolaria.training.precision import autocast

TABLES = (".csv", ".parquet")


def _read_inputs(path: Path, learned: Mapping[str, Any]) -> Tensor | dict[str, Tensor]:
    """Inputs out of a file: one tensor of .npy, .pt, or .csv of numbers without a header; several, by name, of .npz.

    Where the run's data are a table, .csv and .parquet are one, too, and its rows are made into inputs as those were.
    """
    if "columns" in learned and path.suffix in TABLES:
        try:
            return encode_rows(path, learned)
        except DataError as error:
            raise DataError(f"--input {error}") from None
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


def _named(answers: dict[str, np.ndarray], learned: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Answers with classes as the data have them: by name, or by the whole numbers that are their names."""
    names = learned.get("classes")
    if not names or "class" not in answers:
        return answers
    whole = all(name.isdigit() for name in names)
    return {**answers, "class": np.array(names, dtype=np.int64 if whole else np.str_)[answers["class"]]}


def _write(target: Path, answers: dict[str, np.ndarray]) -> None:
    content = _as_csv(answers) if target.suffix == ".csv" else lambda file: np.savez(file, **answers)  # type: ignore[arg-type]
    try:
        write_whole(target, content)
    except OSError as error:
        raise DataError(f"--output {target}: cannot be written ({error.strerror or error})") from None


def _as_csv(answers: dict[str, np.ndarray]) -> str:
    columns = {name: column.reshape(len(column), -1) for name, column in answers.items()}
    heads = [f"{n}{k}" if c.shape[1] > 1 else n for n, c in columns.items() for k in range(c.shape[1])]
    texts = [c if c.dtype.kind == "U" else np.char.mod("%.10g", c.astype(np.float64)) for c in columns.values()]
    file = io.StringIO(newline="")
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(np.concatenate(texts, axis=1).tolist())
    return file.getvalue()


def predict_run(run: Path, source: Path, target: Path, *, at: int | None = None, trusted: bool = False) -> str:
    """Writes what the network of a checkpoint says of new inputs.

    Args:
        run: run directory.
        source: inputs as the model takes them, [N, ...]: .npy, .pt or .csv; .npz where it takes several. Of a run whose
            data are a table: a table with its columns.
        target: a new file: .npz, or .csv where an answer is a number or a row of them.
        at: step of the checkpoint; None for the one that validation chose.
        trusted: as for `evaluate_run`.

    Returns:
        What was written, in a line.

    Raises:
        EsperError: inputs do not fit the model, the task says no answers, or the file is there already or cannot be
            written, which leaves none.
    """
    if target.suffix not in (".npz", ".csv"):
        raise ConfigError(f"--output {target}: unknown kind; write .npz or .csv")
    if target.exists():
        raise ConfigError(f"--output {target}: it is there already; name another")
    loaded = load_trained(run, at, [], trusted)
    bundle: Bundle = loaded.bundle
    learned, precision = bundle.record.get("learned", {}), loaded.config.trainer.precision
    weight = next(loaded.grown.model.parameters())
    inputs = _fit_inputs(_read_inputs(source, learned), bundle.example(), weight.dtype, source)
    count = len(tree_leaves(inputs)[0])
    pieces: list[dict[str, Tensor]] = []
    with evaluating(loaded.grown.model), autocast(precision, weight.device):
        for rows in torch.arange(count).split(loaded.config.trainer.eval_batch):
            args, kwargs = arguments(tree_map_only(Tensor, itemgetter(rows), inputs))
            pieces.append(bundle.learns.answers(loaded.grown.model(*args, **kwargs)))
    joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    answers = {name: (one.float() if one.dtype.itemsize == 2 else one).numpy() for name, one in joined.items()}
    _write(target, _named(answers, learned))
    said = override_text(sorted(answers))
    return f"esper: {count} answers {said} of step {loaded.step} of {run} in {target}"
