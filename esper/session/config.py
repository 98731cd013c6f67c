"""The settings of a session, in the config classes of their owners.

Each may be given as an object of its class, or as a mapping of the settings that differ from the defaults.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from esper.accord.config import GateConfig, SlotsConfig
from esper.accord.evidence.plan import ProbePlan
from esper.accord.state import Terms
from esper.config.strict import UNSET, Reader, as_plain, defaults_of
from esper.kasmina.foldable import find_foldable
from esper.kasmina.memory import HeardMemory
from esper.kasmina.precision import seed_dtype
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import CheckpointError, ConfigError
from esper.leyline.fields import Checks
from esper.leyline.plain import from_plain, to_plain
from esper.leyline.protocols import Controller
from esper.leyline.slots import sort_slots
from esper.leyline.stages import Incubation
from esper.nissa.config import HealthConfig
from esper.session.file import as_number
from esper.tamiyo import build_controller
from esper.tamiyo.registry import controller_config_class
from esper.tolaria.growth.config import OptimConfig
from esper.tolaria.growth.forecast import Forecast, hear_memory, moments_kept
from esper.tolaria.growth.terms import build_terms, find_copies, host_info, set_channels
from esper.tolaria.ranks.config import ControlConfig

T = TypeVar("T")
ENDLESS = 10**12  # optimizer steps of a session without an end in sight: controllers see all of it as remaining


@dataclass(kw_only=True, slots=True)
class SessionConfig:
    """Settings of a session; its checkpoint stores them whole."""

    seed: int = 0
    """Seed of births and of what evidence draws, 0 to 2147483647; not of the user's own random numbers."""

    steps: int | None = None
    """Optimizer steps of the run; None: no end in sight."""

    scheduler_per: str = "step"
    """The scheduler steps once per optimizer ``step``, or once per ``epoch``."""

    clip_norm: float | None = None
    """L2 norm to which each owner's gradient (host, each slot) is clipped by itself; None: no clipping."""

    seed_lr_scale: float = 2.0
    """Learning rate of seeds as a multiple of the host's present one."""

    seed_warmup_steps: int = 20
    """Optimizer steps of a seed's linear warm-up, from the first step in which it learns; 0: none."""

    seed_weight_decay: float = 0.0
    """Weight decay of seeds."""

    max_skips: int = 5
    """Skipped optimizer steps in a row after which a tick comes at once and the newest blending seed is pruned."""

    max_consecutive: int = 20
    """Optimizer steps skipped in a row for a non-finite host gradient that end the run as diverged."""

    class_logits: bool = False
    """The model's output is class logits [B, K >= 2], so that CONFIDENCE may be used."""

    find_unused: bool = False
    """Data parallel training looks for parameters without a gradient in every step; not with shadows."""

    average_buffers: list[str] = field(default_factory=list)
    """Names of the model's float buffers, with * and ?, that are averaged over ranks at each tick, as running
    statistics of norm layers always are.
    """

    slots: SlotsConfig = field(default_factory=SlotsConfig)
    """Where seeds live."""

    gates: GateConfig = field(default_factory=GateConfig)
    """What seeds must show."""

    control: ControlConfig = field(default_factory=ControlConfig)
    """When ticks come."""

    health: HealthConfig = field(default_factory=HealthConfig)
    """When something is odd enough to be told; nothing is decided by it."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("seed", 0 <= self.seed < 2**31, "must be 0 to 2147483647")
            check("steps", self.steps is None or self.steps >= 1, "must be >= 1, or None for no end in sight")
            check("scheduler_per", self.scheduler_per in ("step", "epoch"), "must be 'step' or 'epoch'")
            check("max_skips", 1 <= self.max_skips <= self.max_consecutive, "must be 1 to max_consecutive")
            check(
                "find_unused",
                not self.find_unused or self.slots.incubation != Incubation.SHADOW,
                "does not go with slots.incubation = shadow, whose forward DDP does not see; choose ste or immediate, "
                "or freeze the parameters that get no gradient",
            )
        self.optim()

    def optim(self) -> OptimConfig:
        """The settings that the owner of the parameters reads."""
        return OptimConfig(
            clip_norm=self.clip_norm,
            seed_lr_scale=self.seed_lr_scale,
            seed_warmup_steps=self.seed_warmup_steps,
            seed_weight_decay=self.seed_weight_decay,
        )


def read_section(cls: type[T], given: Any, path: str) -> T:
    """Reads a config object from itself, from None (defaults) or from a mapping of what differs from the defaults.

    Args:
        cls: the class of the object.
        given: the object, None or the mapping.
        path: the name of the section in error texts.

    Raises:
        ConfigError: it has problems, one line each.
    """
    if isinstance(given, cls):
        return given
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"{path} = {type(given).__name__}: expected {cls.__name__}, or a mapping of its settings")
    reader = Reader()
    defaults = {name: value for name, value in defaults_of(cls).items() if value != UNSET}
    section = reader.section(cls, {**defaults, **as_plain(dict(given or {}))}, path)
    if section is None:
        raise ConfigError(reader.problems)
    return section


def read_controller(given: Any, slots: tuple[str, ...], seed: int) -> tuple[Controller, dict[str, Any] | None]:
    """Builds the controller; returns it and its settings as plain data, or None if it was given as an object.

    Args:
        given: name of a kind, mapping with ``kind``, config object of a kind, or a `Controller`.
        slots: the model's slots.
        seed: the run's seed.

    Raises:
        ConfigError: ``given`` is none of these, or its settings do not fit.
    """
    if isinstance(given, Controller):
        return given, None
    if isinstance(given, str):
        given = {"kind": given}
    if isinstance(given, Mapping):
        given = read_section(controller_config_class(given.get("kind", "heuristic")), given, "controller")
    if not dataclasses.is_dataclass(given) or not hasattr(given, "kind"):
        raise ConfigError(
            f"controller = {type(given).__name__}: expected a kind by name, a mapping of its settings, or an object "
            "that has name, decide, state_dict and load_state_dict"
        )
    return build_controller(given, slots=slots, seed=seed), as_plain(given)


def make_session_terms(
    config: SessionConfig, grown: Grown, probe: ProbePlan, world_size: int, optimizer: torch.optim.Optimizer
) -> Terms:
    """Makes the terms of a session, and sets CHANNEL's vectors on the slots that have one.

    Raises:
        ConfigError: a setting names a slot or a vector that does not fit the model.
    """
    if config.slots.ids and sort_slots(config.slots.ids) != tuple(grown.slots):
        have = ", ".join(grown.slots)
        raise ConfigError(
            f"slots.ids = {config.slots.ids}: a session has the slots of its attach ({have}); leave it out"
        )
    set_channels(grown, config.slots)
    if grown.copies is None:  # a restored session has no example, and knows them from its file
        found = find_copies(grown, config.slots, grown.example)
        grown.copies = found.infos
        if config.slots.memory_batch is not None:
            grown.heard = to_plain(hear_memory(grown, found.memory, grown.example, config.slots))
    return build_terms(
        grown.sites,
        config.slots,
        config.gates,
        probe=probe,
        host=host_info(grown, None),
        class_logits=config.class_logits,
        total_steps=config.steps or ENDLESS,
        tick_steps=config.control.every or config.control.max_steps,
        max_skips=config.max_skips,
        world_size=world_size,
        costs=None,
        copies=grown.copies,
        foldable=find_foldable(grown),
        forecast=_forecast(config, grown, world_size, optimizer),
    )


def _forecast(
    config: SessionConfig, grown: Grown, world_size: int, optimizer: torch.optim.Optimizer
) -> Forecast | None:
    """The forecast of memory, where the session knows its batch."""
    batch = config.slots.memory_batch
    if batch is None and config.slots.max_memory_mib is not None:
        raise ConfigError(
            "slots.max_memory_mib: a session does not know its batch; give slots.memory_batch, the samples of one "
            "forward on a rank"
        )
    if batch is None:
        return None
    dtype = seed_dtype(next(grown.model.parameters()).dtype)
    moments, heard = moments_kept(optimizer), from_plain(HeardMemory, grown.heard, "memory")
    return Forecast(batch=batch, moments=moments, ranks=world_size, dtype=dtype, heard=heard)


def make_config(
    slots: Any, gates: Any, control: Any, every: int | None, settings: Mapping[str, Any], *, has_loss: bool
) -> SessionConfig:
    """Makes the config of a session from the arguments of its constructor.

    Raises:
        ConfigError: every problem of a section, one line each.
    """
    ticks = read_section(ControlConfig, control, "control")
    every, settings = as_number(every), {name: as_number(value) for name, value in settings.items()}
    if every is not None:
        if not isinstance(every, int) or isinstance(every, bool):
            raise ConfigError(f"session.every = {every!r}: expected a whole number of steps; for example every=50")
        most = ticks.max_steps if control is not None else max(every, ticks.max_steps)
        ticks = dataclasses.replace(ticks, every=every, max_steps=most)
    if slots is None and not has_loss:
        slots = {"incubation": Incubation.STE}  # a shadow needs the user's loss, straight-through only the host's
    sections = {
        "slots": read_section(SlotsConfig, slots, "slots"),
        "gates": read_section(GateConfig, gates, "gates"),
        "control": ticks,
        "health": read_section(HealthConfig, settings.get("health"), "health"),
    }
    plain = {name: as_plain(section) for name, section in sections.items()}
    config = read_section(SessionConfig, {**settings, **plain}, "session")
    for name, section in sections.items():
        setattr(config, name, section)
    return config


def read_restored_config(plain: Any, where: str) -> SessionConfig:
    """Reads the config that a checkpoint stores.

    Raises:
        CheckpointError: it is not a config of this version.
    """
    try:
        return from_plain(SessionConfig, plain, "settings")
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
