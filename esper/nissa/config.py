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
    """Runs shown together; null: the sweep's name, if there is one, else WANDB_RUN_GROUP."""

    job_type: str | None = None
    """Kind of run within a group; null: WANDB_JOB_TYPE, else ``train``."""

    name: str | None = None
    """Display name; null: WANDB_NAME, else the run's id."""

    tags: list[str] = field(default_factory=list)
    """Labels to filter by; empty: WANDB_TAGS (``a,b``), else none."""

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
            check("tags", all(1 <= len(tag) <= 64 for tag in self.tags), "each must be 1 to 64 characters")
            check("tags", len(set(self.tags)) == len(self.tags), "must not repeat")


@dataclass(kw_only=True, slots=True)
class TelemetryConfig:
    """What a run tells, and where."""

    level: Level = Level.FULL
    """Which events are written to the run's event files: ``off``, ``lifecycle`` or ``full``. Refusals, vetoes and
    faults are written at every level.
    """

    console: ConsoleMode = ConsoleMode.AUTO
    """What rank 0 shows: ``auto`` (a bar on a terminal, else plain lines), ``bar``, ``plain`` or ``off``."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    """The run as wandb shows it."""
