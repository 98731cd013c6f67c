"""Builds the terms of a run, which never change and by which the reducer judges; for trainer, session and drill."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from esper.accord.account import Costs
from esper.accord.config import CopyInit, GateConfig, SlotsConfig
from esper.accord.evidence.plan import ProbePlan
from esper.accord.state import Terms
from esper.kasmina.axes.site import Site
from esper.kasmina.births.own import describe_reasons, find_fits
from esper.kasmina.blueprints import registry
from esper.kasmina.flops import copy_cost
from esper.kasmina.foldable import find_foldable
from esper.kasmina.memory import SeedMemory, copy_memory
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import CONTAINER
from esper.leyline.alpha import Operator
from esper.leyline.channels import channels_path, parse_channels, summarize_channels, usable_operators
from esper.leyline.costs import SeedCost
from esper.leyline.errors import ConfigError
from esper.leyline.legality import COPY, why_redundant_everywhere
from esper.leyline.observation import BlueprintInfo, HostInfo
from esper.leyline.slots import parse_slot
from esper.tolaria.growth.forecast import Forecast


def places_of(slots: Iterable[str]) -> dict[str, tuple[float, float]]:
    """Row and column of each slot, normalised to [0, 1]."""
    places = {slot: parse_slot(slot) for slot in slots}
    rows = max(place.row for place in places.values()) or 1
    cols = max(place.col for place in places.values()) or 1
    return {slot: (place.row / rows, place.col / cols) for slot, place in places.items()}


def parsed_channels(slots: SlotsConfig) -> dict[str, tuple[float, ...]]:
    """CHANNEL's vectors by slot.

    Raises:
        ConfigError: a vector that cannot be read.
    """
    return {slot: parse_channels(text, channels_path(slot)) for slot, text in (slots.channels or {}).items()}


def set_channels(grown: Grown, slots: SlotsConfig) -> None:
    """Gives each slot its vector of CHANNEL from the settings.

    Raises:
        ConfigError: an unknown slot, or a vector that does not fit the slot's features.
    """
    for slot in slots.channels or ():
        parse_slot(slot, known=grown.slots)
    for slot, values in parsed_channels(slots).items():
        grown.slots[slot].set_channels(values)


def _sorted_infos(infos: tuple[BlueprintInfo, ...], own: BlueprintInfo | None) -> tuple[BlueprintInfo, ...]:
    return tuple(sorted([*infos, *([] if own is None else [own])], key=lambda info: info.name))


def _told_foldable(
    catalogue: Mapping[str, tuple[BlueprintInfo, ...]], foldable: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[BlueprintInfo, ...]]:
    return {
        slot: tuple(replace(info, folds_into=foldable.get(slot, {}).get(info.name)) for info in infos)
        for slot, infos in catalogue.items()
    }


def follow_learning(terms: Terms, grown: Grown) -> None:
    """Brings the terms up to what of the host learns now, which a user may change between two steps; on all ranks."""
    if not terms.gates.allow_foldable:
        terms.catalogue.update(_told_foldable(terms.catalogue, find_foldable(grown)))


def check_preferred(names: Iterable[str], terms: Terms) -> None:
    """Checks that each blueprint that a controller prefers fits some slot, and adds something to it.

    Raises:
        ConfigError: some do not; the text names them and lists the blueprints that fit, or says what one would fold
            into.
    """
    names = tuple(names)
    known = {info.name for catalogue in terms.catalogue.values() for info in catalogue}
    unfit = [name for name in names if name not in known]
    if unfit:
        raise ConfigError(
            f"controller.blueprints: {', '.join(unfit)} fits no slot of this host; it takes "
            f"{', '.join(sorted(known))}; set controller.blueprints to some of these, or to [] for any"
        )
    for name in names:
        if (why := why_redundant_everywhere(name, terms.catalogue.values())) is not None:
            raise ConfigError(f"controller.blueprints: no slot takes {name}: {why}")


def host_info(grown: Grown, costs: Costs | None) -> HostInfo:
    """Size of the bare host in a model, whatever has grown in it."""
    named = grown.model.named_parameters()
    parameters = sum(parameter.numel() for name, parameter in named if not name.startswith(f"{CONTAINER}."))
    return HostInfo(parameters=parameters, flops=None if costs is None else costs.host.forward)


@dataclass(frozen=True, slots=True)
class Copies:
    """Copies of the host's own blocks on offer, by slot.

    Fields:
        infos: entry of the catalogue.
        costs: FLOPs per sample.
        memory: what each needs of it.
        reasons: why a slot without an entry has none.
    """

    infos: Mapping[str, BlueprintInfo] = field(default_factory=dict)
    costs: Mapping[str, SeedCost] = field(default_factory=dict)
    memory: Mapping[str, SeedMemory] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


def find_copies(grown: Grown, slots: SlotsConfig, example: Any) -> Copies:
    """Copies of blocks that the slots can have, if the settings ask for them.

    Args:
        grown: the model.
        slots: its section of the settings.
        example: one batch of the model's inputs.

    Raises:
        ConfigError: they ask for copies, and no slot can have one; the text says of each why.
    """
    if COPY not in slots.blocks:
        return Copies()
    identity = slots.copy_init is CopyInit.IDENTITY
    fits, reasons = find_fits(grown, example, identity=identity, patterns=slots.copy_zero)
    if not fits:
        raise ConfigError(
            f"slots.blocks = {slots.blocks!r}: no slot of this host can have a copy of its block; "
            f"{describe_reasons(reasons)}"
        )
    costs = {slot: copy_cost(grown, slot, fit) for slot, fit in fits.items()}
    infos = {
        slot: BlueprintInfo(name=COPY, parameters=fit.parameters, flops=costs[slot].forward, reach=None)
        for slot, fit in fits.items()
    }
    return Copies(infos, costs, {slot: copy_memory(grown, slot, fit) for slot, fit in fits.items()}, reasons)


def build_terms(
    sites: Mapping[str, Site],
    slots: SlotsConfig,
    gates: GateConfig,
    *,
    probe: ProbePlan,
    host: HostInfo,
    class_logits: bool,
    total_steps: int,
    tick_steps: int,
    max_skips: int,
    world_size: int,
    costs: Costs | None,
    names: tuple[str, ...] | None = None,
    operators: tuple[Operator, ...] | None = None,
    copies: Mapping[str, BlueprintInfo] | None = None,
    foldable: Mapping[str, Mapping[str, str]] | None = None,
    forecast: Forecast | None = None,
) -> Terms:
    """The terms of a run on a model with these sites.

    Args:
        sites: by slot, row-major.
        slots: budgets, planted seeds, CHANNEL's vectors.
        gates: thresholds.
        probe: the looks that the probe affords.
        host: size of the bare host.
        class_logits: whether the model returns logits [B, K >= 2], which CONFIDENCE reads.
        total_steps: optimizer steps of the run.
        tick_steps: nominal optimizer steps between ticks.
        max_skips: skipped steps in a row after which the newest blending seed is pruned.
        world_size: ranks.
        costs: FLOPs per sample; None if none are counted.
        names: blueprints on offer; None for all that are registered.
        operators: operators on offer in every slot; None for all that a slot can use.
        copies: of `find_copies`.
        foldable: of `find_foldable`; None where no host is known.
        forecast: of what seeds take of a rank's memory; None where nobody forecasts it.
    """
    asked, copies = {*slots.blocks, *(slots.planted or {}).values()}, copies or {}
    catalogue = {
        slot: _sorted_infos(registry.catalogue(site.topology, site.dim, site.positions, names, asked), copies.get(slot))
        for slot, site in sites.items()
    }
    if foldable is not None and not gates.allow_foldable:
        catalogue = _told_foldable(catalogue, foldable)
    if forecast is not None:
        catalogue = {
            slot: tuple(
                replace(
                    info,
                    memory=forecast.bytes_of(slot, sites[slot], info.name),
                    shadow=forecast.shadow_of(slot, info.parameters),
                )
                for info in infos
            )
            for slot, infos in catalogue.items()
        }
    offered = {info.name for infos in catalogue.values() for info in infos}
    usable = {
        slot: operators or usable_operators(slot, slots.channels or {}, class_logits=class_logits) for slot in sites
    }
    return Terms(
        slots_config=slots,
        gates=gates,
        probe=probe,
        host=host,
        catalogue=catalogue,
        names=tuple(sorted({*registry.all_names(), *([COPY] if copies else [])} if names is None else offered)),
        operators=usable,
        channels={slot: summarize_channels(values) for slot, values in parsed_channels(slots).items()},
        places=places_of(sites),
        total_steps=total_steps,
        tick_steps=tick_steps,
        max_skips=max_skips,
        world_size=world_size,
        costs=costs,
    )
