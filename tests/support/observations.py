"""A small honest world of observations: slots, ramps, cool-downs, budgets and evidence by the rules of leyline.

No network trains here. `World` moves slots along the edge table, spends budgets, draws evidence with a seeded noise
around a true worth that the test states, and refuses (as an assertion) what `why_refused` refuses. Evidence asked for
at one tick is read at the next, as in a run.
"""

import dataclasses
import random
from collections.abc import Callable, Iterable
from typing import Any

from esper.leyline.alpha import AlphaMode, Curve, Operator
from esper.leyline.breaker import BreakerView
from esper.leyline.commands import Command
from esper.leyline.evidence import ABSENT, NO_HEALTH, Check, GateResult, Reading, measured
from esper.leyline.legality import why_refused
from esper.leyline.observation import BlueprintInfo, Budgets, HostInfo, Observation, SlotObservation
from esper.leyline.protocols import Controller
from esper.leyline.slots import parse_slot, sort_slots
from esper.leyline.stages import Gate, Mechanical, Op, Stage, find_edge

CATALOGUE = (
    BlueprintInfo(name="heavy", parameters=900, flops=9000, reach=None),
    BlueprintInfo(name="noop", parameters=0, flops=0, reach=None),
    BlueprintInfo(name="light", parameters=10, flops=100, reach=None),
    BlueprintInfo(name="medium", parameters=90, flops=800, reach=None),
)
FREE = Budgets(live=None, germinations=None, parameters=None, flops=None)
GATES = {Stage.GERMINATED: Gate.G1, Stage.TRAINING: Gate.G2, Stage.BLENDING: Gate.G3, Stage.HOLDING: Gate.G5}


def verdict(gate: Gate, passed: bool, *, integrity: bool = False, detail: str = "as the test says") -> GateResult:
    """A gate's answer with one check."""
    check = Check("evidence", passed, detail, integrity)
    return GateResult(gate=gate, passed=passed, score=float(passed), checks=(check,))


def slot_view(slot: str = "r0c0", **changes: Any) -> SlotObservation:
    """An empty slot with the whole catalogue; ``changes`` replace fields."""
    values: dict[str, Any] = {
        "slot": slot,
        "row": 0.0,
        "col": 0.0,
        "stage": Stage.EMPTY,
        "staged": False,
        "dwell": 0,
        "min_dwell": 1,
        "generation": 0,
        "blueprint": None,
        "operator": None,
        "operators": tuple(Operator),
        "channel": None,
        "gate_mean": ABSENT,
        "gate_std": ABSENT,
        "effective_alpha": ABSENT,
        "curve": None,
        "alpha": 0.0,
        "alpha_target": 0.0,
        "alpha_velocity": 0.0,
        "ramp_progress": 1.0,
        "alpha_mode": AlphaMode.HOLD,
        "ending": False,
        "parameters": 0,
        "contribution": ABSENT,
        "contribution_alpha": 1.0,
        "running": ABSENT,
        "helps": None,
        "hurts": None,
        "level": None,
        "looks": 0,
        "max_looks": 0,
        "gradient_norm": ABSENT,
        "gradient_ratio": ABSENT,
        "health": NO_HEALTH,
        "degraded": 0,
        "nonfinite_steps": 0,
        "lasting": ABSENT,
        "continuations": 0,
        "max_continuations": 3,
        "verdict": None,
        "embargo_left": 0,
        "catalogue": CATALOGUE,
    }
    return SlotObservation(**(values | changes))


def observe(*views: SlotObservation, tick: int = 5, **changes: Any) -> Observation:
    """An observation of these slots at step 10 x tick of 1000."""
    values: dict[str, Any] = {
        "tick": tick,
        "step": 10 * tick,
        "total_steps": 1000,
        "remaining": 1 - tick / 100,
        "train_loss": ABSENT,
        "train_accuracy": ABSENT,
        "validation_loss": ABSENT,
        "validation_accuracy": ABSENT,
        "skipped_steps": 0,
        "host_gradient_norm": ABSENT,
        "host_health": NO_HEALTH,
        "host": HostInfo(parameters=1000, flops=10_000),
        "budgets": FREE,
        "breaker": BreakerView(),
        "slots": views,
    }
    return Observation(**(values | changes))


@dataclasses.dataclass
class _Slot:
    stage: Stage = Stage.EMPTY
    since: int = 0
    staged: Command | None = None
    seed: Command | None = None
    generation: int = 0
    start: float = 0.0
    target: float = 0.0
    ramp: tuple[int, int] = (0, 0)
    ending: bool = False
    looks: int = 0
    asked: bool = False
    reading: Reading = ABSENT
    readings: list[float] = dataclasses.field(default_factory=list)
    reading_alpha: float = 1.0


class World:
    """Slots that live by the rules, one tick at a time.

    Args:
        slots: ids.
        worth: true contribution in nats of a blueprint in a slot.
        noise: standard error of a reading.
        losses: validation loss at a tick; None is an absent reading.
        total_ticks, every: length of the run, steps per tick.
        max_live, germinations, parameters: budgets, None for no limit.
        builds: whether a staged birth of this blueprint is registered, or vetoed.
        enforce: gates ask for evidence; else every one of them passes.
        hold_k_se: standard errors that G5 asks for.
    """

    looks, look_every, first_look, cool = 3, 2, 2, {Stage.PRUNED: 1, Stage.EMBARGOED: 2, Stage.RESETTING: 1}

    def __init__(
        self,
        slots: Iterable[str],
        worth: Callable[[str, str], float],
        *,
        noise: float = 0.001,
        total_ticks: int = 100,
        every: int = 10,
        losses: Callable[[int], float | None] = lambda tick: 1.0,
        max_live: int | None = None,
        germinations: int | None = None,
        parameters: int | None = None,
        seed: int = 0,
        catalogue: tuple[BlueprintInfo, ...] = CATALOGUE,
        builds: Callable[[str], bool] = lambda name: True,
        enforce: bool = True,
        hold_k_se: float = 2.32,
    ) -> None:
        self.slots = {slot: _Slot() for slot in sort_slots(slots)}
        self.worth, self.noise, self.losses, self.builds, self.enforce = worth, noise, losses, builds, enforce
        self.hold_k_se = hold_k_se
        self.total, self.every, self.tick = total_ticks * every, every, 0
        self.max_live, self.germinations, self.parameters = max_live, germinations, parameters
        self.catalogue, self.rng = catalogue, random.Random(seed)
        self.log: list[tuple[int, Command]] = []
        self.history: dict[str, list[Stage]] = {slot: [Stage.EMPTY] for slot in self.slots}

    def stage(self, slot: str) -> Stage:
        return self.slots[slot].stage

    def _info(self, name: str) -> BlueprintInfo:
        return next(info for info in self.catalogue if info.name == name)

    def _move(self, slot: str, cause: Op | Mechanical, target: Stage) -> None:
        state = self.slots[slot]
        find_edge(state.stage, cause, target)
        if target is not state.stage:
            state.stage, state.since, state.looks, state.asked, state.reading = target, self.tick, 0, False, ABSENT
            state.readings = []
            self.history[slot].append(target)
        if target is Stage.PRUNED:
            state.seed, state.ending, state.target, state.ramp = None, False, 0.0, (0, 0)

    def _ramp(self, slot: str, target: float, ticks: int) -> None:
        state = self.slots[slot]
        state.start, state.target, state.ramp = self._alpha(state), target, (self.tick, self.tick + ticks)

    def _alpha(self, state: _Slot) -> float:
        first, last = state.ramp
        if not state.stage.is_blended:
            return 0.0
        return (
            state.target
            if self.tick >= last
            else state.start + (state.target - state.start) * ((self.tick - first) / (last - first))
        )

    def budgets(self) -> Budgets:
        """What is left."""
        held = [state.seed or state.staged for state in self.slots.values()]
        spent = sum(self._info(str(command.blueprint)).parameters for command in held if command)
        live = sum(state.stage.is_live or state.staged is not None for state in self.slots.values())
        return Budgets(
            live=None if self.max_live is None else self.max_live - live,
            germinations=self.germinations,
            parameters=None if self.parameters is None else self.parameters - spent,
            flops=None,
        )

    def advance(self) -> Observation:
        """One tick later: mechanical changes, evidence that was asked for, then the observation."""
        self.tick += 1
        for slot, state in self.slots.items():
            if state.staged is not None:
                command, state.staged = state.staged, None
                if self.builds(str(command.blueprint)):
                    state.seed, state.generation = command, state.generation + 1
                    self._move(slot, Op.GERMINATE, Stage.GERMINATED)
            if state.ending and self.tick >= state.ramp[1]:
                self._move(slot, Mechanical.RAMP_END, Stage.PRUNED)
            elif state.stage.is_cooling and self.tick - state.since >= self.cool[state.stage]:
                after = {Stage.PRUNED: Stage.EMBARGOED, Stage.EMBARGOED: Stage.RESETTING, Stage.RESETTING: Stage.EMPTY}
                self._move(slot, Mechanical.COOLDOWN, after[state.stage])
            self._measure(slot, state)
        return self.observation()

    def _measure(self, slot: str, state: _Slot) -> None:
        state.reading = state.reading.as_of(self.tick, 1)
        if state.asked and state.seed is not None:
            value = self.rng.gauss(self.worth(slot, str(state.seed.blueprint)), self.noise)
            state.reading = measured(value, tick=self.tick, n=256, se=self.noise)
            state.readings.append(value)
            state.reading_alpha = self._alpha(state) if state.stage.is_blended else 1.0
        state.asked = False
        dwell, resting = self.tick - state.since, self.tick >= state.ramp[1] and not state.ending
        if state.stage in (Stage.TRAINING, Stage.HOLDING) and state.looks < self.looks:
            first = self.first_look if state.stage is Stage.TRAINING else 0
            if dwell >= first and (dwell - first) % self.look_every == 0:
                state.looks, state.asked = state.looks + 1, True
        elif state.stage is Stage.BLENDING and resting:
            state.asked = True

    def _running(self, state: _Slot) -> Reading:
        """The mean of all readings of this stage."""
        n = len(state.readings)
        if n == 0:
            return ABSENT
        return measured(sum(state.readings) / n, tick=self.tick, n=256 * n, se=self.noise / n**0.5)

    def _verdict(self, state: _Slot) -> GateResult | None:
        if state.stage not in GATES:
            return None
        gate, reading = GATES[state.stage], state.reading
        if gate is Gate.G1 or not self.enforce:
            return verdict(gate, True, integrity=True)
        if not reading.is_measured or reading.value is None or reading.se is None:
            return verdict(gate, False, detail="evidence is absent or stale")
        bars = {Gate.G2: 2.32, Gate.G3: -2.32, Gate.G5: self.hold_k_se}
        fits = gate is Gate.G2 or state.reading_alpha == 1.0
        return verdict(gate, fits and reading.value > bars[gate] * reading.se, detail=f"contribution {reading}")

    def observation(self) -> Observation:
        """The present tick as a controller sees it."""
        loss = self.losses(self.tick)
        return observe(
            *(self._view(slot, state) for slot, state in self.slots.items()),
            tick=self.tick,
            step=self.tick * self.every,
            total_steps=self.total,
            budgets=self.budgets(),
            remaining=1 - self.tick * self.every / self.total,
            validation_loss=ABSENT if loss is None else measured(loss, tick=self.tick, n=100, se=0.05),
        )

    def _view(self, slot: str, state: _Slot) -> SlotObservation:
        first, last = state.ramp
        moving = state.stage.is_blended and self.tick < last
        direction = AlphaMode.UP if state.target >= state.start else AlphaMode.DOWN
        looking = state.stage in (Stage.TRAINING, Stage.HOLDING)
        return slot_view(
            slot,
            row=float(parse_slot(slot).row),
            stage=state.stage,
            staged=state.staged is not None,
            dwell=self.tick - state.since,
            generation=state.generation,
            alpha=self._alpha(state),
            blueprint=state.seed.blueprint if state.seed else None,
            alpha_target=state.target,
            operator=Operator.ADD if state.seed else None,
            curve=Curve.COSINE if state.seed else None,
            ramp_progress=(self.tick - first) / (last - first) if moving else 1.0,
            alpha_mode=direction if moving else AlphaMode.HOLD,
            ending=state.ending,
            contribution=state.reading,
            contribution_alpha=state.reading_alpha,
            running=self._running(state),
            looks=state.looks,
            max_looks=self.looks if looking else 0,
            verdict=self._verdict(state),
            catalogue=self.catalogue,
        )

    def apply(self, commands: Iterable[Command]) -> None:
        """Carries out commands in row-major order; a gate's failed verdict refuses, an illegal command asserts."""
        commands = list(commands)
        assert len({command.slot for command in commands}) == len(commands), "two commands for one slot"
        for command in sorted(commands, key=lambda command: parse_slot(command.slot)):
            refusal = why_refused(self.observation(), command)
            assert refusal is None, f"tick {self.tick}: {command}: {refusal}"
            assert command.reason, "a command without a reason"
            self.log.append((self.tick, command))
            self._carry_out(command, self.slots[command.slot])

    def _carry_out(self, command: Command, state: _Slot) -> None:
        slot, judged = command.slot, self._verdict(state)
        if command.op is Op.GERMINATE:
            state.staged = command
            self.germinations = None if self.germinations is None else self.germinations - 1
        elif command.op is Op.PRUNE and state.staged is not None:
            state.staged = None
        elif command.op is Op.PRUNE and command.ticks > 0:
            self._move(slot, Op.PRUNE, Stage.FOSSILIZED if state.stage is Stage.FOSSILIZED else Stage.BLENDING)
            self._ramp(slot, 0.0, command.ticks)
            state.ending = True
        elif command.op is Op.PRUNE:
            self._move(slot, Op.PRUNE, Stage.PRUNED)
        elif command.op is Op.SET_ALPHA_TARGET:
            back = state.stage is Stage.FOSSILIZED or (state.stage is Stage.HOLDING and command.target == 1.0)
            self._move(slot, command.op, state.stage if back else Stage.BLENDING)
            state.ending = False
            self._ramp(slot, command.target, command.ticks)
        elif judged is not None and judged.passed and command.op is Op.FOSSILIZE:
            self._move(slot, command.op, Stage.FOSSILIZED)
        elif judged is not None and judged.passed and command.op is Op.ADVANCE:
            after = {Stage.GERMINATED: Stage.TRAINING, Stage.TRAINING: Stage.BLENDING, Stage.BLENDING: Stage.HOLDING}
            self._move(slot, command.op, after[state.stage])
            if state.stage is Stage.BLENDING and state.seed is not None:
                self._ramp(slot, state.seed.target, state.seed.ticks)

    def run(self, controller: Controller, ticks: int) -> list[tuple[int, Command]]:
        """Lets a controller decide for some ticks; returns every command so far with its tick."""
        for _ in range(ticks):
            self.apply(controller.decide(self.advance()))
        return self.log
