"""Every setting of a run in one tree, checked as a whole before any process starts.

Each section is a dataclass beside its owner; this file only composes them, and `esper.config.rules` checks that they do
not contradict each other. `host`, `data`, `task` and `controller` are chosen by their ``kind``. The launcher writes
plain data as RUN/config.yaml; every worker reads them back, and all agree on `config_digest`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from esper.accord.config import GateConfig, SlotsConfig
from esper.accord.governor.config import GovernorConfig
from esper.config.strict import Reader
from esper.config.trust import check_trust
from esper.kasmina.births.config import LibraryConfig
from esper.kasmina.hosts import HOSTS, host_config_class
from esper.kasmina.kernels.config import CompileConfig
from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks
from esper.leyline.files import write_whole
from esper.leyline.slots import sort_slots
from esper.nissa.config import TelemetryConfig
from esper.tamiyo.registry import controller_config_class, controller_kinds
from esper.tolaria.checkpoint.config import CheckpointConfig
from esper.tolaria.data import DATASETS, data_config_class
from esper.tolaria.growth.config import OptimConfig
from esper.tolaria.orders.config import OrdersConfig
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.tasks import TASKS, task_config_class
from esper.tolaria.training.config import TrainerConfig
from esper.tolaria.training.distill_config import DistillConfig

Rules = Sequence[tuple[tuple[str, ...], Callable[..., list[str]]]]  # sections -> problems between them
HostSlots = Callable[[Any, Any], tuple[str, ...]]  # (host, data) -> the slots of the host on these data


class Resume(StrEnum):
    """AUTO: go on with the run in the run directory, or begin one. MUST: there must be one. NEVER: there must not."""

    AUTO = "auto"
    MUST = "must"
    NEVER = "never"


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where the run lies and what it is called."""

    dir: str
    """The run directory, RUN; in a multirun Hydra gives each job its own."""

    resume: Resume = Resume.AUTO
    """What the launcher does with a run that lies there already: ``auto`` goes on with it or begins one, ``must`` wants
    one there, ``never`` wants none. Workers always go on from the newest checkpoint that is valid on all ranks.
    """

    name: str | None = None
    """Display name; null: the folder's name."""

    group: str | None = None
    """Name of the runs that belong together; null: none."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("dir", self.dir.strip() != "", "must name a folder")
            for name in ("name", "group"):
                check(name, getattr(self, name) != "", "must not be empty, or null")


@dataclass(kw_only=True, slots=True)
class EsperConfig:
    """One run."""

    seed: int
    """Seed of everything random but the data split, 0 to 2147483647."""

    run: RunConfig
    """Where the run lies and what it is called."""

    host: Any
    """The network that growth begins from."""

    data: Any
    """What it learns from."""

    task: Any
    """What it learns: loss, metrics, objective."""

    controller: Any
    """Who decides what grows, and when."""

    slots: SlotsConfig
    """Where seeds live."""

    gates: GateConfig
    """What seeds must show."""

    library: LibraryConfig
    """Where births are kept, and who builds them."""

    optim: OptimConfig
    """How the network learns."""

    trainer: TrainerConfig
    """For how long it learns, and from which batches."""

    compile: CompileConfig
    """Where compiled kernels are kept, and who compiles them ahead."""

    control: ControlConfig
    """When ticks come, and how long ranks wait for each other."""

    checkpoint: CheckpointConfig
    """When to save and what to keep."""

    governor: GovernorConfig
    """When a run is judged sick, and what it goes back to."""

    distill: DistillConfig
    """Who teaches, if anybody."""

    world: WorldConfig
    """Processes and devices."""

    orders: OrdersConfig
    """Which orders of people the run takes."""

    telemetry: TelemetryConfig
    """What is told, and where."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("seed", 0 <= self.seed < 2**31, "must be 0 to 2147483647")


FIXED_SECTIONS: dict[str, type] = {
    "run": RunConfig,
    "slots": SlotsConfig,
    "gates": GateConfig,
    "library": LibraryConfig,
    "optim": OptimConfig,
    "trainer": TrainerConfig,
    "compile": CompileConfig,
    "control": ControlConfig,
    "checkpoint": CheckpointConfig,
    "governor": GovernorConfig,
    "distill": DistillConfig,
    "world": WorldConfig,
    "orders": OrdersConfig,
    "telemetry": TelemetryConfig,
}
KINDS: dict[str, tuple[Callable[[str], type], Callable[[], list[str]]]] = {
    "host": (host_config_class, lambda: sorted(HOSTS)),
    "data": (data_config_class, lambda: sorted(DATASETS)),
    "task": (task_config_class, lambda: sorted(TASKS)),
    "controller": (controller_config_class, lambda: sorted(controller_kinds())),
}


def config_classes() -> list[type]:
    """Every config class of the tree: the sections with one class, then each kind of the others."""
    return [*FIXED_SECTIONS.values(), *(find(kind) for find, kinds in KINDS.values() for kind in kinds())]


def build_config(plain: Any) -> EsperConfig:
    """Builds the config from plain data, and checks it whole. That needs torch, and imports code that it names.

    Raises:
        ConfigError: the settings are wrong; every problem of the whole tree has a line, ``section.key = value:
            problem; fix``.
    """
    from esper.config.rules import RULES, host_slots  # here, since the launcher reads sections without torch

    return _build(plain, RULES, host_slots)


def read_config(plain: Any) -> EsperConfig:
    """Builds the config from plain data that another process has checked with `build_config`; without torch.

    Raises:
        ConfigError: a section is wrong by itself.
    """
    return _build(plain, (), lambda host, data: ())


def _build(plain: Any, rules: Rules, host_slots: HostSlots) -> EsperConfig:
    if not isinstance(plain, dict):
        raise ConfigError(f"config = {plain!r}: expected a mapping of sections")
    reader = Reader()
    sections = ("seed", *KINDS, *FIXED_SECTIONS)
    strange, listed = [key for key in plain if key not in sections], ", ".join(sections)
    reader.problems += [f"{key} = {plain[key]!r}: no such section; sections are {listed}" for key in strange]
    reader.problems += [f"{key}: missing; it belongs to conf/config.yaml" for key in sections if key not in plain]
    parts: dict[str, Any] = {}
    for name in KINDS:
        if name in plain:
            parts[name] = _section_by_kind(reader, name, plain[name])
    for name, cls in FIXED_SECTIONS.items():
        if name in plain:
            section = _readable_slots(reader, parts, plain[name], host_slots) if name == "slots" else plain[name]
            parts[name] = reader.section(cls, section, name)
    seed = plain.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        reader.problem("seed", seed, "expected a whole number, 0 to 2147483647", "for example seed=1")
    for needed, rule in rules:
        if all(parts.get(name) is not None for name in needed):
            reader.problems += rule(**{name: parts[name] for name in needed})
    if reader.problems:
        raise ConfigError(dict.fromkeys(reader.problems))
    return EsperConfig(seed=seed, **parts)


def cross_check(config: EsperConfig) -> list[str]:
    """Returns the problems between sections that are valid by themselves; empty if there are none."""
    from esper.config.rules import RULES

    return [line for needed, rule in RULES for line in rule(**{name: getattr(config, name) for name in needed})]


def _section_by_kind(reader: Reader, name: str, plain: Any) -> Any:
    """Reads a section whose class its ``kind`` chooses; None if a problem was added."""
    find, kinds = KINDS[name]
    kind = plain.get("kind") if isinstance(plain, dict) else None
    try:
        cls = find(kind)  # type: ignore[arg-type]  # may be None, which raises
    except (ConfigError, TypeError):
        known = kinds()
        reader.problem(f"{name}.kind", kind, f"unknown; known are {', '.join(known)}", f"for example {name}={known[0]}")
        return None
    return reader.section(cls, plain, name)


def _readable_slots(reader: Reader, parts: dict[str, Any], plain: Any, host_slots: HostSlots) -> Any:
    """Returns the section ``slots``; reports invalid ids, lists the host's, and drops them."""
    ids = plain.get("ids") if isinstance(plain, dict) else None
    if not isinstance(ids, list):
        return plain
    try:
        sort_slots(ids)
    except ConfigError as error:
        known = host_slots(parts["host"], parts["data"]) if parts.get("host") and parts.get("data") else ()
        has = f"this host has {', '.join(known)}" if known else "ids are r<row>c<col>"
        problem = f"{str(error).partition(';')[0]}; {has}"
        reader.problem("slots.ids", ids, problem, f"for example slots.ids=[{[*known, 'r0c0'][0]}]")
        return {**plain, "ids": []}
    return plain


def read_plain(path: Path) -> dict[str, Any]:
    """Reads the plain data of a config file. Its run directory is the file's own folder, so that a run can be moved.

    Raises:
        ConfigError: the file is missing, unreadable or no config.
    """
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=True, throw_on_missing=True)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; expected the config.yaml of a run directory") from None
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: not a resolved config ({' '.join(str(error).split())}); write it anew with launch/train.py, or "
            "--cfg job --resolve"
        ) from None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: expected a mapping of sections")
    plain.pop("launch", None)  # a command to the launcher; --cfg job prints it, too
    if isinstance(plain.get("run"), dict):
        plain["run"]["dir"] = str(path.absolute().parent)
    return plain  # type: ignore[return-value]


def load_config(
    path: Path | str, *, trusted: bool = False, instead: str | None = None
) -> tuple[EsperConfig, dict[str, Any]]:
    """Reads RUN/config.yaml; returns the config and its plain data. Code that it names is imported to check it.

    Args:
        path: of the file.
        trusted: whether it may name code even if it is not the caller's own.
        instead: what to type for that, see `esper.config.trust.check_trust`.

    Raises:
        ConfigError: see `read_plain`, `check_trust` and `build_config`.
    """
    plain = read_plain(Path(path))
    if not trusted:
        check_trust(Path(path), plain, instead)
    return build_config(plain), plain


def write_config(path: Path, plain: dict[str, Any]) -> None:
    """Writes plain data as YAML, read-only, whole or not at all."""
    write_whole(path, OmegaConf.to_yaml(OmegaConf.create(plain)), mode=0o444)  # it may name code that runs
