"""Builds the parts of a session from the objects of a user's loop, and checks that all ranks have the same ones."""

import copy
import os
import sys
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from esper.accord.evidence.plan import NO_PROBE, ProbePlan, check_plan
from esper.kasmina.blueprints import registry
from esper.kasmina.precision import seed_dtype
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import arguments
from esper.kasmina.slots.unfit import check_learning
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import CheckpointError, ConfigError, one_line
from esper.leyline.plain import digest62, to_plain
from esper.leyline.protocols import Controller, EventSink
from esper.leyline.stages import Incubation
from esper.session.batches import Batches
from esper.session.config import SessionConfig, make_session_terms, read_controller
from esper.session.copies import CopyWatch
from esper.session.evaluator import BatchEvaluator
from esper.session.file import collect_user_parts
from esper.session.loop import Parts
from esper.session.model import LiveModel, StandIn, UserLoss, evaluate_loss
from esper.session.recorder import open_recorder
from esper.tolaria.growth.adopt import AdoptedOptimizer
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.terms import check_preferred
from esper.tolaria.lockstep.buffers import check_patterns
from esper.tolaria.lockstep.collectives import Lockstep
from esper.tolaria.lockstep.narrate import Narrator
from esper.tolaria.lockstep.tick import Cycle
from esper.tolaria.lockstep.window import Window
from esper.tolaria.ranks.computed import SEED, Computation, describe_computed
from esper.tolaria.ranks.config import Device, WorldConfig
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.ranks.handshake import describe_code, machine_fields, shake_hands
from esper.tolaria.ranks.lastword import LastWord
from esper.tolaria.ranks.world import World


@dataclass(kw_only=True, slots=True)
class Given:
    """The arguments of `esper.Session` beside model and optimizer."""

    controller: Any
    loss: UserLoss | None
    probe: Iterable[Any] | None
    cluster: Iterable[Hashable] | str | None
    validation: Iterable[Any] | None
    statistics: Iterable[Any] | None
    scheduler: Any
    scaler: Any
    sink: EventSink | str | os.PathLike[str] | None
    restored: bool = False  # from a file: what was born there may be refused now


def assemble_session(config: SessionConfig, grown: Grown, optimizer: torch.optim.Optimizer, given: Given) -> Parts:
    """Joins the ranks and builds the parts; see `esper.Session` for arguments and errors."""
    registry.load_plugins()
    check_learning(grown.model)
    if given.loss is None and config.slots.incubation == Incubation.SHADOW:
        raise ConfigError("slots.incubation = shadow: needs loss=, a shadow sees the loss; pass it, or choose ste")
    planted = [slot for slot, holder in grown.slots.items() if holder.seed is not None]
    if planted:
        raise ConfigError(f"grown: {', '.join(planted)} already hold seeds; use Session.restore, or load_state_dict")
    controller, controller_plain = read_controller(given.controller, tuple(grown.slots), config.seed)
    first = next(grown.model.parameters())
    held_out = {}
    if given.probe is not None:
        held_out["probe"] = Batches(given.probe, "probe", first.device, cluster=given.cluster)
    for name, source in (("validation", given.validation), ("statistics", given.statistics)):
        if source is not None:
            held_out[name] = Batches(source, name, first.device)
    plan = _plan_of(config, held_out.get("probe"))
    if config.control.attribute_every and (given.loss is None or "validation" not in held_out):
        raise ConfigError("control.attribute_every: seeds are measured by loss= on validation=; pass both")
    adopted = AdoptedOptimizer(
        grown,
        optimizer,
        config.optim(),
        scheduler=given.scheduler,
        scaler=given.scaler,
        scheduler_per=config.scheduler_per,
    )
    try:
        _check_saveable(adopted, controller, controller_plain)
        kind = Device.GPU if first.device.type == "cuda" else Device.CPU
        world = World(WorldConfig(device=kind, find_unused=config.find_unused), config.control, within=first.device)
        marks = world.heartbeat = LastWord(world.store, world.rank, world.size)
        marks.begin_beats(config.control.timeout_s, world.wait, world.cut)
        if first.device.type == "cuda":
            marks.watch_device(lambda: world.limit_s, world.wait)
        try:
            check_patterns(grown.model, config.average_buffers, "average_buffers")
            terms = make_session_terms(config, grown, plan, world.size, optimizer)
            if not given.restored:
                check_preferred((controller_plain or {}).get("blueprints") or (), terms)
            world.allow_slow(True)  # ranks may come late to the first step, because they load data and compile
            _shake_hands(world, config, grown, adopted, controller_plain, held_out, given.loss)
            growth = Growth(grown, adopted.owner, world, terms, run_seed=config.seed, dtype=first.dtype)
            model = LiveModel(growth)
            recorder, window = open_recorder(given.sink, world, config.health), Window(world.device)
            narrator = Narrator(recorder, grown)
            loss = given.loss
            judge = None if loss is None else lambda call, batch: evaluate_loss(loss, call, batch)
            evaluator = BatchEvaluator(
                grown,
                world,
                judge,
                model,
                probe=held_out.get("probe"),
                validation=held_out.get("validation"),
                statistics=held_out.get("statistics"),
                scale=lambda: 1.0 if adopted.scaler is None else float(adopted.scaler.get_scale()),
                seed=config.seed,
            )
            return Parts(
                config=config,
                terms=terms,
                world=world,
                marks=marks,
                grown=grown,
                growth=growth,
                adopted=adopted,
                model=model,
                window=window,
                narrator=narrator,
                recorder=recorder,
                controller=controller if world.rank == 0 else None,
                controller_plain=controller_plain,
                loss=loss,
                evaluator=evaluator,
                cycle=Cycle(
                    world,
                    marks,
                    grown,
                    growth,
                    terms=terms,
                    control=config.control,
                    narrator=narrator,
                    window=window,
                    evaluator=evaluator,
                    observers=[CopyWatch(grown, narrator, aloud=world.rank == 0)],
                    lockstep=Lockstep(
                        world,
                        list(grown.slots),
                        terms.names,
                        registry.registry_digest(),
                        average=config.average_buffers,
                        attribute=config.control.attribute_every > 0,
                    ),
                ),
            )
        except Exception as error:
            marks.mark("start", one_line(error))
            world.close()
            raise
    except Exception:
        adopted.close()
        raise


def _plan_of(config: SessionConfig, probe: Batches | None) -> ProbePlan:
    """The looks that the probe affords; refuses one on which no seed could ever fossilise."""
    if probe is None:
        return NO_PROBE
    plan = probe.plan(config.gates)
    check_plan(plan, config.gates, config.slots.incubation, "probe")
    return plan


def _check_saveable(adopted: AdoptedOptimizer, controller: Controller, controller_plain: dict[str, Any] | None) -> None:
    """Refuses now what the first save could not write, hours later."""
    try:
        collect_user_parts(adopted, controller, controller_plain)
    except CheckpointError as error:
        raise ConfigError(f"{error}; session.save would fail") from error
    except Exception as error:
        raise ConfigError(f"a state_dict() fails, so session.save would: {one_line(error)}") from error


def weights_digest(grown: Grown) -> int:
    """62-bit digest of all parameters and buffers."""
    return digest_tensors(grown.model.state_dict().items())


def _computations(grown: Grown, loss: UserLoss | None, held_out: dict[str, Batches]) -> dict[str, Computation]:
    """What the start compares beside weights: the model on the example, the loss on a held out batch."""
    model = grown.model
    computations = {}
    if grown.example is not None:

        def call() -> Any:
            args, kwargs = arguments(copy.deepcopy(grown.example))
            return model(*args, **kwargs)

        computations["the model"] = Computation(model, call)
    part = next((held_out[name] for name in ("probe", "validation") if name in held_out), None)
    if loss is not None and part is not None:
        with undisturbed(model, seed=SEED):
            batch = next(part.share(range(min(len(part.sizes), 8)), 0, 1))

        def judge() -> Any:
            return evaluate_loss(loss, StandIn(grown, model), tree_map_only(torch.Tensor, torch.clone, batch))

        computations["the loss"] = Computation(model, judge)
    return computations


def _shake_hands(
    world: World,
    config: SessionConfig,
    grown: Grown,
    adopted: AdoptedOptimizer,
    controller_plain: dict[str, Any] | None,
    held_out: dict[str, Batches],
    loss: UserLoss | None,
) -> None:
    """Checks that settings, code, weights, optimizer, slots, data and what is computed are the same on all ranks."""
    names = [group["names"] for group in adopted.host_groups()]
    path = str((controller_plain or {}).get("path", ""))
    modules = [*([path.partition(":")[0]] if ":" in path else []), *registry.plugin_modules()]
    computations = _computations(grown, loss, held_out) if world.size > 1 else {}
    if world.size > 1 and world.rank == 0 and not computations:
        print(
            "esper: ranks cannot compare what the model computes: this session has no example of attach, and no loss= "
            "with probe= or validation=; a rank with another copy of the model's code would not be noticed",
            file=sys.stderr,
            flush=True,
        )
    fields = {
        "settings": str(digest62([to_plain(config), controller_plain or "an object"])),
        "code": describe_code(modules),
        "registry": registry.describe_registry(world.device, seed_dtype(next(grown.model.parameters()).dtype)),
        "weights": str(weights_digest(grown)),
        "optimizer": f"{type(adopted.optimizer).__name__} {digest62(names)}",
        "slots": " ".join(f"{slot}={site.module}: {site.describe()}" for slot, site in grown.sites.items()),
        **{
            name: held_out[name].fingerprint() if name in held_out else "none"
            for name in ("probe", "validation", "statistics")
        },
        **describe_computed(world, computations),
        **machine_fields(world.device),
    }
    shake_hands(world, fields)
