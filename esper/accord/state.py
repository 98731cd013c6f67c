"""The agreed record of a run, and the terms under which it changes. Plain, frozen data; a checkpoint holds all of the
record."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from esper.accord.account import Costs
from esper.accord.config import GateConfig, SlotsConfig
from esper.accord.evidence.plan import ProbePlan
from esper.accord.health import RunHealth
from esper.accord.lifecycle import SlotState
from esper.accord.orders.steering import Steering
from esper.leyline.alpha import Curve, Operator, Ramp
from esper.leyline.errors import ConfigError
from esper.leyline.evidence import ABSENT, NO_HEALTH, GradientHealth, Reading
from esper.leyline.observation import BlueprintInfo, Budgets, ChannelInfo, HostInfo
from esper.leyline.slots import parse_slot
from esper.leyline.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuing:
    """A continuation in copies that is under way; see `esper.accord.evidence.continuing`.

    Fields:
        slot: slot whose seed is judged.
        generation: of that seed, so that no other one in the slot is taken for it.
        tick: control tick at which it was asked for.
        step: optimizer steps of the network that is the base of the copies; None until it is put aside.
        done: steps that all copies together have taken.
        restarts: how often it was begun anew; pieces are twice as large each time.
        costs: FLOPs per sample of a step and of a forward with the seed, and of both without it; None keeps no account.
    """

    slot: str
    generation: int
    tick: int
    step: int | None = None
    done: int = 0
    restarts: int = 0
    costs: tuple[int, int, int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricReading:
    """One metric of the run's task, by its name with that of the part, as validation_f1."""

    name: str
    reading: Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """The agreed record of a run between two ticks.

    Fields:
        tick: control ticks done.
        step: optimizer steps done (a skipped step counts).
        epoch: passes over the training part begun.
        germinations: births committed so far.
        births: seeds that ever entered the model, whatever became of them; a rollback does not take any back.
        proposals: proposal ids given so far.
        slots: one record per slot, row-major.
        continuing: the continuation in copies that is under way, or None.
        train_loss: mean training loss over the steps before the latest tick.
        train_accuracy: mean training accuracy over the same steps.
        validation_loss: loss of the latest validation.
        validation_accuracy: accuracy of the latest validation.
        metrics: the task's further metrics, of training since the latest tick and of the latest validation.
        together: loss that all blended seeds save on held-out samples, against none, at the latest attribution.
        host_norm: mean L2 norm of the host's reduced gradient.
        host_health: health of the host's gradient.
        skipped: optimizer steps skipped since the last tick.
        skipped_in_row: consecutive skipped steps up to the latest tick.
        judged_row: number of consecutive skipped steps that the governor judges. It is ``skipped_in_row``, or the
            length of a full row (trainer.max_skips) that brought this tick but ended just before it, which can happen
            if steps are judged on the device.
        samples: training samples seen.
        flops: training FLOPs spent; None if no account is kept.
        governor: agreed record of the run's health; it keeps its first value in a run without a governor.
        steering: what people's orders to the whole run have come to.
    """

    tick: int = 0
    step: int = 0
    epoch: int = 0
    germinations: int = 0
    births: int = 0
    proposals: int = 0
    slots: tuple[SlotState, ...] = ()
    continuing: Continuing | None = None
    train_loss: Reading = ABSENT
    train_accuracy: Reading = ABSENT
    validation_loss: Reading = ABSENT
    validation_accuracy: Reading = ABSENT
    metrics: tuple[MetricReading, ...] = ()
    together: Reading = ABSENT
    host_norm: Reading = ABSENT
    host_health: GradientHealth = NO_HEALTH
    skipped: int = 0
    skipped_in_row: int = 0
    judged_row: int = 0
    samples: int = 0
    flops: int | None = None
    governor: RunHealth = field(default_factory=RunHealth)
    steering: Steering = field(default_factory=Steering)

    def metric(self, name: str) -> Reading:
        """Returns a reading by the name that an objective has, as validation_loss or validation_f1."""
        own = {"validation_loss": self.validation_loss, "validation_accuracy": self.validation_accuracy}
        return (own | {entry.name: entry.reading for entry in self.metrics}).get(name, ABSENT)

    def slot(self, slot: str) -> SlotState:
        """Returns the record of one slot.

        Raises:
            KeyError: there is no slot of that id.
        """
        for entry in self.slots:
            if entry.slot == slot:
                return entry
        raise KeyError(slot)

    def continued_slot(self) -> SlotState | None:
        """Returns the record of the seed that is being judged in continued copies; None if there is none any more."""
        if self.continuing is None:
            return None
        entry = self.slot(self.continuing.slot)
        same = entry.generation == self.continuing.generation
        return entry if same and entry.stage is Stage.HOLDING and not entry.ending else None

    def with_slots(self, changed: dict[str, SlotState]) -> "RunState":
        """Returns the state with some slots replaced."""
        slots = list(self.slots)
        for index, entry in enumerate(slots):
            if entry.slot in changed:
                slots[index] = changed[entry.slot]
        return replace(self, slots=tuple(slots))


def planted_slots(slots: Sequence[str], config: SlotsConfig) -> tuple[SlotState, ...]:
    """Returns the first records of a run: empty slots, and fossils where a seed is planted from the start."""
    rest = Ramp(
        start=1.0, target=1.0, first_step=0, last_step=0, curve=Curve.LINEAR, steepness=6.0, operator=Operator.ADD
    )
    planted = config.planted or {}
    return tuple(
        SlotState(slot=slot)
        if slot not in planted
        else SlotState(
            slot=slot,
            stage=Stage.FOSSILIZED,
            generation=1,
            blueprint=planted[slot],
            operator=Operator.ADD,
            curve=Curve.LINEAR,
            ramp=rest,
            learn_step=0,
        )
        for slot in slots
    )


@dataclass(frozen=True, slots=True)
class Spent:
    """Use of the budgets by slots: live seeds, parameters, forward FLOPs per sample, forecast bytes on a rank."""

    live: int
    parameters: int
    flops: int
    memory: int

    def __add__(self, other: "Spent") -> "Spent":
        live, parameters = self.live + other.live, self.parameters + other.parameters
        return Spent(live, parameters, self.flops + other.flops, self.memory + other.memory)

    def __sub__(self, other: "Spent") -> "Spent":
        live, parameters = self.live - other.live, self.parameters - other.parameters
        return Spent(live, parameters, self.flops - other.flops, self.memory - other.memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """The constants of a run that the reducer judges by; the start handshake checks that they are equal on all ranks.

    Fields:
        slots_config: settings of slots, with the budgets.
        gates: thresholds of the gates.
        probe: the looks that the probe affords.
        host: size of the bare host.
        catalogue: blueprints that fit each slot, with exact parameters and FLOPs.
        names: all blueprint names, sorted; commands carry the index into it between ranks.
        operators: operators that each slot may use.
        channels: summary of CHANNEL's vector for each slot that has one.
        places: normalised (row, col) of each slot, in [0, 1].
        total_steps: optimizer steps of the run.
        tick_steps: nominal optimizer steps between ticks; the unit of tempo and speed.
        max_skips: skipped steps in a row after which the newest blending seed is pruned.
        world_size: number of ranks.
        costs: FLOPs per sample of host and seeds; None keeps no account.
    """

    slots_config: SlotsConfig
    gates: GateConfig
    probe: ProbePlan
    host: HostInfo
    catalogue: dict[str, tuple[BlueprintInfo, ...]]
    names: tuple[str, ...]
    operators: dict[str, tuple[Operator, ...]]
    channels: dict[str, ChannelInfo]
    places: dict[str, tuple[float, float]]
    total_steps: int
    tick_steps: int
    max_skips: int
    world_size: int
    costs: Costs | None

    def first_slots(self) -> tuple[SlotState, ...]:
        """Returns the records that a run begins with, row-major.

        Raises:
            ConfigError: a planted seed names an unknown slot, or does not fit its slot.
        """
        for slot, blueprint in (self.slots_config.planted or {}).items():
            parse_slot(slot, known=self.places)
            self.info(slot, blueprint)
        return planted_slots(list(self.places), self.slots_config)

    def info(self, slot: str, blueprint: str) -> BlueprintInfo:
        """Returns the cost of a blueprint in a slot.

        Raises:
            ConfigError: the blueprint does not fit the slot.
        """
        for entry in self.catalogue[slot]:
            if entry.name == blueprint:
                return entry
        names = ", ".join(entry.name for entry in self.catalogue[slot])
        raise ConfigError(f"blueprint {blueprint!r} does not fit slot {slot}; it takes {names}")

    def fossils(self, state: RunState) -> int:
        """Returns the number of fossils that came of births in this run."""
        planted = self.slots_config.planted or {}
        fossils = [entry for entry in state.slots if entry.stage is Stage.FOSSILIZED]
        return sum([entry.slot not in planted or entry.generation > 1 for entry in fossils])

    def spent_by(self, entry: SlotState) -> Spent:
        """Returns how much one slot uses of the budgets; a staged seed counts like a living one."""
        live = int(entry.staged is not None or entry.stage.is_live)
        name = entry.staged.blueprint if entry.staged is not None else entry.blueprint
        if name is None or not (entry.staged is not None or entry.stage.has_seed):
            return Spent(live, 0, 0, 0)
        info = self.info(entry.slot, name)
        shadowed = entry.staged is not None or entry.stage in (Stage.GERMINATED, Stage.TRAINING)
        return Spent(live, info.parameters, info.flops, (info.memory or 0) - (0 if shadowed else info.shadow))

    def spent(self, state: RunState) -> Spent:
        """Returns how much all slots use of the budgets."""
        taken = [e for e in state.slots if e.staged is not None or e.stage is not Stage.EMPTY]
        return sum([self.spent_by(entry) for entry in taken], Spent(0, 0, 0, 0))

    def budgets(self, state: RunState, spent: Spent | None = None) -> Budgets:
        """Returns what may still be spent.

        Args:
            state: state of the run.
            spent: use by all slots, if the caller has kept count; None adds it up here.
        """
        config = self.slots_config
        if spent is None:
            spent = self.spent(state)

        def left(limit: int | None, spent: int) -> int | None:
            return None if limit is None else max(0, limit - spent)

        return Budgets(
            live=left(config.max_live, spent.live),
            germinations=left(config.max_germinations, state.germinations),
            parameters=left(config.max_parameters, spent.parameters),
            flops=left(config.max_flops, spent.flops),
            memory=left(None if config.max_memory_mib is None else config.max_memory_mib << 20, spent.memory),
        )
