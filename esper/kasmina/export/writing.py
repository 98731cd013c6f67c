"""Writes an exported model to disk, for use where esper is not installed.

    FOLDER/model.safetensors   the state dict; of tensors with several names the first (``tied`` in topology.json)
    FOLDER/topology.json       format, what grew where, keys, inputs and outputs, files with SHA-256, how to load
    FOLDER/program.pt2         the whole model by torch.export, for eval(); loading it needs no class but torch's; what
                               sizes of its inputs are free (batch, length), topology.json says
    FOLDER/module.pt           if torch.export cannot write it: the pickled module, which needs its classes' packages

The folder is written beside its place under another name, read back, compared, and renamed, so that it is there either
whole or not at all.
"""

import contextlib
import errno
import hashlib
import json
import os
import pickletools
import shutil
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from esper.kasmina.axes.feature import tensors_in
from esper.kasmina.export.copying import deep_copy
from esper.kasmina.export.program import FreeSize, tensors_by_path, write_program
from esper.kasmina.export.record import Exported
from esper.kasmina.export.same import Inputs, check_same, run_plain
from esper.kasmina.export.tracing import package_of
from esper.leyline.errors import ConfigError, ExportError, one_line
from esper.leyline.files import sync, write_synced
from esper.leyline.plain import to_plain

FORMAT = 1
WEIGHTS, TOPOLOGY, PROGRAM, PICKLE = "model.safetensors", "topology.json", "program.pt2", "module.pt"
_LOAD = {
    PROGRAM: "torch.export.load('program.pt2').module() computes what the model does in eval() and needs torch alone: "
    "containers in its output are plain dicts, lists and tuples, and entries of other kinds (caches) are left out",
    PICKLE: "torch.load('module.pt', weights_only=False); it runs code of the file, so load only what you trust, and "
    "needs the packages under 'needs'",
    WEIGHTS: "safetensors.torch.load_file('model.safetensors'); add the names under 'tied' for load_state_dict",
}


def _batch(example: Inputs, free: Sequence[FreeSize]) -> str:
    """Returns "any" if the first axis of all tensors is free, else the one batch size that the program takes."""
    tensors = tensors_by_path(example)
    if any({path for path, axis in size.axes if axis == 0} == set(tensors) for size in free):
        return "any"
    sizes = {x.shape[0] if x.ndim else None for x in tensors.values()}
    return str(sizes.pop() if len(sizes) == 1 else None)


def _describe_free(free: Sequence[FreeSize]) -> list[dict[str, Any]]:
    """Describes free sizes in plain data: where they are, and their smallest and largest value."""

    def words(path: str, axis: int) -> str:
        return f"{'args' if path.startswith('[0]') else 'kwargs'}{path[3:]}, axis {axis}"

    return [
        {"sizes": [words(path, axis) for path, axis in size.axes], "least": size.least, "most": size.most}
        for size in free
    ]


def _strings_in(path: Path) -> set[str]:
    """Returns every string in the pickles of a torch.save file, which include the names of classes."""
    with zipfile.ZipFile(path) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    return {arg for data in pickles for _, arg, _ in pickletools.genops(data) if isinstance(arg, str)}


def _write_pickle(module: nn.Module, exported: Exported, path: Path) -> None:
    """Writes module.pt and reads it back.

    Raises:
        ExportError: the file names esper, or computes something else.
        Exception: any error of pickle.
    """
    torch.save(module, path)
    ours = sorted(s for s in _strings_in(path) if s.startswith("esper.") or "from esper" in s or "import esper" in s)
    if ours:
        raise ExportError(f"the module still needs {ours[0].splitlines()[0]}")
    with torch.no_grad():
        loaded = torch.load(path, weights_only=False)
        check_same(run_plain(module, exported.example), run_plain(loaded, exported.example), exact=True)


def _find_tied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors by their first name, and the first name for every other name of a tensor."""
    first: dict[tuple[Any, ...], str] = {}
    tensors, tied = {}, {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()))
        if tensor.numel() and place in first:
            tied[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, tied


def _describe(value: Any) -> Any:
    """Describes inputs in plain data: dtype and shape of a tensor, a plain value itself, else the name of the type."""
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if isinstance(value, dict):
        return {str(key): _describe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_describe(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__


def _sync_and_hash(folder: Path) -> dict[str, Any]:
    """Syncs the files of a folder to disk; returns their sizes and SHA-256."""
    files = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            files[path.name] = {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        sync(path)
    return files


def _write_files(folder: Path, exported: Exported, about: Mapping[str, Any]) -> None:
    """Writes the files into an empty folder."""
    module = deep_copy(exported.module).to("cpu").eval()
    inputs, output = tree_map_only(Tensor, Tensor.cpu, (exported.example, exported.output))
    here = Exported(
        module=module, slots=exported.slots, keys=exported.keys, example=inputs, output=output, exact=exported.exact
    )
    state = module.state_dict()
    extra = [name for name, value in state.items() if not isinstance(value, Tensor)]
    tensors, tied = _find_tied({name: value for name, value in state.items() if name not in extra})
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    name, refused = PROGRAM, None
    free: list[FreeSize] | None = None
    try:
        free = write_program(module, here, folder / PROGRAM)
    except Exception as error:
        name, refused = PICKLE, one_line(error)
        (folder / PROGRAM).unlink(missing_ok=True)
        try:
            _write_pickle(module, here, folder / PICKLE)
        except ExportError:
            raise
        except Exception as second:
            raise ConfigError(
                f"neither torch.export ({refused}) nor pickle ({one_line(second)}) can write this model; "
                "use the module that export returns"
            ) from second
    needs = {package_of(part) for part in module.modules()} if name == PICKLE else set()
    record = {
        "format": FORMAT,
        "torch": torch.__version__,
        "load": {WEIGHTS: _LOAD[WEIGHTS], name: _LOAD[name]},
        "needs": sorted((needs | {"torch"}) - set(sys.stdlib_module_names)),
        "torch_export_refused": refused,
        "batch": "any" if free is None else _batch(inputs, free),
        "free": None if free is None else _describe_free(free),
        "inputs": {"args": _describe(inputs[0]), "kwargs": _describe(inputs[1])},
        "outputs": [_describe(tensor) for tensor in tensors_in(output)],
        "exact": exported.exact,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "slots": to_plain(list(exported.slots)),
        "keys": dict(exported.keys),
        "tied": tied,
        **({"not_in_weights": extra} if extra else {}),
        "about": dict(about),
        "files": _sync_and_hash(folder),
    }
    write_synced(folder / TOPOLOGY, json.dumps(record, indent=1) + "\n")


def save_exported(exported: Exported, folder: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> Path:
    """Writes an exported model; see the module's docstring for the files.

    Args:
        exported: from `esper.kasmina.export.exporter.export`.
        folder: a new or empty one.
        about: the caller's own plain data, for topology.json.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something.
        OSError: the folder cannot be written.
        ConfigError: neither torch.export nor pickle takes the model, or ``exported`` does not come from `export`.
        ExportError: the written model computes something else.
    """
    if not isinstance(exported, Exported):
        raise ConfigError(
            f"save_exported: got {type(exported).__name__}, expected what esper.kasmina.export.export(grown) returned"
        )
    place = Path(folder).absolute()
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists already; name a new folder", str(folder))
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write_files(partial, exported, about or {})
        sync(partial)
        with contextlib.suppress(FileNotFoundError):
            place.rmdir()
        partial.rename(place)
        sync(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place
