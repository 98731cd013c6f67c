"""Rules across sections: settings that contradict each other, which no single section can notice.

A rule is a pure function of some sections that returns problems, ``section.key = value: problem; fix``. It is named by
what must hold. It runs if its sections are valid by themselves, so that one bad section does not hide the problems of
the others. The host is built on the meta device (no memory, no time) to learn which slots it has and whether it takes
the data.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper.accord.config import SlotsConfig
from esper.accord.evidence.plan import check_plan, plan_probe
from esper.config.fitting import host_fits_task, task_fits_data
from esper.config.points import host_slots, points_of
from esper.config.samples import sample_of
from esper.config.strict import override_text
from esper.kasmina import blueprints
from esper.kasmina.hosts import HOSTS
from esper.leyline.channels import channels_path
from esper.leyline.errors import ConfigError
from esper.leyline.files import RunDir
from esper.leyline.imports import import_object
from esper.leyline.legality import COPY
from esper.leyline.stages import Incubation
from esper.tamiyo.registry import build_controller
from esper.tolaria.data import CustomDataConfig
from esper.tolaria.data.configs import Target
from esper.tolaria.tasks import OfDataConfig
from esper.tolaria.training.distill_config import DistillConfig


def ranks_share_a_batch(trainer: Any, world: Any) -> list[str]:
    """Every rank gets a sample in every forward pass of a step."""
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
    """The host accepts samples of the data's shape."""
    sample = sample_of(data)
    if sample is None:
        return []
    shape = sample[0]
    if len(shape) == 1 and getattr(host, "block", shape[0]) < shape[0]:
        of_data = hasattr(data, "block")
        what = f"data.block = {shape[0]}" if of_data else f"the data's sequences of {shape[0]}"
        other = f", or data.block={host.block}" if of_data else ""
        return [f"host.block = {host.block}: shorter than {what}; set host.block={shape[0]}{other}"]
    try:
        points_of(host, data)
    except ConfigError as error:
        # A custom host cannot be proposed: only the user knows its path.
        builtin = {kind: entry.config() for kind, entry in sorted(HOSTS.items()) if kind not in ("custom", "hf")}
        fitting = [kind for kind, config in builtin.items() if host_slots(config, data)]
        fix = f"set host={fitting[0]}, or choose other data" if fitting else "choose other data"
        return [f"{line}; {fix}" for line in error.problems]
    return []


def own_code_can_be_imported(**sections: Any) -> list[str]:
    """What a custom host, data or task names can be imported here, and so probably on every rank. It is not called
    here: what it builds, and where, is its own business until a run starts."""
    lines: list[str] = []
    for section, config in sections.items():
        if config.kind == "custom":
            try:
                import_object(config.path, f"{section}.path")
            except ConfigError as error:
                lines += error.problems
    return lines


def teacher_can_be_found(distill: DistillConfig) -> list[str]:
    """The teacher's run exists, or the user's function that builds the teacher can be imported."""
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


def origin_is_a_run(trainer: Any) -> list[str]:
    """The run to go on from is a run directory."""
    run = trainer.resume_from
    if run is not None and not RunDir(Path(run).expanduser()).config.is_file():
        return [f"trainer.resume_from = {run!r}: no config.yaml in it, so it is no run; name a run directory"]
    return []


def distilled_features_are_of_slots(host: Any, data: Any, slots: SlotsConfig, distill: DistillConfig) -> list[str]:
    """Features that are drawn towards the teacher's belong to slots in use."""
    known = [slot for slot in host_slots(host, data) if not slots.ids or slot in slots.ids]
    return [
        f"distill.features.{slot} = {name!r}: no slot in use; there are {', '.join(known)}"
        for slot, name in (distill.features or {}).items()
        if known and slot not in known
    ]


def slots_are_of_host(host: Any, data: Any, slots: SlotsConfig) -> list[str]:
    """The slots in use are slots of the host."""
    known = host_slots(host, data)
    unknown = [slot for slot in slots.ids if slot not in known] if known else []
    if not unknown:
        return []
    return [
        f"slots.ids = {slots.ids!r}: {', '.join(unknown)} is no slot of this host, which has {', '.join(known)}; "
        f"for example slots.ids=[{known[0]}], or slots.ids=[] for all"
    ]


def channels_are_of_slots(host: Any, data: Any, slots: SlotsConfig) -> list[str]:
    """The vectors of the operator CHANNEL belong to slots in use."""
    known = [slot for slot in host_slots(host, data) if not slots.ids or slot in slots.ids]
    return [
        f"{channels_path(slot)}: {slot} is no slot in use, which are {', '.join(known)}; set slots.channels=null, or "
        "name one of them"
        for slot in slots.channels or ()
        if known and slot not in known
    ]


def blueprints_exist(host: Any, data: Any, slots: SlotsConfig, controller: Any) -> list[str]:
    """The blueprints that the controller names are registered for the kind of features at some slot in use."""
    try:
        blueprints.load_plugins()
        points = points_of(host, data) or ()
    except ConfigError as error:
        return [] if str(error).startswith("host") else [f"controller: {line}" for line in error.problems]
    used = [point for point in points if not slots.ids or point.slot in slots.ids]
    topologies = {point.topology for point in used if point.topology is not None}
    if len(topologies) == 0 or any(point.topology is None for point in used):
        return []  # only a forward pass shows what flows at the sites of a custom host
    named = [("controller.blueprints", name) for name in getattr(controller, "blueprints", ())]
    for index, entry in enumerate(getattr(controller, "actions", ())):
        if isinstance(entry, dict) and isinstance(entry.get("blueprint"), str):
            named.append((f"controller.actions[{index}].blueprint", entry["blueprint"]))
    every = {name for kind in topologies for name in (blueprints.names(kind) if kind else blueprints.all_names())}
    known = sorted((every - {"block"}) | (set(slots.blocks) & (every | {COPY})))
    missing = [
        f"{path} = {name!r}: whole blocks are offered where they are asked for; set slots.blocks=[{name}]"
        for path, name in named
        if name in ("block", COPY) and name not in slots.blocks
    ]
    return missing + [
        f"{path} = {name!r}: no blueprint for the slots in use; registered for them are {', '.join(known)}; "
        f"for example {path}={override_text([known[0]] if path.endswith('blueprints') else known[0])}"
        for path, name in named
        if known and name not in known and (name in slots.blocks or name not in ("block", COPY))
    ]


def controller_can_be_built(host: Any, data: Any, slots: SlotsConfig, controller: Any) -> list[str]:
    """The controller's own constructor accepts its settings."""
    known = host_slots(host, data)
    used = tuple(slot for slot in slots.ids or known if slot in known)
    if not used:
        return []
    try:
        build_controller(controller, slots=used, seed=0)
    except ConfigError as error:
        return list(error.problems)
    return []


def task_is_known(data: Any, task: Any) -> list[str]:
    """Data that may serve any task need one that is named."""
    any_task = isinstance(data, CustomDataConfig) or getattr(data, "target_kind", Target.CLASS) is not Target.CLASS
    if isinstance(task, OfDataConfig) and any_task:
        return [f"task.kind = 'data': data={data.kind} may serve any task; name one, for example task=classification"]
    return []


def probe_is_large_enough(gates: Any, slots: SlotsConfig, data: Any) -> list[str]:
    """A probe on which no seed could ever pass G5 is refused, as far as its size alone says so."""
    size = getattr(data, "probe", None)
    if size is None or isinstance(data, CustomDataConfig):  # a function of the user's own says how large it is
        return []
    try:
        plan = plan_probe(size, size, per_look=gates.probe_samples, reserve=gates.reserve)
        check_plan(plan, gates, slots.incubation, "data.probe")
    except ConfigError as error:
        return list(error.problems)
    return []


def find_unused_without_shadow(world: Any, slots: SlotsConfig) -> list[str]:
    """DDP's search for unused parameters sees only the host's forward, so it goes without shadow forwards of seeds."""
    if not world.find_unused or slots.incubation != Incubation.SHADOW:
        return []
    return [
        "world.find_unused = true: does not go with slots.incubation = shadow, whose forward DDP does not see; "
        "set slots.incubation=ste or immediate, or freeze the parameters that get no gradient"
    ]


def sites_that_run(host: Any, trainer: Any, distill: Any) -> list[str]:
    """What needs the feature of a site in every forward does not go with one that may be left out."""
    may_skip = getattr(host, "may_skip", None) or []
    problems = []
    if may_skip and trainer.compile:
        problems.append(
            "trainer.compile = true: what runs where a site is left out (host.may_skip) cannot be compiled ahead; set "
            "trainer.compile=false"
        )
    told = sorted(set(may_skip) & set(distill.features or ())) if distill is not None else []
    return problems + [f"distill.features.{slot}: host.may_skip names it, too; take another site" for slot in told]


def warm_up_ends(optim: Any, trainer: Any) -> list[str]:
    """The learning rate reaches its peak within the run."""
    if trainer.steps is None or optim.warmup_steps < trainer.steps or optim.warmup_steps == 0:
        return []
    return [
        f"optim.warmup_steps = {optim.warmup_steps}: the run has trainer.steps = {trainer.steps} and would end in "
        f"warm-up; set optim.warmup_steps={trainer.steps // 10}"
    ]


def waits_for_births_are_short(library: Any, control: Any) -> list[str]:
    """A rank that waits for a birth is not taken for a lost one."""
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
    (("host",), own_code_can_be_imported),
    (("data",), own_code_can_be_imported),
    (("task",), own_code_can_be_imported),
    (("data", "task"), task_is_known),
    (("data", "task"), task_fits_data),
    (("host", "data", "task"), host_fits_task),
    (("distill",), teacher_can_be_found),
    (("trainer",), origin_is_a_run),
    (("host", "data", "slots"), slots_are_of_host),
    (("host", "data", "slots"), channels_are_of_slots),
    (("host", "data", "slots", "distill"), distilled_features_are_of_slots),
    (("host", "data", "slots", "controller"), blueprints_exist),
    (("host", "data", "slots", "controller"), controller_can_be_built),
    (("gates", "slots", "data"), probe_is_large_enough),
    (("optim", "trainer"), warm_up_ends),
    (("world", "slots"), find_unused_without_shadow),
    (("host", "trainer", "distill"), sites_that_run),
    (("library", "control"), waits_for_births_are_short),
)
