"""Sites: the submodules that get a slot, found by name or pattern and described by one dry run."""

import contextlib
import copy
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.slots.feature import Place, place_of, take
from esper.kasmina.slots.regions import region_of
from esper.kasmina.slots.unfit import check_sites
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError
from esper.leyline.slots import parse_slot, sort_slots
from esper.leyline.topology import Topology

CONTAINER = "esper_slots"  # the root's child that holds all slots


@dataclass(frozen=True, slots=True)
class Site:
    """The place of a slot in the host, and the feature there.

    Fields:
        slot: slot id.
        module: dotted name of the host's submodule whose output holds the feature.
        topology: what the axes of the feature mean.
        dim: channels C of the feature.
        shape: shape of one sample's feature in the example, without the batch axis.
        place: place of the feature in the submodule's output, None where it is the whole output.
    """

    slot: str
    module: str
    topology: Topology
    dim: int
    shape: tuple[int, ...]
    place: Place = None

    @property
    def positions(self) -> int:
        """Positions per sample at which a seed is evaluated (H*W, T, or 1)."""
        return math.prod(self.shape) // self.dim


def arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns positional and keyword inputs of a call from a tuple, a dict of keywords, or the one input itself."""
    if isinstance(example, dict):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model is under torch.compile."""
    modules = list(model.modules())
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None or region_of(m) for m in modules)


# names -------------------------------------------------------------------------------------------------------------


def _sites_by_name(model: nn.Module, sites: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(sites, Mapping) or not sites:
        raise ConfigError(
            f"sites = {sites!r}: expected a mapping of slot ids to names of modules, or a pattern of names; "
            'for example {"r0c0": "layer1"}'
        )
    known = dict(model.named_modules())
    chosen = {slot: sites[slot] for slot in sort_slots(sites)}
    for slot, name in chosen.items():
        parse_slot(slot)
        if name not in known:
            near = [other for other in known if other.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
            raise ConfigError(f"slot {slot}: the model has no module {name!r}{_hint(near, list(known))}")
    if len(set(chosen.values())) != len(chosen):
        raise ConfigError("two slots name the same module; each site takes one slot")
    return chosen


def _sites_by_pattern(model: nn.Module, pattern: str) -> list[str]:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"sites = {pattern!r}: not a regular expression ({error})") from None
    known = [name for name, _ in model.named_modules() if name]
    matching = [name for name in known if expression.fullmatch(name)]
    if not matching:
        near = [name for name in known if expression.search(name)]
        bare = re.sub(r"\\d[+*]?|\[0-9\][+*]?", "0", pattern).replace("\\", "")
        near = near or difflib.get_close_matches(bare, known, n=5, cutoff=0.5)
        raise ConfigError(f"sites = {pattern!r} matches no module's whole name{_hint(near, ['', *known])}")
    return matching


def _hint(near: list[str], known: list[str]) -> str:
    return f"; did you mean {', '.join(near[:5])}" if near else f"; it has {list_some(known[1:])}"


def list_some(names: Sequence[str]) -> str:
    """Lists the first eight names, with dots if there are more."""
    return ", ".join([*names[:8], "..."] if len(names) > 8 else names)


# the dry run -------------------------------------------------------------------------------------------------------


def _modules_state(model: nn.Module) -> tuple[dict[str, bool], dict[str, Tensor]]:
    flags = {name: module.training for name, module in model.named_modules()}
    return flags, {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _restore(model: nn.Module, flags: Mapping[str, bool], buffers: Mapping[str, Tensor]) -> None:
    for name, module in model.named_modules():
        module.training = flags[name]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def _forward_once(model: nn.Module, names: list[str], example: Any) -> dict[str, list[Any]]:
    """Returns the outputs of each named module in one forward, in the order in which the modules first returned."""
    fired: dict[str, list[Any]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: fired.setdefault(name, []).append(output)

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        args, kwargs = arguments(example)
        with torch.no_grad():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return fired


def _dry_run(model: nn.Module, where: Mapping[str, str], example: Any) -> dict[str, Any]:
    """Runs one forward in train() and one in eval(): every site must fire exactly once in each.

    Args:
        model: the host.
        where: what an error calls each module, by the module's name.
        example: one batch of inputs, as for `attach`.

    Returns:
        Output by module name, in the order of execution in train().
    """
    check_sites(model, where)
    flags, buffers = _modules_state(model)
    outputs: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.callback(_restore, model, flags, buffers)
        # A fused encoder layer does not call its children, and takes nested tensors, which a layer with hooks cannot.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        for mode in ("train", "eval"):
            model.train(mode == "train")
            fired = _forward_once(model, list(where), copy.deepcopy(example))
            for name, text in where.items():
                times = len(fired.get(name, []))
                if times != 1:
                    raise ConfigError(f"{text} fired {times} times in one {mode}() forward, need exactly once")
            outputs = outputs or {name: returned[0] for name, returned in fired.items()}
    return outputs


def _describe(slot: str, module: str, output: Any) -> Site:
    try:
        place = place_of(output)
    except ValueError as error:
        raise ConfigError(f"site {module!r} of slot {slot} {error}") from None
    feature = take(output, place)
    if feature.is_nested:
        raise ConfigError(f"site {module!r} of slot {slot} returns a nested tensor, need float BCHW, BTC or BC: pad it")
    topology = {t.ndim: t for t in Topology}.get(feature.ndim)
    if topology is None or not feature.is_floating_point():
        shape = f"{feature.dtype} {tuple(feature.shape)}"
        raise ConfigError(f"site {module!r} of slot {slot} returns {shape}, need float BCHW, BTC or BC")
    dim = feature.shape[topology.channel_axis]
    return Site(slot, module, topology, dim, tuple(feature.shape[1:]), place)


def find_sites(model: nn.Module, sites: Mapping[str, str] | str, example: Any) -> dict[str, Site]:
    """Returns the described sites by slot id, row-major; the model is left as it was.

    Raises:
        ConfigError: see `esper.kasmina.attach.attach`.
    """
    if isinstance(sites, str):
        names = _sites_by_pattern(model, sites)
        outputs = _dry_run(model, {name: f"site {name!r} of sites = {sites!r}" for name in names}, example)
        chosen = {f"r{row}c0": name for row, name in enumerate(outputs)}
    else:
        chosen = _sites_by_name(model, sites)
        outputs = _dry_run(model, {n: f"site {n!r} of slot {slot}" for slot, n in chosen.items()}, example)
    return {slot: _describe(slot, name, outputs[name]) for slot, name in chosen.items()}
