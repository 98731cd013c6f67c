"""A native model: the host's own class with more blocks, where everything that grew is a copy of blocks in one list.

    blocks.3 with a copy at full alpha in its slot   ->   blocks.3, and the copy as blocks.4; later ones move up
    layer_idx of attention                           ->   its new place in the list, by which a cache finds its layer
    config.num_hidden_layers, layer_types, depths    ->   of the longer list

The copy is then a block like any other, so that ``save_pretrained`` and ``from_pretrained`` of transformers write and
read it without esper. The result is compared with the grown model's output, bit for bit.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from esper.kasmina.axes.block import OwnBlock
from esper.kasmina.export.copying import copy_model, strip_slots
from esper.kasmina.export.same import check_same, inputs_for, run_plain
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.phases import Phase
from esper.kasmina.slots.sites import CONTAINER
from esper.leyline.errors import ConfigError
from esper.leyline.files import sync

LISTS = (nn.ModuleList, nn.Sequential)


@dataclass(frozen=True, slots=True)
class Native:
    """A native model.

    Fields:
        module: the model, in eval().
        blocks: name of the list of blocks; empty where nothing has grown.
        places: by slot, the index of its copy in the longer list.
    """

    module: nn.Module
    blocks: str
    places: Mapping[str, int]


def _find_copies(grown: Grown) -> dict[str, tuple[str, int]]:
    """The list and the index in it of each site with a copy at full alpha.

    Raises:
        ConfigError: a seed cannot become a block; the text names its slot and says why.
    """
    copies: dict[str, tuple[str, int]] = {}
    for slot, holder in grown.slots.items():
        level = holder.level if holder.overridden is None else holder.overridden
        if holder.seed is None or level == 0.0 or (holder.idle and holder.phase is Phase.OFF):
            continue
        what = f"export --native: slot {slot}"
        if not isinstance(holder.seed, OwnBlock):
            raise ConfigError(f"{what} holds a {type(holder.seed).__name__}, not a copy; export it without native")
        if level != 1.0:
            raise ConfigError(f"{what}: its copy is at alpha {level}; only at 1 is it a block of the network")
        list_name, _, last = grown.sites[slot].module.rpartition(".")
        if not last.isdigit() or not isinstance(grown.model.get_submodule(list_name), LISTS):
            raise ConfigError(f"{what}: its site {grown.sites[slot].module!r} is no entry of a list of modules")
        copies[slot] = list_name, int(last)
    lists = sorted({name for name, _ in copies.values()})
    if len(lists) > 1:
        raise ConfigError(f"export --native: the copies stand in several lists of blocks ({', '.join(lists)})")
    return copies


def native(grown: Grown, example: Any = None) -> Native:
    """Makes the host's own class with more blocks; ``grown`` is left as it is.

    Args:
        grown: any grown model whose active seeds are copies at full alpha.
        example: one batch of inputs to check with; None for the one given to attach.

    Raises:
        ConfigError: a seed cannot become a block, named in the text; or there is no example.
        ExportError: the native model does not compute the same.
    """
    example = grown.example if example is None else example
    if example is None:
        raise ConfigError("export needs an example of the model's input: grown.export(example, native=True)")
    copies = _find_copies(grown)
    name = next((list_name for list_name, _ in copies.values()), "")
    inputs = inputs_for(grown.model, example)
    model = copy_model(grown.model)
    with torch.no_grad():
        before = run_plain(model, inputs)
    seeds = {slot: model.get_submodule(f"{CONTAINER}.{slot}.seed.block") for slot in copies}
    strip_slots(model)
    places = _lengthen(model, name, copies, seeds) if copies else {}
    with torch.no_grad():
        check_same(before, run_plain(model.eval(), inputs), exact=True)
    return Native(model, name, places)


def _lengthen(
    model: nn.Module, name: str, copies: Mapping[str, tuple[str, int]], seeds: Mapping[str, nn.Module]
) -> dict[str, int]:
    """Puts the copies into the list of blocks, in place; returns by slot the index of each."""
    blocks, places = model.get_submodule(name), {}
    old = list(blocks.children())
    longer: list[nn.Module] = []
    for index, block in enumerate(old):
        longer.append(block)
        for slot in (slot for slot, (_, at) in copies.items() if at == index):
            places[slot] = len(longer)
            longer.append(seeds[slot])
    _renumber(old, longer)
    blocks._modules.clear()
    blocks._modules.update({str(index): block for index, block in enumerate(longer)})
    for module in model.modules():
        _lengthen_config(getattr(module, "config", None), name, [at for _, at in copies.values()], len(old))
    return places


def _renumber(old: list[nn.Module], longer: list[nn.Module]) -> None:
    """Sets ``layer_idx`` to the place in the longer list, where a host numbers its blocks."""
    numbers = [
        {m.layer_idx for m in block.modules() if isinstance(getattr(m, "layer_idx", None), int)} for block in old
    ]
    if not any(numbers):
        return
    if any(found != {index} for index, found in enumerate(numbers)):
        raise ConfigError("export --native: the host does not number its blocks by their places in the list")
    for index, block in enumerate(longer):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]


def _lengthen_config(config: Any, name: str, after: list[int], length: int) -> None:
    """Makes a config of transformers say that there are more blocks; one that several modules share is changed once."""
    if config is None or not hasattr(config, "to_dict"):
        return
    wanted = length + len(after)
    if getattr(config, "num_hidden_layers", None) == length:
        config.num_hidden_layers = wanted
        types = getattr(config, "layer_types", None)
        if isinstance(types, list) and len(types) == length:
            longer = [[kind] * (1 + after.count(index)) for index, kind in enumerate(types)]
            config.layer_types = [kind for kinds in longer for kind in kinds]
    stage = [int(part) for part in name.split(".") if part.isdigit()]
    depths = getattr(config, "depths", None)
    if isinstance(depths, list) and stage and stage[0] < len(depths) and depths[stage[0]] == length:
        config.depths = [*depths[: stage[0]], wanted, *depths[stage[0] + 1 :]]


def save_native(made: Native, folder: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> Path:
    """Writes a native model: by its own ``save_pretrained`` where it has one, else ``model.safetensors``.

    Args:
        made: from `native`.
        folder: a new or empty one.
        about: the caller's own plain data, for native.json.

    Raises:
        FileExistsError: the folder holds something.
        OSError: the folder cannot be written.
    """
    place = Path(folder).absolute()
    if place.exists() and not (place.is_dir() and not any(place.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists already; name a new folder", str(folder))
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        model: Any = pretrained_of(made.module)
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(partial)
        else:
            seen: set[int] = set()
            tensors = {}
            for name, tensor in model.state_dict().items():
                if tensor.data_ptr() not in seen:
                    tensors[name] = tensor.detach().cpu().contiguous()
                seen.add(tensor.data_ptr())
            save_file(tensors, partial / "model.safetensors")
        record = {"blocks": made.blocks, "places": dict(made.places), "about": dict(about or {})}
        (partial / "native.json").write_text(json.dumps(record, indent=1) + "\n")
        sync(partial)
        with contextlib.suppress(FileNotFoundError):
            place.rmdir()
        partial.rename(place)
        sync(place.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place


def pretrained_of(model: nn.Module) -> nn.Module:
    """The model of transformers in a host of kind ``hf``; any other model itself."""
    inner = getattr(model, "model", None)
    wrapped = type(model).__module__.startswith("esper.") and isinstance(inner, nn.Module)
    return inner if wrapped and inner is not None else model
