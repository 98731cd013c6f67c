"""Settings of the heuristic controller."""

from dataclasses import dataclass, field
from enum import StrEnum

from esper.leyline.alpha import Curve
from esper.leyline.fields import Checks


class PlateauMetric(StrEnum):
    """Whose loss a plateau is looked for in."""

    VALIDATION = "validation"
    TRAIN = "train"


class Undecided(StrEnum):
    """What becomes of a seed with no looks left that all its looks together speak for. HOLD: it stays in HOLDING.
    PRUNE: it goes."""

    HOLD = "hold"
    PRUNE = "prune"


@dataclass(kw_only=True, slots=True)
class HeuristicConfig:
    """Thresholds of the rules; evidence thresholds belong to the gates."""

    kind: str = "heuristic"
    """Registered name of this kind: ``heuristic``."""

    warmup_ticks: int = 2
    """Ticks before the first birth."""

    eager: bool = True
    """Germinate whenever budgets allow (an incubating seed costs compute and leaves the host as it is); false: wait for
    a plateau before each birth.
    """

    plateau_metric: PlateauMetric = PlateauMetric.VALIDATION
    """The loss in which a plateau is looked for: ``validation`` or ``train``."""

    plateau_window: int = 4
    """Readings in each of the two windows compared."""

    plateau_k_se: float = 1.0
    """Standard errors by which the newer window must be better, or it is a plateau."""

    life_ticks: int = 12
    """Ticks that a whole life takes; no birth when fewer are left in the run."""

    blueprints: list[str] = field(default_factory=list)
    """Names in order of preference; a slot passes over those that do not fit it. Empty: all but noop, most parameters
    first, because a fossil keeps its slot for good.
    """

    spread: bool = False
    """Among equals, the blueprint least alive elsewhere goes first, so that slots try different things."""

    tempo_ticks: int = 1
    """Ticks of the ramp up; 0: at once."""

    prune_ticks: int = 2
    """Ticks of the ramp down; 0: at once."""

    curve: Curve = Curve.COSINE
    """Shape of the ramps: ``linear``, ``cosine`` or ``sigmoid``."""

    undecided: Undecided = Undecided.HOLD
    """What becomes of a seed that has spent its looks while all of them together speak for it: ``hold`` leaves it in
    HOLDING, ``prune`` prunes it.
    """

    undecided_se: float = 1.645
    """Standard errors by which the mean over all looks must be above zero to speak for a seed; at 1.645 it does so for
    5 % of seeds that do nothing.
    """

    remove_fossils: bool = False
    """Whether a fossil is pruned once all looks at it since it became one show that the network is better without it
    (``gates.fossil_every``).
    """

    patience: int = 2
    """Readings in a row against a blending seed before it is pruned."""

    stall_ticks: int = 8
    """Ticks without progress and without evidence, at rest in GERMINATED or BLENDING, before a prune."""

    penalty_half_life: float = 20.0
    """Ticks in which the memory of a first failure halves; each failure adds 1."""

    penalty_growth: float = 4.0
    """Factor by which each further failure of a blueprint in a slot lengthens ``penalty_half_life``; 1: none."""

    max_penalty: float = 0.75
    """Remembered failures of a blueprint in a slot above which it is not tried there yet."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("kind", self.kind == "heuristic", "must be 'heuristic'")
            check("plateau_window", self.plateau_window >= 2, "readings, must be >= 2")
            check("plateau_k_se", self.plateau_k_se >= 0, "standard errors, must be >= 0")
            check("blueprints", len(set(self.blueprints)) == len(self.blueprints), "each name once")
            for name in ("warmup_ticks", "life_ticks"):
                check(name, getattr(self, name) >= 0, "ticks, must be >= 0")
            for name in ("tempo_ticks", "prune_ticks"):
                check(name, 0 <= getattr(self, name) <= 10_000, "ticks, must be 0 to 10000")
            for name in ("patience", "stall_ticks"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("undecided_se", self.undecided_se >= 0, "standard errors, must be >= 0")
            check("penalty_growth", self.penalty_growth >= 1, "must be >= 1")
            check("penalty_half_life", self.penalty_half_life > 0, "ticks, must be > 0")
            check("max_penalty", self.max_penalty >= 0, "must be >= 0")
