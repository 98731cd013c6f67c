"""Settings of telemetry: the events that are written, the screen, and wandb."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from esper.leyline.events import Event
from esper.leyline.fields import Checks

_WANDB_NAME = re.compile(r"[^/\\#?%:]{1,128}")


class Level(StrEnum):
    """Which events are written. Refusals, vetoes and faults are written at every level."""

    OFF = "off"
    LIFECYCLE = "lifecycle"
    FULL = "full"

    def takes(self, event: Event) -> bool:
        """Whether an event is written at this level."""
        if event.priority or self is Level.FULL:
            return True
        return self is Level.LIFECYCLE and event.level == "lifecycle"


class ConsoleMode(StrEnum):
    """AUTO: a bar on a terminal, else plain lines. BAR, PLAIN: that one. OFF: nothing."""

    AUTO = "auto"
    BAR = "bar"
    PLAIN = "plain"
    OFF = "off"


class ArtifactMode(StrEnum):
    """NONE: wandb hears of checkpoints in events only. REFERENCE: name, size and place. UPLOAD: the files too."""

    NONE = "none"
    REFERENCE = "reference"
    UPLOAD = "upload"


class WandbMode(StrEnum):
    """OFFLINE: files in the run directory, for ``wandb sync``. ONLINE: sent as the run goes. DISABLED: no wandb."""

    OFFLINE = "offline"
    ONLINE = "online"
    DISABLED = "disabled"


@dataclass(kw_only=True, slots=True)
class WandbConfig:
    """The run as wandb shows it."""

    mode: WandbMode | None = None
    """``offline``: files in the run directory, which ``wandb sync RUN/wandb/offline-run-*`` sends later. ``online``:
    sent as the run goes. ``disabled``: no wandb. null: WANDB_MODE, else ``offline``.
    """

    project: str | None = None
    """Project in wandb; null: WANDB_PROJECT, else ``esper``."""

    group: str | None = None
    """Runs shown together; null: ``run.group``, which a sweep sets to its own name, else WANDB_RUN_GROUP."""

    job_type: str | None = None
    """Kind of run within a group; null: WANDB_JOB_TYPE, else the controller where there is a group, else ``train``."""

    name: str | None = None
    """Display name; null: WANDB_NAME, else experiment (or host and data), controller and seed."""

    tags: list[str] = field(default_factory=list)
    """Labels to filter by; empty: WANDB_TAGS (``a,b``), else none."""

    artifacts: ArtifactMode = ArtifactMode.REFERENCE
    """Checkpoints as artifacts: ``none``, ``reference`` (name, size and place; nothing is copied) or ``upload``."""

    alert_every_s: float = 300.0
    """Seconds between two alerts of one title; those between are counted, and the next one says how many."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check(
                "project",
                self.project is None or _WANDB_NAME.fullmatch(self.project) is not None,
                r"must be 1 to 128 characters, none of / \ # ? % :, or null",
            )
            for name in ("group", "job_type", "name"):
                value = getattr(self, name)
                check(name, value is None or 1 <= len(value) <= 128, "must be 1 to 128 characters, or null")
            check("alert_every_s", self.alert_every_s >= 0, "seconds, must be >= 0")
            check("tags", all(1 <= len(tag) <= 64 for tag in self.tags), "each must be 1 to 64 characters")
            check("tags", len(set(self.tags)) == len(self.tags), "must not repeat")


@dataclass(kw_only=True, slots=True)
class HealthConfig:
    """When something is odd enough to be told (event ``health``); nothing is decided by it."""

    window: int = 20
    """Ticks whose median is what is usual, 8 to 1000."""

    ticks: int = 3
    """Ticks in a row for which it must be odd; a stall, a loss, a gradient and memory are told at once."""

    min_throughput: float = 0.5
    """Share of the usual samples a second below which it is odd, 0 to 1."""

    max_data_wait: float = 0.25
    """Share of the steps' time that rank 0 may wait for data, 0 to 1."""

    stall_times: float = 10.0
    """Times that an interval may be longer than usual."""

    loss_deviations: float = 8.0
    """Robust standard deviations by which the training loss may be above what is usual."""

    gradient_times: float = 10.0
    """Times that the norm of the host's gradient may be above what is usual."""

    straggler_times: float = 1.5
    """Times that a rank may work longer (data and forward) than the median of all ranks."""

    max_memory: float = 0.92
    """Share of a machine's, or of a device's, memory that may be in use, 0 to 1."""

    settle_ticks: int = 40
    """Ticks within which the training loss should be back where it was before a birth or a blending."""

    peak_flops: float | None = None
    """Floating-point operations a second of one rank's device at its best, for the share that training uses of it
    (MFU); null: not told.
    """

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("window", 8 <= self.window <= 1000, "ticks, must be 8 to 1000")
            for name in ("ticks", "settle_ticks"):
                check(name, getattr(self, name) >= 1, "ticks, must be >= 1")
            for name in ("min_throughput", "max_data_wait", "max_memory"):
                check(name, 0 <= getattr(self, name) <= 1, "a share, must be in [0, 1]")
            for name in ("stall_times", "loss_deviations", "gradient_times", "straggler_times"):
                check(name, getattr(self, name) > 1, "must be > 1")
            check("peak_flops", self.peak_flops is None or self.peak_flops > 0, "FLOP/s, must be > 0, or null")


@dataclass(kw_only=True, slots=True)
class TelemetryConfig:
    """What a run tells, and where."""

    level: Level = Level.FULL
    """Which events are written to the run's event files: ``off``, ``lifecycle`` or ``full``. Refusals, vetoes and
    faults are written at every level.
    """

    console: ConsoleMode = ConsoleMode.AUTO
    """What rank 0 shows: ``auto`` (a bar on a terminal, else plain lines), ``bar``, ``plain`` or ``off``."""

    spill: str | None = None
    """Folder, on another file system than RUN, for critical events (faults, panics, rollbacks) while RUN takes nothing;
    null: the system's folder for temporary files.
    """

    profile_at: int | None = None
    """Optimizer steps done when rank 0 begins to profile (a trace and a table in RUN), at least 1; null: it does not.
    """

    profile_steps: int = 3
    """Optimizer steps that it profiles."""

    health: HealthConfig = field(default_factory=HealthConfig)
    """When something is odd enough to be told."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    """The run as wandb shows it."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("profile_at", self.profile_at is None or self.profile_at >= 1, "steps, must be >= 1, or null")
            check("profile_steps", self.profile_steps >= 1, "steps, must be >= 1")
