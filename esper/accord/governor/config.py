"""Settings of the governor, which judges the run's health."""

from dataclasses import dataclass

from esper.leyline.fields import Checks


@dataclass(kw_only=True, slots=True)
class GovernorConfig:
    """When a run is judged sick, what it goes back to, and how long growth waits then."""

    enabled: bool = True
    """Judge every tick, keep snapshots, roll back after a panic."""

    history: int = 16
    """Ticks: how many losses of healthy ticks a new one is compared with."""

    min_history: int = 8
    """Ticks: with fewer losses than this, a jump is not judged."""

    deviations: float = 6.0
    """Robust standard deviations (1.4826 times the median absolute deviation) above the median. A loss is out of line
    when it exceeds this, ``rise`` and ``errors``.
    """

    rise: float = 0.1
    """Rise above the median, in nats as a share of the chance level, the loss of a network that knows the class
    frequencies and nothing else. A loss is out of line when it exceeds this, ``deviations`` and ``errors``.
    """

    errors: float = 4.0
    """Standard errors of the difference between a loss and the median. A loss is out of line only when it exceeds this
    too, since where a class is rare the samples of a tick alone can lift it.
    """

    patience: int = 2
    """Ticks out of line in a row that are a panic where the loss has blown up or collapsed; twice as many where it is
    beyond chance, or rises without a pause. A loss below chance that has stopped rising after these ticks is a shift,
    which is told. A loss that is not finite is a panic at once.
    """

    blowup: float = 3.0
    """Multiple of the chance level (or of the least loss so far, if that is more) above which a training loss has
    diverged, however it came there.
    """

    collapse: float = 0.95
    """Share of the chance level from which a training loss has collapsed, if its median had been below
    ``clearly_better``.
    """

    clearly_better: float = 0.8
    """Share of the chance level below which the median of the training loss must once have been for a collapse."""

    snapshot_ticks: int = 5
    """Ticks between snapshots in memory; a save takes one too."""

    ring: int = 3
    """Snapshots in memory. The ranks of a machine share one copy of what is equal on all of them."""

    blame_ticks: int = 10
    """Ticks: a change in a slot that is older is not blamed for a panic."""

    embargo_ticks: int = 50
    """Ticks for which no seed germinates in a slot that was blamed; 0: none."""

    max_replays: int = 3
    """Rollbacks without a recovery between them, after which the run ends as diverged."""

    recover_ticks: int = 10
    """Healthy ticks beyond the tick of the panic that are a recovery."""

    cool_ticks: int = 20
    """Ticks without births after the first panic that growth is blamed for; each further panic doubles them."""

    trial_ticks: int = 5
    """Healthy ticks that one seed must then stand blended before others may be born."""

    max_trips: int = 3
    """Panics that growth is blamed for, without a success between them, after which births stay forbidden."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("min_history", self.min_history >= 3, "ticks, must be >= 3")
            check("history", self.history >= self.min_history, "ticks, must not be below governor.min_history")
            check("deviations", self.deviations > 0, "must be > 0")
            check("rise", self.rise > 0, "must be > 0")
            check("errors", self.errors >= 0, "must be >= 0")
            for name in ("patience", "snapshot_ticks", "blame_ticks", "cool_ticks", "trial_ticks", "max_trips"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("blowup", self.blowup > 1, "must be > 1")
            check("clearly_better", 0 < self.clearly_better < self.collapse, "must be between 0 and governor.collapse")
            check("ring", self.ring >= 2, "must be >= 2: one that is cleared, and one that is yet to be")
            for name in ("embargo_ticks", "max_replays", "recover_ticks"):
                check(name, getattr(self, name) >= 0, "must be >= 0")
