"""One net's record between ticks, and the lanes that follow from it."""

from collections import defaultdict
from dataclasses import dataclass, field, replace

from torch import nn

from esper.accord.effects import Veto
from esper.accord.lifecycle import SlotState, learns
from esper.accord.state import RunState
from esper.leyline.alpha import Operator
from esper.leyline.protocols import Ending, Report
from esper.leyline.stages import Incubation, Stage
from esper.simic.batched.lanes import Lane, Seat
from esper.simic.batched.recipe import Recipe


@dataclass(slots=True, eq=False)
class Window:
    """Steps of one net since its last tick.

    Fields:
        seen: steps judged.
        skipped: steps skipped.
        row: steps skipped in a row, over ticks.
        longest: longest row since the last tick.
    """

    seen: int = 0
    skipped: int = 0
    row: int = 0
    longest: int = 0

    def add(self, *, skipped: bool) -> None:
        """Counts a step."""
        self.seen += 1
        self.skipped += skipped
        self.row = self.row + 1 if skipped else 0
        self.longest = max(self.longest, self.row)

    @property
    def known_row(self) -> int:
        """Steps skipped in a row, up to the newest since the last tick; 0 if there was none."""
        return self.row if self.seen else 0

    def reset(self) -> None:
        """Begins anew; a row goes on over the tick."""
        self.seen = self.skipped = self.longest = 0


@dataclass(slots=True, eq=False)
class Net:
    """One trial.

    Fields:
        place: among the trials.
        recipe: what it is made of.
        state: the agreed record.
        step: optimizer steps done.
        window: steps since the last tick.
        sums: of the last tick, by name.
        staged: built seeds that wait, by slot.
        vetoes: of seeds that could not be built, by slot.
        gates: count, sum and sum of squares of g_eff since the last tick, by slot.
        heard: count and sum of the features' mean squares since the last tick, by slot.
        births, prunes: since the last report.
        report: the last one.
    """

    place: int
    recipe: Recipe
    state: RunState
    step: int = 0
    window: Window = field(default_factory=Window)
    sums: dict[str, float] = field(default_factory=dict)
    staged: dict[str, nn.Module] = field(default_factory=dict)
    vetoes: dict[str, Veto] = field(default_factory=dict)
    gates: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))
    heard: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    births: int = 0
    prunes: int = 0
    report: Report | None = None

    @property
    def over(self) -> bool:
        """Whether the trial has ended."""
        return self.report is not None and self.report.ending is not Ending.RUNNING

    def learns(self, entry: SlotState) -> bool:
        """Whether the seed in a slot gets a gradient in each step."""
        return learns(entry.stage, ending=entry.ending, train_fossils=self.recipe.terms.slots_config.train_fossils)

    def training_lane(self, step: int) -> Lane:
        """The host's own forward of an optimizer step; a seed that learns has a seat at alpha 0 too."""
        seats = {}
        for entry in self.state.slots:
            if entry.stage.is_blended:
                seat = self._seat(entry, entry.alpha(step), entry.fade(step), learns=True)
                if seat.alpha > 0.0 or (self.learns(entry) and self._trains(entry, seat)):
                    seats[entry.slot] = seat
        return Lane(self.place, seats, learns=True)

    def _trains(self, entry: SlotState, seat: Seat) -> bool:
        return seat.uses(Operator.GATE) or self._parameters(entry) > 0

    def _parameters(self, entry: SlotState) -> int:
        return self.recipe.terms.info(entry.slot, str(entry.blueprint)).parameters

    def shadow_lanes(self, step: int) -> list[Lane]:
        """A forward for each seed that learns at full alpha without touching what the host computes."""
        terms = self.recipe.terms
        if terms.slots_config.incubation is not Incubation.SHADOW:
            return []
        lanes = []
        for entry in self.state.slots:
            if entry.stage is Stage.TRAINING and self._parameters(entry) > 0:
                others = {
                    other.slot: self._seat(other, other.alpha(step), other.fade(step), learns=False)
                    for other in self.state.slots
                    if other.stage.is_blended and other.alpha(step) > 0.0
                }
                lanes.append(Lane(self.place, {**others, entry.slot: self._seat(entry, 1.0, 1.0, learns=True)}))
        return lanes

    def evaluating_lane(self, overrides: dict[str, float] | None = None) -> Lane:
        """A forward without gradient, at the alphas of the latest step.

        Args:
            overrides: alpha by slot, whatever its stage.
        """
        overrides, seats, step = overrides or {}, {}, self.step - 1
        for entry in self.state.slots:
            alpha = overrides.get(entry.slot, entry.alpha(step) if entry.stage.is_blended else 0.0)
            if alpha > 0.0:
                seats[entry.slot] = self._seat(entry, alpha, entry.fade(step), learns=False)
        return Lane(self.place, seats)

    def newborn_lane(self, slot: str) -> Lane:
        """`evaluating_lane` with the seed that waits in a slot, at alpha 1."""
        staged = self.state.slot(slot).staged
        assert staged is not None
        operator = Operator.ADD if staged.operator.is_gated else staged.operator
        seat = Seat(str(staged.blueprint), operator, None, 1.0, 1.0, learns=False)
        lane = self.evaluating_lane()
        return replace(lane, seats={**lane.seats, slot: seat})

    def _seat(self, entry: SlotState, alpha: float, fade: float, *, learns: bool) -> Seat:
        """Operators are those of the latest tick: a slot is told of new ones when the next tick is followed."""
        operator, fades_from = entry.operators(self.state.step)
        return Seat(str(entry.blueprint), operator, fades_from, alpha, fade, learns)
