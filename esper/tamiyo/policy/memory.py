"""What features need of earlier ticks: where a loss began and how it scatters, and what was tried in each slot.

A nat means one thing to a language model of 256 bytes and another to ten classes. So losses are told in units of where
they began and of their own noise: of white noise s about a straight line, x_t - 2 x_{t-1} + x_{t-2} has variance 6 s^2.
"""

from dataclasses import dataclass, field

from esper.leyline.evidence import Reading
from esper.leyline.observation import Observation, SlotObservation
from esper.leyline.stages import Stage

LEAST_RATE = 0.2  # weight of a new sample of the noise, once there are five


@dataclass(slots=True, kw_only=True)
class Trace:
    """One metric as measured from tick to tick.

    Fields:
        first: its first value, None before there is one.
        last: its latest value.
        tick: when that was measured.
        change: the latest value minus the one before; None before there are two.
        noise_sq: mean square of its noise, None before there are three values.
        samples: differences of changes behind that.
    """

    first: float | None = None
    last: float | None = None
    tick: int | None = None
    change: float | None = None
    noise_sq: float | None = None
    samples: int = 0

    def note(self, reading: Reading) -> None:
        """Takes a reading in, unless it is absent, stale or known."""
        if not reading.is_measured or reading.value is None or reading.tick == self.tick:
            return
        if self.first is None:
            self.first = reading.value
        if self.last is not None:
            change = reading.value - self.last
            if self.change is not None:
                sample = (change - self.change) ** 2 / 6.0
                self.samples += 1
                before = sample if self.noise_sq is None else self.noise_sq
                self.noise_sq = before + max(LEAST_RATE, 1.0 / self.samples) * (sample - before)
            self.change = change
        self.last, self.tick = reading.value, reading.tick


@dataclass(slots=True, kw_only=True)
class SlotMemory:
    """History of one slot.

    Fields:
        living: blueprint of the seed at the last tick, None without one.
        kept: whether that seed is a fossil.
        births: seeds seen to live here, by blueprint.
        failures: those of them that are gone, by blueprint.
    """

    living: str | None = None
    kept: bool = False
    births: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)

    def note(self, view: SlotObservation) -> None:
        """Takes in what lives in the slot now."""
        name = view.blueprint if view.stage.has_seed else None
        if self.living is not None and name is None:
            self.failures[self.living] = self.failures.get(self.living, 0) + 1
        if name is not None and self.living is None:
            self.births[name] = self.births.get(name, 0) + 1
        self.living, self.kept = name, view.stage is Stage.FOSSILIZED


@dataclass(slots=True, kw_only=True)
class Memory:
    """All that is remembered of one run; `esper.leyline.plain` makes it plain data.

    Fields:
        train: training loss.
        validation: validation loss.
        host_norm: norm of the host's gradient.
        slots: by slot id.
    """

    train: Trace = field(default_factory=Trace)
    validation: Trace = field(default_factory=Trace)
    host_norm: Trace = field(default_factory=Trace)
    slots: dict[str, SlotMemory] = field(default_factory=dict)

    def note(self, observation: Observation) -> None:
        """Takes in one tick's observation; once a tick, before its features are made."""
        self.train.note(observation.train_loss)
        self.validation.note(observation.validation_loss)
        self.host_norm.note(observation.host_gradient_norm)
        for view in observation.slots:
            self.slots.setdefault(view.slot, SlotMemory()).note(view)

    @property
    def unit(self) -> float | None:
        """Where the loss began (nats): on the validation part, before the first validation in training; None before
        either."""
        first = self.validation.first if self.validation.first is not None else self.train.first
        return None if first is None else max(abs(first), 1e-12)

    def tallies(self) -> dict[str, tuple[int, int, int]]:
        """By blueprint: in how many slots it lives, in how many it is a fossil, how often it failed."""
        told: dict[str, tuple[int, int, int]] = {}
        for slot in self.slots.values():
            if slot.living is not None:
                alive, kept, failed = told.get(slot.living, (0, 0, 0))
                told[slot.living] = (alive + (not slot.kept), kept + slot.kept, failed)
            for name, failures in slot.failures.items():
                alive, kept, failed = told.get(name, (0, 0, 0))
                told[name] = (alive, kept, failed + failures)
        return told
