"""Sites: the submodules that get a slot, found by name or pattern and described by one dry run."""

import contextlib
import copy
import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.axes.causal import find_causal
from esper.kasmina.axes.dryrun import run_sites
from esper.kasmina.axes.example import Example
from esper.kasmina.axes.feature import Place, place_of, take
from esper.kasmina.axes.forward import Forward, Watch
from esper.kasmina.axes.layout import RANKS, Findings, LayoutFinder
from esper.kasmina.axes.site import Site
from esper.kasmina.slots.regions import region_of
from esper.kasmina.slots.unfit import check_sites
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError
from esper.leyline.slots import parse_slot, sort_slots
from esper.leyline.topology import LAYOUTS, topology_of

CONTAINER = "esper_slots"  # the root's child that holds all slots


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


@dataclass(slots=True)
class _DryRun:
    """The dry run of a host, while it lasts.

    Fields:
        outputs: output by module name, in the order of execution in train().
        example: the inputs.
        forward: runs the host in eval() on other inputs, each time from the same buffers and random streams.
        model: the host.
    """

    model: nn.Module
    example: Example
    outputs: dict[str, Any]
    forward: Forward

    def find(self, names: list[str], where: Mapping[str, str]) -> Findings:
        """The layouts of the sites in ``where``."""
        return LayoutFinder(Watch(self.model, names, self.forward), self.example, where).find()

    def find_causal(self, features: Mapping[str, Tensor], found: Findings) -> dict[str, bool]:
        """Whether the host is causal at the sites in ``features``."""
        return find_causal(Watch(self.model, list(features), self.forward), self.example, features, found)


@contextlib.contextmanager
def _dry_run(model: nn.Module, where: Mapping[str, str], example: Any, may_skip: Collection[str]) -> Iterator[_DryRun]:
    """Runs the host in train() and in eval(): every site must fire exactly once in each forward, with gradients.

    Within the block the host may run again; after it, flags, buffers and random streams are as they were.

    Args:
        model: the host.
        where: what an error calls each module, by the module's name.
        example: one batch of inputs, as for `attach`.
        may_skip: names of modules that a forward in train() may leave out.
    """
    check_sites(model, where)
    flags, buffers = _modules_state(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.callback(_restore, model, flags, buffers)
        # A fused encoder layer does not call its children, and takes nested tensors, which a layer with hooks cannot.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        outputs = run_sites(model, where, arguments(example), may_skip)

        def forward(varied: Example) -> Any:
            _restore(model, dict.fromkeys(flags, False), buffers)
            args, kwargs = copy.deepcopy(varied)
            with undisturbed(model, seed=0), torch.no_grad():
                return model(*args, **kwargs)

        yield _DryRun(model, arguments(example), outputs, forward)


def _feature_of(slot: str, module: str, output: Any) -> tuple[Place, Tensor]:
    try:
        place = place_of(output)
    except ValueError as error:
        raise ConfigError(f"site {module!r} of slot {slot} {error}") from None
    feature = take(output, place)
    if feature.is_nested:
        raise ConfigError(f"site {module!r} of slot {slot} returns a nested tensor, need float {LAYOUTS}: pad it")
    if feature.ndim not in RANKS or not feature.is_floating_point():
        shape = f"{feature.dtype} {tuple(feature.shape)}"
        raise ConfigError(f"site {module!r} of slot {slot} returns {shape}, need float {LAYOUTS}")
    return place, feature


def _asked_layouts(asked: Mapping[str, str] | str | None, slots: Sequence[str]) -> dict[str, str]:
    """The layouts that the caller gave, by slot."""
    if asked is None:
        return {}
    if isinstance(asked, str):
        asked = dict.fromkeys(slots, asked)
    if not isinstance(asked, Mapping):
        raise ConfigError(f'layout = {asked!r}: expected letters such as "TBC", or a mapping of slot ids to them')
    for slot, layout in asked.items():
        parse_slot(slot, known=slots)
        topology_of(layout, f"layout of {slot}")
    return dict(asked)


def _check_asked(slot: str, feature: Tensor, layout: str, module: str) -> None:
    if len(layout) != feature.ndim:
        raise ConfigError(
            f"layout of {slot} = {layout!r}: site {module!r} returns {tuple(feature.shape)}, give one letter per axis"
        )


def _describe(
    dry: "_DryRun", chosen: Mapping[str, str], asked: dict[str, str], what: Mapping[str, str]
) -> dict[str, Site]:
    found = {slot: _feature_of(slot, name, dry.outputs[name]) for slot, name in chosen.items()}
    for slot, layout in asked.items():
        _check_asked(slot, found[slot][1], layout, chosen[slot])
    open_ = {name: what[name] for slot, name in chosen.items() if slot not in asked}
    findings = dry.find(list(chosen.values()), open_) if open_ else Findings({})
    findings.layouts |= {chosen[slot]: layout for slot, layout in asked.items()}
    timed = {chosen[s]: f for s, (_, f) in found.items() if topology_of(findings.layouts[chosen[s]]).has_length}
    causal = dry.find_causal(timed, findings)
    sites = {}
    for slot, name in chosen.items():
        place, feature = found[slot]
        layout = findings.layouts[name]
        topology = topology_of(layout)
        shape = tuple(feature.shape[layout.index(letter)] for letter in topology.value)
        dim = shape[topology.channel_axis]
        sites[slot] = Site(slot, name, topology, dim, shape[1:], place, layout, causal.get(name, True))
    return sites


def _names_to_skip(asked: Collection[str] | bool, named: Mapping[str, str]) -> frozenset[str]:
    """Names of the modules that train() may leave out; ``named`` is by slot, or by name where slots have no ids yet."""
    if isinstance(asked, bool):
        return frozenset(named.values()) if asked else frozenset()
    if isinstance(asked, str) or not all(isinstance(slot, str) for slot in asked):
        raise ConfigError(f'may_skip = {asked!r}: expected slot ids such as ["r0c0"], or True for all slots')
    for slot in asked:
        parse_slot(slot, known=named)
    return frozenset(named[slot] for slot in asked)


def find_sites(
    model: nn.Module,
    sites: Mapping[str, str] | str,
    example: Any,
    layout: Mapping[str, str] | str | None = None,
    may_skip: Collection[str] | bool = False,
) -> dict[str, Site]:
    """Returns the described sites by slot id, row-major; the model is left as it was.

    Raises:
        ConfigError: see `esper.kasmina.attach.attach`.
    """
    if isinstance(sites, str):
        what = {name: f"site {name!r} of sites = {sites!r}" for name in _sites_by_pattern(model, sites)}
        named = {name: name for name in what}
        if may_skip and may_skip is not True:
            raise ConfigError(f"may_skip = {may_skip!r}: sites is a pattern; say True for all, or name the sites")
    else:
        named = _sites_by_name(model, sites)
        what = {name: f"site {name!r} of slot {slot}" for slot, name in named.items()}
    skipping = _names_to_skip(may_skip, named)
    with _dry_run(model, what, example, skipping) as dry:
        chosen = named if not isinstance(sites, str) else {f"r{row}c0": name for row, name in enumerate(dry.outputs)}
        found = _describe(dry, chosen, _asked_layouts(layout, list(chosen)), what)
    return {slot: replace(site, may_skip=site.module in skipping) for slot, site in found.items()}
