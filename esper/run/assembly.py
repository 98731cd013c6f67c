"""Builds a run's parts from its config and joins them to an engine: the same on every rank, but for the controller."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from esper.accord.state import Terms
from esper.config.digest import changeable_settings
from esper.config.strict import as_plain
from esper.config.tree import EsperConfig
from esper.kasmina.attach import attach
from esper.kasmina.births import Library, LibraryConfig
from esper.kasmina.births.idle import IdleCores
from esper.kasmina.blueprints import registry
from esper.kasmina.foldable import find_foldable
from esper.kasmina.hosts import StartConfig, build_host, freeze
from esper.kasmina.hosts.recompute import recompute_blocks
from esper.kasmina.precision import seed_dtype
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import arguments
from esper.kasmina.slots.unfit import check_learning
from esper.kasmina.streams import seed_rank, seed_streams
from esper.leyline.errors import ConfigError
from esper.leyline.files import RunDir
from esper.leyline.protocols import EventSink
from esper.leyline.slots import parse_slot
from esper.run.batch_statistics import check_batches
from esper.run.fitting.parts import check_blueprints, check_output, check_owners
from esper.run.kernels.build import build_compiler
from esper.run.start.costs import build_costs
from esper.tamiyo import build_controller
from esper.tolaria.checkpoint.saver import Saver
from esper.tolaria.checkpoint.snapshot import Identity
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data.parts import Bundle
from esper.tolaria.growth.forecast import Forecast, hear_memory, moments_of
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.growth.terms import build_terms, find_copies, host_info, set_channels
from esper.tolaria.lockstep.buffers import check_patterns
from esper.tolaria.lockstep.collectives import Lockstep
from esper.tolaria.lockstep.desk import NO_DESK, Desk
from esper.tolaria.lockstep.observers import Observer
from esper.tolaria.lockstep.tick import Marks
from esper.tolaria.ranks.world import World
from esper.tolaria.tasks import Task as SomeTask
from esper.tolaria.tasks.bind import bind, task_of
from esper.tolaria.training.distill import Distillation, Teacher
from esper.tolaria.training.engine import Engine, EngineSettings
from esper.tolaria.training.governor import Governor
from esper.tolaria.training.length import plan_batches
from esper.tolaria.training.looks import check_attribution, plan_of
from esper.tolaria.training.precision import autocast, dtype_of


def build_grown(config: EsperConfig, bundle: Bundle, device: torch.device) -> Grown:
    """Builds the host with empty slots; its first weights are a function of the run's seed alone."""
    if config.trainer.channels_last and len(bundle.input_shape) != 3:
        raise ConfigError(
            f"trainer.channels_last = true: is for images (C, H, W), the data has {bundle.input_shape}; set it to false"
        )
    bundle = bind(bundle, config.task)
    example = bundle.example(device, dtype_of(config.trainer.precision))
    grown = attach_host(config, bundle.input_shape, bundle.classes, example, device)
    check_output(grown, bundle, example, config)
    check_owners(config, grown)
    check_learning(grown.model)
    args, kwargs = arguments(example)
    idle = [] if config.world.find_unused else grown.parameters_without_gradient(*args, **kwargs)
    if idle:
        names = ", ".join(idle[:5]) + (", ..." if len(idle) > 5 else "")
        raise ConfigError(
            f"host.kind = {config.host.kind!r}: no gradient reaches {names}; "
            "freeze them (requires_grad_(False)), or set world.find_unused=true"
        )
    return grown


def attach_host(
    config: EsperConfig, input_shape: tuple[int, ...], classes: int, example: Any, device: torch.device
) -> Grown:
    """Builds the host and puts empty slots on it; its first weights are a function of the run's seed alone.

    Args:
        config: the run's settings.
        input_shape: shape of one x, without the batch axis.
        classes: classes of the data, or bytes of the vocabulary.
        example: a batch of two.
        device: where it will be.
    """
    seed_streams(config.seed)
    host = build_host(config.host, input_shape, classes)
    host = host.to(device=device, dtype=dtype_of(config.trainer.precision))
    if isinstance(config.host, StartConfig):
        freeze(host, config.host.freeze)
    points = {point.slot: point for point in host.injection_points()}  # type: ignore[operator]
    chosen = config.slots.ids or list(points)
    for slot in chosen:
        parse_slot(slot, known=points)
    layout = {slot: points[slot].known_layout for slot in chosen if points[slot].known_layout is not None}
    may_skip = [slot for slot in chosen if points[slot].may_skip]
    grown = attach(host, {slot: points[slot].module for slot in chosen}, example, layout=layout, may_skip=may_skip)
    set_channels(grown, config.slots)
    return grown


def make_terms(config: EsperConfig, grown: Grown, bundle: Bundle, world_size: int) -> Terms:
    """Makes the terms of the run: everything that decisions depend on and that does not change."""
    bundle = bind(bundle, config.task)
    per_epoch = plan_batches(config.trainer, bundle, config.seed).steps_per_epoch
    check_attribution(config.control, config.gates, len(bundle.validation))
    if world_size > config.trainer.batch:
        raise ConfigError(
            f"trainer.batch = {config.trainer.batch}: fewer samples than ranks ({world_size}); "
            f"set trainer.batch={world_size} or higher"
        )
    weight = next(grown.model.parameters())
    statistics = world_size * min(config.gates.statistics_samples, len(bundle.train))
    example = bundle.example(weight.device, weight.dtype)
    copies = find_copies(grown, config.slots, example)
    costs = build_costs(grown, example, statistics, copies.costs)
    return build_terms(
        grown.sites,
        config.slots,
        config.gates,
        probe=plan_of(config.gates, config.slots.incubation, bundle, plan_batches(config.trainer, bundle, config.seed)),
        host=host_info(grown, costs),
        class_logits=task_of(bundle).class_logits,
        total_steps=config.trainer.total_steps(per_epoch),
        tick_steps=config.control.every or min(per_epoch, config.control.max_steps),
        max_skips=config.trainer.max_skips,
        world_size=world_size,
        costs=costs,
        copies=copies.infos,
        foldable=find_foldable(grown),
        forecast=Forecast(
            batch=config.slots.memory_batch or -(-config.trainer.batch // (world_size * config.trainer.accumulate)),
            moments=moments_of(config.optim),
            ranks=world_size,
            dtype=seed_dtype(weight.dtype),
            heard=hear_memory(grown, copies.memory, example, config.slots),
        ),
    )


def build_library(config: LibraryConfig, run_dir: Path) -> Library | None:
    """The seed library of one rank; None if it is not enabled."""
    if not config.enabled:
        return None
    root = RunDir(run_dir).library if config.root is None else Path(config.root)
    return Library(config, root, IdleCores()) if config.when_idle else Library(config, root)


def chance_of(bundle: Bundle) -> float:
    """The loss of the best constant answer, from the targets of up to 4,096 training samples; 0: not known."""
    size, task = len(bundle.train), task_of(bundle)
    if type(task).chance is SomeTask.chance:
        return 0.0
    return task.chance([bundle.train.fetch(torch.arange(0, size, -(-size // 4096)))[1]])


def build_governor(
    config: EsperConfig, bundle: Bundle, terms: Terms, world: World, store: CheckpointStore
) -> Governor | None:
    """The governor of one rank; None if it is not enabled."""
    if not config.governor.enabled:
        return None
    return Governor(config.governor, chance=chance_of(bundle), terms=terms, world=world, store=store)


def assemble(
    config: EsperConfig,
    *,
    world: World,
    heartbeat: Marks,
    bundle: Bundle,
    store: CheckpointStore,
    sink: EventSink,
    digest: int,
    run_id: str,
    teacher: Teacher | None = None,
    observers: Sequence[Observer] = (),
    desk: Desk = NO_DESK,
    terms: Terms | None = None,
) -> Engine:
    """Builds the parts of a run and joins them to an engine.

    Args:
        config: the run's settings.
        world: the ranks.
        heartbeat: this rank's.
        bundle: the data.
        store: where checkpoints go; the seed library is made beside it.
        sink: takes the events.
        digest: of the settings that the run keeps for its whole life.
        run_id: the run's id.
        teacher: the teacher of a distillation; None if there is none.
        observers: watch each tick beside the run's own; see `esper.tolaria.lockstep.observers`.
        desk: on rank 0, hands in people's orders.
        terms: what `make_terms` returned for the same settings before, since counting costs takes a while.
    """
    bundle = bind(bundle, config.task)
    grown = build_grown(config, bundle, world.device)
    check_patterns(grown.model, config.trainer.average_buffers, "trainer.average_buffers")
    terms = terms or make_terms(config, grown, bundle, world.size)
    check_batches(config, grown, bundle, world.size)
    check_blueprints(config, terms)
    owner = ParameterOwner(grown, config.optim, terms.total_steps)
    compiler = build_compiler(config, grown, bundle, world, terms) if config.trainer.compile else None
    growth = Growth(
        grown,
        owner,
        world,
        terms,
        run_seed=config.seed,
        dtype=dtype_of(config.trainer.precision),
        library=build_library(config.library, store.folder.parent),
        compiler=compiler,
    )
    if config.trainer.recompute:  # now that costs are counted, of one forward
        recompute_blocks(grown.model, config.host.kind)
    controller = None
    if world.rank == 0:
        controller = build_controller(config.controller, slots=tuple(grown.slots), seed=config.seed)
    distillation = None
    if teacher is not None:
        growth.parameters.adopt_teacher(teacher.module)
        context = partial(autocast, config.trainer.precision, world.device)
        example = bundle.example(world.device, dtype_of(config.trainer.precision))
        distillation = Distillation(config.distill, teacher, grown, example, context)
    seed_rank(config.seed, world.rank)
    average, attribute = config.trainer.average_buffers, config.control.attribute_every > 0
    registered = registry.registry_digest()
    how: dict[str, Any] = {"average": average, "attribute": attribute, "columns": task_of(bundle).columns}
    lockstep = Lockstep(world, list(grown.slots), terms.names, registered, **how)
    settings, who = changeable_settings(as_plain(config)), None if teacher is None else teacher.identity
    identity = Identity(config_digest=digest, settings=settings, run_id=run_id, teacher=who)
    return Engine(
        EngineSettings(
            seed=config.seed,
            trainer=config.trainer,
            control=config.control,
            checkpoint=config.checkpoint,
            identity=identity,
        ),
        world=world,
        heartbeat=heartbeat,
        grown=grown,
        owner=owner,
        growth=growth,
        bundle=bundle,
        controller=controller,
        sink=sink,
        saver=Saver(store, world),
        terms=terms,
        lockstep=lockstep,
        fresh=lambda: build_grown(config, bundle, world.device),
        distillation=distillation,
        governor=build_governor(config, bundle, terms, world, store),
        observers=observers,
        desk=desk,
    )
