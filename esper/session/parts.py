"""Builds the parts of a session from what a user's loop has, and makes sure that all ranks brought the same."""

import os
import secrets
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch

from esper.kasmina.blueprints import registry
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import ConfigError, one_line
from esper.leyline.events.run import Event
from esper.leyline.plain import digest62, to_plain
from esper.leyline.protocols import EventSink, NullSink
from esper.leyline.stages import Incubation
from esper.nissa.config import Level
from esper.nissa.envelope import Envelope
from esper.nissa.jsonl import JsonlSink
from esper.session.batches import Batches, BatchEvaluator
from esper.session.config import SessionConfig, read_controller, session_terms
from esper.session.loop import Parts
from esper.session.model import LiveModel, UserLoss, per_sample
from esper.tolaria.growth.adopt import AdoptedOwner
from esper.tolaria.growth.growth import Growth
from esper.tolaria.lockstep.collectives import Lockstep
from esper.tolaria.lockstep.narrate import Narrator
from esper.tolaria.lockstep.tick import Cycle
from esper.tolaria.ranks.config import Device, WorldConfig
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.ranks.handshake import code_digest, machine_fields, shake_hands
from esper.tolaria.ranks.lastword import LastWord
from esper.tolaria.ranks.world import World

EVENTS_KEPT = 1000


class Recorder:
    """Keeps the newest events, and hands all on."""

    def __init__(self, sink: EventSink) -> None:
        self.sink = sink
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)

    def emit(self, event: Event) -> None:
        """Takes one event."""
        self.events.append(event)
        self.sink.emit(event)

    def flush(self) -> None:
        """Flushes the sink."""
        self.sink.flush()

    def close(self) -> None:
        """Closes the sink."""
        self.sink.close()


def open_sink(sink: EventSink | str | os.PathLike[str] | None, rank: int) -> EventSink:
    """The sink that was given, a file of JSON lines for a path, nothing without one or on another rank than 0."""
    if sink is None or rank != 0:
        return NullSink()
    if isinstance(sink, str | os.PathLike):
        return JsonlSink(sink, Envelope(secrets.token_hex(4), 1, 0), Level.FULL)
    return sink


def assemble(
    config: SessionConfig,
    grown: Grown,
    optimizer: torch.optim.Optimizer,
    *,
    controller: Any,
    loss: UserLoss | None,
    probe: Iterable[Any] | None,
    validation: Iterable[Any] | None,
    scheduler: Any,
    scaler: Any,
    sink: EventSink | str | os.PathLike[str] | None,
) -> Parts:
    """Joins the ranks and builds the parts; see `esper.Session` for arguments and errors."""
    registry.load_plugins()
    if loss is None and config.slots.incubation == Incubation.SHADOW:
        raise ConfigError("slots.incubation = shadow: needs loss=, a shadow sees the loss; pass it, or choose ste")
    planted = [slot for slot, holder in grown.slots.items() if holder.seed is not None]
    if planted:
        raise ConfigError(f"grown: {', '.join(planted)} already hold seeds; use Session.restore, or load_state_dict")
    decider, controller_plain = read_controller(controller, tuple(grown.slots), config.seed)
    first = next(grown.model.parameters())
    parts = (("probe", probe), ("validation", validation))
    held_out = {name: Batches(source, name, first.device) for name, source in parts if source is not None}
    _check_probe(config, held_out.get("probe"))
    owner = AdoptedOwner(grown, optimizer, config.optim(), scheduler=scheduler, scaler=scaler)
    try:
        kind = Device.GPU if first.device.type == "cuda" else Device.CPU
        world = World(WorldConfig(device=kind, find_unused=config.find_unused), config.control, within=first.device)
        marks = world.heartbeat = LastWord(world.store, world.rank, world.size)
        try:
            terms = session_terms(config, grown, world.size)
            world.allow_slow(True)  # ranks may come late to the first step: they load data, they compile
            _shake_hands(world, config, grown, owner, controller_plain, held_out)
            growth = Growth(grown, owner, world, terms, run_seed=config.seed, dtype=first.dtype)
            model = LiveModel(growth)
            narrator = Narrator(Recorder(open_sink(sink, world.rank)), grown)
            judge = None if loss is None else lambda call, batch: per_sample(loss, call, batch)
            return Parts(
                config=config,
                terms=terms,
                world=world,
                marks=marks,
                grown=grown,
                growth=growth,
                owner=owner,
                model=model,
                narrator=narrator,
                controller=decider if world.rank == 0 else None,
                controller_plain=controller_plain,
                loss=loss,
                evaluator=BatchEvaluator(
                    grown,
                    world,
                    judge,
                    model,
                    probe=held_out.get("probe"),
                    validation=held_out.get("validation"),
                    seed=config.seed,
                ),
                cycle=Cycle(
                    world,
                    marks,
                    grown,
                    growth,
                    terms=terms,
                    control=config.control,
                    narrator=narrator,
                    lockstep=Lockstep(world, list(grown.slots), terms.names, registry.registry_digest()),
                ),
            )
        except Exception as error:
            marks.mark("start", one_line(error))
            world.close()
            raise
    except Exception:
        owner.close()
        raise


def _check_probe(config: SessionConfig, probe: Batches | None) -> None:
    wanted = config.gates.probe_samples
    if probe is not None and probe.samples < 2 * wanted:
        raise ConfigError(
            f"gates.probe_samples = {wanted}: looks must not all see the same of the {probe.samples} samples of probe; "
            f"pass at least {2 * wanted}, or gates={{'probe_samples': {probe.samples // 2}}}"
        )


def weights_digest(grown: Grown) -> int:
    """62 bits of all parameters and buffers."""
    return digest_tensors(grown.model.state_dict().items())


def _shake_hands(
    world: World,
    config: SessionConfig,
    grown: Grown,
    owner: AdoptedOwner,
    controller_plain: dict[str, Any] | None,
    held_out: dict[str, Batches],
) -> None:
    names = [group["names"] for group in owner.host_groups()]
    fields = {
        "settings": str(digest62([to_plain(config), controller_plain or "an object"])),
        "code": code_digest(),
        "registry": registry.registry_words(world.device, next(grown.model.parameters()).dtype),
        "weights": str(weights_digest(grown)),
        "optimizer": f"{type(owner.optimizer).__name__} {digest62(names)}",
        "slots": " ".join(f"{slot}={site.module}" for slot, site in grown.sites.items()),
        **{name: held_out[name].fingerprint() if name in held_out else "none" for name in ("probe", "validation")},
        **machine_fields(world.device),
    }
    shake_hands(world, fields)
