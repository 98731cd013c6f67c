"""Builds a run's parts from its config and joins them: host, slots, optimizer owner, controller, engine.

The same on every rank, but for the controller, which lives on rank 0 alone.
"""

from functools import partial
from pathlib import Path

import torch

from esper.config import EsperConfig
from esper.kasmina.attach import Grown, attach
from esper.kasmina.blueprints import registry
from esper.kasmina.channels import channel_info, channels_path, parse_channels, usable_operators
from esper.kasmina.compiler import Compiler
from esper.kasmina.confidence import evaluating
from esper.kasmina.flops import host_cost, seed_cost
from esper.kasmina.hosts import build_host
from esper.kasmina.library import Library, LibraryConfig
from esper.leyline.errors import ConfigError
from esper.leyline.protocols import EventSink
from esper.leyline.slots import parse_slot
from esper.tamiyo import build_controller
from esper.tolaria.account import Costs
from esper.tolaria.checkpoint import CheckpointStore
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import BatchPlan, eval_shards
from esper.tolaria.distill import Distillation, Teacher
from esper.tolaria.engine import Engine, EngineSettings
from esper.tolaria.evaluate import autocast, dtype_of
from esper.tolaria.growth import Growth
from esper.tolaria.heartbeat import Heartbeat
from esper.tolaria.lockstep import Lockstep
from esper.tolaria.ownership import ParameterOwner
from esper.tolaria.rollback import Governor
from esper.tolaria.saver import Saver
from esper.tolaria.state import Terms
from esper.tolaria.task import Task
from esper.tolaria.verdict import chance_level
from esper.tolaria.world import World


def build_grown(config: EsperConfig, bundle: Bundle, device: torch.device) -> Grown:
    """Host and empty slots; the host's first weights are a function of the run's seed alone."""
    if config.trainer.channels_last and len(bundle.input_shape) != 3:
        raise ConfigError(
            f"trainer.channels_last = true: is for images (C, H, W), the data has {bundle.input_shape}; set it to false"
        )
    torch.manual_seed(config.seed)
    host = build_host(config.host, bundle.input_shape, bundle.classes)
    host = host.to(device=device, dtype=dtype_of(config.trainer.precision))
    points = {point.slot: point.module for point in host.injection_points()}  # type: ignore[operator]
    chosen = config.slots.ids or list(points)
    for slot in chosen:
        parse_slot(slot, known=points)
    example = bundle.example().to(device)
    if example.is_floating_point():
        example = example.to(dtype_of(config.trainer.precision))
    for slot in config.slots.channels or ():
        parse_slot(slot, known=chosen)
    grown = attach(host, {slot: points[slot] for slot in chosen}, example)
    _check_output(grown, bundle, example, config)
    for slot, text in (config.slots.channels or {}).items():
        grown.slots[slot].set_channels(parse_channels(text, channels_path(slot)))
    idle = [] if config.world.find_unused else grown.parameters_without_gradient(example)
    if idle:
        raise ConfigError(
            f"host.kind = {config.host.kind!r}: no gradient reaches {', '.join(idle[:5])}{', ...' * (len(idle) > 5)}; "
            "freeze them (requires_grad_(False)), or set world.find_unused=true"
        )
    return grown


def _check_output(grown: Grown, bundle: Bundle, example: torch.Tensor, config: EsperConfig) -> None:
    """The host gives a logit for each class of the data (or more: a padded vocabulary).

    Raises:
        ConfigError: it gives something else; the text has both shapes.
    """
    devices = [example.device] if example.is_cuda else []
    with torch.random.fork_rng(devices), evaluating(grown.model), autocast(config.trainer.precision, example.device):
        output = grown.model(example)
    axes = list(example.shape[:1] if bundle.task is Task.CLASSIFICATION else example.shape[:2])
    shape = list(output.shape) if isinstance(output, torch.Tensor) else None
    if shape is None or shape[:-1] != axes or shape[-1] < bundle.classes:
        got = type(output).__name__ if shape is None else shape
        raise ConfigError(
            f"host.kind = {config.host.kind!r}: for inputs {list(example.shape)} it returns {got}, expected logits "
            f"{[*axes, bundle.classes]}, one for each class of data.kind = {config.data.kind!r}; correct the host"
        )


def _check_names(config: EsperConfig, terms: Terms) -> None:
    """Blueprints that the controller prefers fit some slot; known before the first tick, so said before it.

    Raises:
        ConfigError: names those that do not, and lists those that fit.
    """
    known = {info.name for catalogue in terms.catalogue.values() for info in catalogue}
    lost = [name for name in getattr(config.controller, "blueprints", None) or () if name not in known]
    if lost:
        raise ConfigError(
            f"controller.blueprints: {', '.join(lost)} fits no slot of this host; it takes {', '.join(sorted(known))}; "
            "set controller.blueprints to some of these, or to [] for any"
        )


def build_costs(grown: Grown, example: torch.Tensor) -> Costs:
    """Counts what host and seeds cost on one sample.

    Args:
        grown: with empty slots. example: inputs of a few samples.
    """
    parameter = next(grown.model.parameters())
    example = example.to(parameter.device)
    if example.is_floating_point():
        example = example.to(parameter.dtype)
    seeds = {
        slot: {
            info.name: seed_cost(site.topology, info.name, site.dim, site.shape)
            for info in registry.catalogue(site.topology, site.dim, site.positions)
        }
        for slot, site in grown.sites.items()
    }
    return Costs(host=host_cost(grown, example), seeds=seeds)


def batch_sizes(config: EsperConfig, bundle: Bundle, world: World) -> tuple[set[int], set[int]]:
    """Samples in a forward of this rank, in training and in evaluation: ragged last batches and shares included."""
    plan = BatchPlan(len(bundle.train), config.trainer.batch, config.seed)
    steps = (0, plan.steps_per_epoch - 1)
    pieces = [piece for s in steps for piece in plan.pieces(s, world.rank, world.size, config.trainer.accumulate)]
    parts = [len(bundle.validation), min(config.gates.probe_samples, len(bundle.probe))]
    shards = [shard for n in parts for shard in eval_shards(n, world.rank, world.size, config.trainer.eval_batch)]
    return {len(indices) for indices, _ in pieces}, {len(shard) for shard in shards}


def build_compiler(config: EsperConfig, grown: Grown, bundle: Bundle, world: World) -> Compiler:
    """The host's regions, compiled; seeds will be as they are staged."""
    train, evaluation = batch_sizes(config, bundle, world)
    compiler = Compiler(
        grown, config.trainer.compile_backend, train_sizes=train, eval_sizes=evaluation,
        incubation=config.slots.incubation, autocast=lambda: autocast(config.trainer.precision, world.device),
    )  # fmt: skip
    example = bundle.example().to(world.device)
    if example.is_floating_point():
        layout = torch.channels_last if config.trainer.channels_last else torch.preserve_format
        example = example.to(dtype_of(config.trainer.precision), memory_format=layout)
    compiler.host(example)
    return compiler


def places_of(grown: Grown) -> dict[str, tuple[float, float]]:
    """Row and column of each slot, normalised to [0, 1]."""
    places = {slot: parse_slot(slot) for slot in grown.slots}
    rows = max(place.row for place in places.values()) or 1
    cols = max(place.col for place in places.values()) or 1
    return {slot: (place.row / rows, place.col / cols) for slot, place in places.items()}


def build_terms(config: EsperConfig, grown: Grown, bundle: Bundle, world_size: int) -> Terms:
    """What does not change in the run."""
    per_epoch = -(-len(bundle.train) // config.trainer.batch)
    if 2 * config.gates.probe_samples > len(bundle.probe):
        raise ConfigError(
            f"gates.probe_samples = {config.gates.probe_samples}: looks must not all see the same of the "
            f"{len(bundle.probe)} probe samples; set gates.probe_samples={len(bundle.probe) // 2} or data.probe higher"
        )
    if world_size > config.trainer.batch:
        raise ConfigError(
            f"trainer.batch = {config.trainer.batch}: fewer samples than ranks ({world_size}); "
            f"set trainer.batch={world_size} or higher"
        )
    return Terms(
        slots_config=config.slots,
        gates=config.gates,
        catalogue={
            slot: registry.catalogue(site.topology, site.dim, site.positions) for slot, site in grown.sites.items()
        },
        names=registry.all_names(),
        operators={
            slot: usable_operators(slot, config.slots.channels or {}, class_logits=bundle.task is Task.CLASSIFICATION)
            for slot in grown.slots
        },
        channels={
            slot: channel_info(parse_channels(text, channels_path(slot)))
            for slot, text in (config.slots.channels or {}).items()
        },
        places=places_of(grown),
        total_steps=config.trainer.steps or config.trainer.epochs * per_epoch,
        tick_steps=config.control.every or min(per_epoch, config.control.max_steps),
        max_skips=config.trainer.max_skips,
        world_size=world_size,
        costs=build_costs(grown, bundle.example()),
    )


def build_library(config: LibraryConfig, run_dir: Path) -> Library | None:
    """The seed library of one rank, None where births do without."""
    if not config.enabled:
        return None
    return Library(config, run_dir / "library" if config.root is None else Path(config.root))


def chance_of(bundle: Bundle) -> float:
    """The chance level of a data set, in nats, by the targets of up to 4,096 training samples."""
    size = len(bundle.train)
    return chance_level(bundle.train.fetch(torch.arange(0, size, -(-size // 4096)))[1].flatten().tolist())


def build_governor(
    config: EsperConfig, bundle: Bundle, terms: Terms, world: World, store: CheckpointStore
) -> Governor | None:
    """The governor of one rank; None where nobody judges."""
    if not config.governor.enabled:
        return None
    return Governor(config.governor, chance=chance_of(bundle), terms=terms, world=world, store=store)


def assemble(
    config: EsperConfig,
    *,
    world: World,
    heartbeat: Heartbeat,
    bundle: Bundle,
    store: CheckpointStore,
    sink: EventSink,
    digest: int,
    run_id: str,
    teacher: Teacher | None = None,
) -> Engine:
    """Builds the parts of a run and joins them; the same on every rank, the controller on rank 0 alone."""
    grown = build_grown(config, bundle, world.device)
    terms = build_terms(config, grown, bundle, world.size)
    _check_names(config, terms)
    owner = ParameterOwner(grown, config.optim, terms.total_steps)
    compiler = build_compiler(config, grown, bundle, world) if config.trainer.compile else None
    growth = Growth(
        grown, owner, world, terms, run_seed=config.seed, dtype=dtype_of(config.trainer.precision),
        library=build_library(config.library, store.folder.parent),
        compiler=compiler,
    )  # fmt: skip
    controller = None
    if world.rank == 0:
        controller = build_controller(config.controller, slots=tuple(grown.slots), seed=config.seed)
    distillation = None
    if teacher is not None:
        growth.parameters.adopt_teacher(teacher.module)
        context = partial(autocast, config.trainer.precision, world.device)
        example = bundle.example().to(world.device)
        if example.is_floating_point():
            example = example.to(dtype_of(config.trainer.precision))
        distillation = Distillation(config.distill, teacher, grown, example, context)
    # From here on each rank's global stream is its own, so that a hidden dependence on it cannot pass unseen.
    torch.manual_seed(config.seed * 1_000_003 + world.rank)
    return Engine(
        EngineSettings(
            seed=config.seed, trainer=config.trainer, control=config.control, checkpoint=config.checkpoint,
            config_digest=digest, run_id=run_id,
        ),
        world=world, heartbeat=heartbeat, grown=grown, owner=owner, growth=growth, bundle=bundle,
        controller=controller, sink=sink, saver=Saver(store, world), terms=terms,
        lockstep=Lockstep(world, list(grown.slots), terms.names, registry.registry_digest()),
        fresh=lambda: build_grown(config, bundle, world.device), distillation=distillation,
        governor=build_governor(config, bundle, terms, world, store),
    )  # fmt: skip
