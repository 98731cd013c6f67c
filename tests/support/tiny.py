"""Small runs for tests: a config, an engine made as the worker makes it, and what to look at.

config = tiny_config("cnn", trainer__precision="fp64", controller=schedule(act(1, "r0c0", "GERMINATE", ...)))
engine = make_engine(config, run_dir)       # inside `tests.support.dist.run_distributed`, or alone
engine.begin(None); engine.run()
replica(engine)                             # every bit that must be equal on all ranks
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from esper.config.digest import lasting_digest
from esper.config.strict import as_plain
from esper.config.tree import FIXED_SECTIONS, EsperConfig, RunConfig, build_config
from esper.kasmina.hosts import CNNConfig, GPTConfig
from esper.kasmina.hosts.custom import CustomHostConfig
from esper.leyline.events import Event
from esper.leyline.plain import to_plain
from esper.leyline.protocols import Controller, EventSink
from esper.run.assembly import assemble
from esper.run.teacher import build_teacher
from esper.tamiyo.none import NoneConfig
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data import DigitsConfig, PySourceConfig, load_data
from esper.tolaria.lockstep.observers import Observer
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.world import World
from esper.tolaria.tasks import OfDataConfig
from esper.tolaria.training.engine import Engine

E = TypeVar("E", bound=Event)

TASKS: dict[str, tuple[Any, Any]] = {
    "cnn": (CNNConfig(widths=[4, 8]), DigitsConfig(validation=40, probe=64, test=40)),
    "gpt": (
        GPTConfig(layers=2, heads=2, dim=16, block=16),
        PySourceConfig(block=16, max_bytes=60_000, validation=32, probe=64, test=32),
    ),
}
SMALL: dict[str, Any] = {
    "trainer.steps": 24,
    "trainer.batch": 10,
    "control.every": 2,
    "control.timeout_s": 20.0,
    "control.startup_timeout_s": 60.0,
    "compile.prepare": "off",
    "checkpoint.every_ticks": 0,
    "slots.incubation": "shadow",
    "slots.max_live": None,
    "slots.embargo_ticks": 1,
    "gates.evidence": "observe",
    "gates.probe_samples": 32,
    "gates.min_samples": 8,
    "gates.statistics_samples": 64,
    "gates.first_look": 1,
    "gates.look_every": 1,
    "optim.lr": 0.01,
    "optim.seed_lr_scale": 1.0,
    "optim.seed_warmup_steps": 2,
    "telemetry.level": "off",
    "telemetry.console": "off",
    "telemetry.wandb.mode": "disabled",
}


def tiny_plain(task: str = "cnn", /, **settings: Any) -> dict[str, Any]:
    """Plain data of a small config.

    Args:
        task: "cnn" on digits or "gpt" on the standard library's source.
        settings: ``section__key=value``; a whole section by its name (``controller=schedule(...)``); ``seed``.
    """
    host, data = TASKS[task]
    sections = {name: cls() for name, cls in FIXED_SECTIONS.items() if cls is not RunConfig}
    plain: dict[str, Any] = as_plain(
        {
            "seed": 1,
            "run": RunConfig(dir="unused"),
            "host": host,
            "data": data,
            "task": OfDataConfig(),
            "controller": NoneConfig(),
            **sections,
        }
    )
    wanted = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
    wanted.setdefault("control.slow_timeout_s", wanted["control.timeout_s"])  # nothing here is rightly slow
    for path, value in wanted.items():
        *sections_, key = path.split(".")
        place = plain
        for name in sections_:
            place = place[name]
        if key not in place:
            raise KeyError(path)
        place[key] = as_plain(value)
    return plain


def tiny_config(task: str = "cnn", /, **settings: Any) -> EsperConfig:
    """A small config, checked like any other; see `tiny_plain`."""
    return build_config(tiny_plain(task, **settings))


def act(tick: int, slot: str, op: str, **more: Any) -> dict[str, Any]:
    """One action of a schedule (``tick`` is that of the observation: 1 at the first tick)."""
    return {"tick": tick, "slot": slot, "op": op, **more}


def custom_host(path: str, sites: dict[str, str], **settings: Any) -> dict[str, Any]:
    """The plain config of a host of one's own: the function that builds it, and slot -> dotted name of the site."""
    plain: dict[str, Any] = to_plain(CustomHostConfig(path=path, sites=sites, **settings))
    return plain


def schedule(*actions: dict[str, Any]) -> dict[str, Any]:
    """A controller section."""
    return {"kind": "schedule", "actions": list(actions)}


class ListSink:
    """Keeps events, on the rank that emits them."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def of(self, kind: type[E]) -> list[E]:
        """Events of one class, in order."""
        return [event for event in self.events if isinstance(event, kind)]


def make_engine(
    config: EsperConfig,
    run_dir: Path,
    *,
    controller: Controller | None = None,
    attempt: int = 1,
    observers: Sequence[Observer] = (),
    sink_of: Callable[[World], EventSink] = lambda world: ListSink(),
) -> Engine:
    """An engine that has not begun, its parts made and joined by the worker's own `assemble`; its sink is a `ListSink`.

    Args:
        config: of the run. run_dir: shared by all ranks.
        controller: takes the place of the config's on rank 0. attempt: number of this process group.
        observers: beside the run's own. sink_of: makes another sink.
    """
    torch.set_num_threads(config.world.threads)
    world = World(config.world, config.control)
    heartbeat = world.heartbeat = Heartbeat(run_dir / "heartbeat", world.rank, world.size)
    store = CheckpointStore(run_dir / "checkpoints", attempt=attempt, keep=config.checkpoint.keep)
    bundle = load_data(config.data)
    engine = assemble(
        config,
        world=world,
        heartbeat=heartbeat,
        bundle=bundle,
        store=store,
        sink=sink_of(world),
        digest=lasting_digest(as_plain(config)),
        run_id="tiny",
        teacher=build_teacher(config, bundle, world.device),
        observers=observers,
    )
    if controller is not None and world.rank == 0:
        engine.controller = controller
    world.meet("start-up")
    return engine


def events(engine: Engine) -> ListSink:
    """The engine's sink, as `make_engine` made it."""
    assert isinstance(engine.sink, ListSink)
    return engine.sink


def bits(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """SHA-256 of each tensor's dtype, shape and raw bytes: -0.0 and NaN count as what they are."""
    found = {}
    for name, tensor in tensors:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        text = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        found[name] = hashlib.sha256(text + raw).hexdigest()[:16]
    return found


def replica(engine: Engine) -> dict[str, Any]:
    """Everything that must be equal on all ranks, by an own digest and not by the product's: parameters, buffers (alpha
    among them), which parameters learn, moments, learning rates, phases, the whole agreed state."""
    model, owner = engine.grown.model, engine.owner
    moments = {f"{name}.{key}": t for name, entry in owner.state_by_name().items() for key, t in entry.items()}
    return {
        "step": engine.step,
        "parameters": bits(model.named_parameters()),
        "buffers": bits(model.named_buffers()),
        "learning": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "moments": bits(moments.items()),
        "groups": [(group["owner"], group["lr"], len(group["params"])) for group in owner.optimizer.param_groups],
        "slots": {slot: (holder.phase.value, holder.level) for slot, holder in engine.grown.slots.items()},
        "state": to_plain(engine.state),
    }
