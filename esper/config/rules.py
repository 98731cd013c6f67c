"""Settings that contradict each other: what no single room can know.

A rule is a pure function of some sections that returns problems, ``section.key = value: problem; fix``. It runs as
soon as its sections are sound by themselves, so that one bad section does not hide what is wrong with the others. The
host is built on the meta device (no memory, no time) to learn which slots it has and whether it takes the data.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from esper.accord.config import SlotsConfig
from esper.config.strict import override_text
from esper.kasmina import blueprints
from esper.kasmina.hosts import HOSTS, CustomHostConfig, InjectionPoint, build_host
from esper.leyline.channels import channels_path
from esper.leyline.errors import ConfigError
from esper.leyline.files import RunDir
from esper.leyline.imports import import_object
from esper.leyline.slots import sort_slots
from esper.leyline.stages import Incubation
from esper.tamiyo.registry import build_controller
from esper.tolaria.data import Cifar10Config, DigitsConfig, ImagesConfig, PySourceConfig, TextConfig
from esper.tolaria.training.distill import DistillConfig

_ANY_SIDE = 1 << 14  # images whose size only the files know


def sample_of(data: Any) -> tuple[tuple[int, ...], int] | None:
    """Shape of one sample, without the batch axis, and number of classes; None where only the files know."""
    match data:
        case PySourceConfig() | TextConfig():
            return (data.block,), 256
        case DigitsConfig():
            return (1, 8, 8), 10
        case Cifar10Config():
            return (data.channels, 32, 32), data.classes
        case ImagesConfig():
            return (data.channels, _ANY_SIDE, _ANY_SIDE), data.classes
    return None


def _points(host: Any, data: Any) -> tuple[InjectionPoint, ...] | None:
    """The host's injection points; None when the data's shape is not known.

    A host of the user's own is not built here: its code may do what the meta device cannot.

    Raises:
        ConfigError: the host does not take the data.
    """
    if isinstance(host, CustomHostConfig):
        return tuple(InjectionPoint(slot=slot, module=name, topology=None) for slot, name in host.sites.items())
    sample = sample_of(data)
    if sample is None:
        return None
    with torch.device("meta"):
        network: Any = build_host(host, *sample)
    return network.injection_points()


def host_slots(host: Any, data: Any) -> tuple[str, ...]:
    """Slot ids of a host on this data, row-major; empty where they cannot be known."""
    try:
        points = _points(host, data)
    except ConfigError:  # `_host_takes_data` reports it
        return ()
    return sort_slots(point.slot for point in points or ())


def ranks_share_a_batch(trainer: Any, world: Any) -> list[str]:
    """Every rank needs a sample in every forward pass of a step."""
    ranks = world.nproc_per_node * world.nnodes
    needed = ranks * trainer.accumulate
    if trainer.batch >= needed:
        return []
    windows = f" x trainer.accumulate = {trainer.accumulate}" if trainer.accumulate > 1 else ""
    return [
        f"trainer.batch = {trainer.batch}: fewer samples than the {ranks} ranks{windows} that share them; "
        f"set trainer.batch={needed} or more, or start fewer ranks (world.nproc_per_node)"
    ]


def host_takes_data(host: Any, data: Any) -> list[str]:
    """The host's input is what the data gives."""
    sample = sample_of(data)
    if sample is None:
        return []
    shape = sample[0]
    if len(shape) == 1 and getattr(host, "block", shape[0]) < shape[0]:
        return [
            f"host.block = {host.block}: shorter than data.block = {shape[0]}; "
            f"set host.block={shape[0]}, or data.block={host.block}"
        ]
    try:
        _points(host, data)
    except ConfigError as error:
        # A host of the user's own cannot be proposed: only the user knows its path.
        builtin = {kind: entry.config() for kind, entry in sorted(HOSTS.items()) if kind != "custom"}
        fitting = [kind for kind, config in builtin.items() if host_slots(config, data)]
        fix = f"set host={fitting[0]}, or choose other data" if fitting else "choose other data"
        return [f"{line}; {fix}" for line in error.problems]
    return []


def own_host_is_there(host: Any) -> list[str]:
    """The function of a host of the user's own can be imported here, so probably on every rank. It is not called:
    what it builds, and where, is its own business until a run starts."""
    if not isinstance(host, CustomHostConfig):
        return []
    try:
        import_object(host.path, "host.path")
    except ConfigError as error:
        return list(error.problems)
    return []


def teacher_is_there(distill: DistillConfig) -> list[str]:
    """A run that teaches lies where it is said to, a function of the user's own can be imported."""
    if distill.path is not None:
        try:
            import_object(distill.path, "distill.path")
        except ConfigError as error:
            return list(error.problems)
    if distill.run is not None and not RunDir(Path(distill.run).expanduser()).config.is_file():
        return [
            f"distill.run = {distill.run!r}: no config.yaml in it, so it is no run; set distill.run=<a run directory>"
        ]
    return []


def pupils_are_slots(host: Any, data: Any, slots: SlotsConfig, distill: DistillConfig) -> list[str]:
    """Features are drawn to the teacher's at slots in use."""
    known = [slot for slot in host_slots(host, data) if not slots.ids or slot in slots.ids]
    return [
        f"distill.features.{slot} = {name!r}: no slot in use; there are {', '.join(known)}"
        for slot, name in (distill.features or {}).items()
        if known and slot not in known
    ]


def slots_are_of_host(host: Any, data: Any, slots: SlotsConfig) -> list[str]:
    """Slots in use exist."""
    known = host_slots(host, data)
    unknown = [slot for slot in slots.ids if slot not in known] if known else []
    if not unknown:
        return []
    return [
        f"slots.ids = {slots.ids!r}: {', '.join(unknown)} is no slot of this host, which has {', '.join(known)}; "
        f"for example slots.ids=[{known[0]}], or slots.ids=[] for all"
    ]


def channels_are_of_slots(host: Any, data: Any, slots: SlotsConfig) -> list[str]:
    """CHANNEL's vectors belong to slots in use."""
    known = [slot for slot in host_slots(host, data) if not slots.ids or slot in slots.ids]
    return [
        f"{channels_path(slot)}: {slot} is no slot in use, which are {', '.join(known)}; set slots.channels=null, or "
        "name one of them"
        for slot in slots.channels or ()
        if known and slot not in known
    ]


def blueprints_exist(host: Any, data: Any, slots: SlotsConfig, controller: Any) -> list[str]:
    """Blueprints that the controller names are registered for features that the slots in use have."""
    try:
        blueprints.load_plugins()
        points = _points(host, data) or ()
    except ConfigError as error:
        return [] if str(error).startswith("host") else [f"controller: {line}" for line in error.problems]
    used = [point for point in points if not slots.ids or point.slot in slots.ids]
    places = {point.topology for point in used if point.topology is not None}
    if len(places) == 0 or any(point.topology is None for point in used):
        return []  # only a forward tells what flows at the sites of a host of the user's own
    named = [("controller.blueprints", name) for name in getattr(controller, "blueprints", ())]
    for index, entry in enumerate(getattr(controller, "actions", ())):
        if isinstance(entry, dict) and isinstance(entry.get("blueprint"), str):
            named.append((f"controller.actions[{index}].blueprint", entry["blueprint"]))
    known = sorted(
        {name for place in places for name in (blueprints.names(place) if place else blueprints.all_names())}
    )
    return [
        f"{path} = {name!r}: no blueprint for the slots in use; registered for them are {', '.join(known)}; "
        f"for example {path}={override_text([known[0]] if path.endswith('blueprints') else known[0])}"
        for path, name in named
        if known and name not in known
    ]


def controller_can_be_built(host: Any, data: Any, slots: SlotsConfig, controller: Any) -> list[str]:
    """What the controller's own constructor says, before anything has started."""
    known = host_slots(host, data)
    used = tuple(slot for slot in slots.ids or known if slot in known)
    if not used:
        return []
    try:
        build_controller(controller, slots=used, seed=0)
    except ConfigError as error:
        return list(error.problems)
    return []


def probe_is_large_enough(gates: Any, data: Any) -> list[str]:
    """Looks draw different samples from the probe part: at most half of it each."""
    size = getattr(data, "probe", None)
    if size is None or 2 * gates.probe_samples <= size:
        return []
    return [
        f"gates.probe_samples = {gates.probe_samples}: the probe part has data.probe = {size} samples, and looks must "
        f"not all see the same ones; set gates.probe_samples={size // 2}, or data.probe={2 * gates.probe_samples}"
    ]


def unused_and_shadow(world: Any, slots: SlotsConfig) -> list[str]:
    """DDP's search for unused parameters sees the host's forward alone, and would miss a seed in its shadow forward."""
    if not world.find_unused or slots.incubation != Incubation.SHADOW:
        return []
    return [
        "world.find_unused = true: does not go with slots.incubation = shadow, whose forward DDP does not see; "
        "set slots.incubation=ste or immediate, or freeze the parameters that get no gradient"
    ]


def warm_up_ends(optim: Any, trainer: Any) -> list[str]:
    """The learning rate reaches its peak within the run."""
    if trainer.steps is None or optim.warmup_steps < trainer.steps or optim.warmup_steps == 0:
        return []
    return [
        f"optim.warmup_steps = {optim.warmup_steps}: the run has trainer.steps = {trainer.steps} and would end in "
        f"warm-up; set optim.warmup_steps={trainer.steps // 10}"
    ]


def births_are_not_waited_for_too_long(library: Any, control: Any) -> list[str]:
    """A rank that waits for a birth must not be taken for a lost one."""
    if not library.enabled or library.wait_s <= control.timeout_s / 2:
        return []
    return [
        f"library.wait_s = {library.wait_s:g}: the other ranks would give this one up after control.timeout_s = "
        f"{control.timeout_s:g}; set library.wait_s={control.timeout_s / 2:g} or less"
    ]


Rule = Callable[..., list[str]]
RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("trainer", "world"), ranks_share_a_batch),
    (("host", "data"), host_takes_data),
    (("host",), own_host_is_there),
    (("distill",), teacher_is_there),
    (("host", "data", "slots"), slots_are_of_host),
    (("host", "data", "slots"), channels_are_of_slots),
    (("host", "data", "slots", "distill"), pupils_are_slots),
    (("host", "data", "slots", "controller"), blueprints_exist),
    (("host", "data", "slots", "controller"), controller_can_be_built),
    (("gates", "data"), probe_is_large_enough),
    (("optim", "trainer"), warm_up_ends),
    (("world", "slots"), unused_and_shadow),
    (("library", "control"), births_are_not_waited_for_too_long),
)
