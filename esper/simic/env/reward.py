"""What growing is worth: one number over all slots, paid tick by tick or at the end.

    Φ = -(validation loss - that of the twin without growth at the same FLOPs) - λ log(parameters / the bare host's)

    dense     r_t = Φ_t - Φ_{t-1} - price of a birth * births - price of a prune * prunes
    sparse    r_T = Φ_T - Φ_0 - all prices; 0 before

Φ is kept at the end and nothing is discounted, so both sum to the same total: the final objective minus the prices.
This is potential-based shaping (Ng, Harada, Russell 1999, "Policy invariance under reward transformations") with the
potential's last value left in, which makes it the objective itself rather than a hint. What costs FLOPs needs no price:
a host that grows has trained for fewer steps than its twin when both have spent the same.

Nats of one task are not those of another: the loss of a CNN jumps by a tenth from tick to tick, that of a GPT by a
hundredth. Paid in units of the twin's own noise, no task drowns another. It is one factor for a whole trial, so what is
best in a task stays best.

A trial that comes apart ends on that step, with a Φ below that of every way to finish: the greatest loss that counts,
every slot full of the largest blueprint, and churn at every tick.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from esper.leyline.errors import EsperError
from esper.leyline.fields import Checks
from esper.leyline.protocols import Ending, Report


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """What growth is paid for, in nats of validation loss per sample."""

    size_price: float = 0.02
    """λ: nats for each e-fold of the parameters relative to the bare host."""

    birth_price: float = 0.002
    """Nats for each seed that enters the network."""

    prune_price: float = 0.002
    """Nats for each seed that is pruned, whatever ended it."""

    most_loss: float = 3.0
    """Nats above the twin beyond which a loss counts as no worse; so the worst finish is a finite number."""

    sparse: bool = False
    """Pay everything at the end."""

    in_noise: bool = False
    """Pay in units of the twin's own noise (`esper.simic.env.twins.Curve.noise`) instead of nats; parts stay nats."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("size_price", "birth_price", "prune_price"):
                check(name, getattr(self, name) >= 0, "nats, must be >= 0")
            check("most_loss", self.most_loss > 0, "nats, must be > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """The reward of one tick and its parts, which sum to it (in the sparse form: to what is put by).

    Fields:
        reward: what is paid, in nats or in units of the twin's noise.
        loss: change of -(loss - twin's).
        size: change of -λ log(parameters).
        births: minus the price of births.
        prunes: minus the price of prunes.
        apart: what a trial loses by coming apart, beyond Φ's fall to the worst loss; 0 in all others.
        potential: Φ at this tick.
    """

    reward: float
    loss: float
    size: float
    births: float
    prunes: float
    apart: float
    potential: float


class Reward:
    """Pays for one trial.

    Args:
        config: prices.
        twin: from FLOPs to the validation loss of the twin without growth.
        first: report with which the trial began.
        unit: nats in a unit of what is paid.
    """

    def __init__(self, config: RewardConfig, twin: Callable[[int], float], first: Report, *, unit: float = 1.0) -> None:
        self._config, self._twin, self._unit = config, twin, unit
        self._owed = 0.0
        self._loss, self._size = self._excess(first), self._price_of_size(first.parameters, first)

    def pay(self, report: Report) -> Payment:
        """Returns the reward of the tick that ended with this report.

        Raises:
            EsperError: the trial goes on without a validation loss.
        """
        config = self._config
        diverged = report.ending is Ending.DIVERGED
        loss = config.most_loss if diverged else self._excess(report)
        size = self._price_of_size(report.parameters, report)
        apart = -self._beyond(report, size) if diverged else 0.0
        parts = {
            "loss": self._loss - loss,
            "size": self._size - size,
            "births": -config.birth_price * report.births,
            "prunes": -config.prune_price * report.prunes,
            "apart": apart,
        }
        self._loss, self._size = loss, size
        self._owed += math.fsum(parts.values())
        reward = 0.0
        if not config.sparse or report.ending in (Ending.SPENT, Ending.DIVERGED):
            reward, self._owed = self._owed / self._unit, 0.0
        return Payment(reward=reward, potential=-loss - size, **parts)

    def _excess(self, report: Report) -> float:
        value = report.validation_loss.value
        if value is None:
            raise EsperError(
                f"tick {report.observation.tick}: no validation loss, which the reward needs at every tick; "
                "set control.validate_every=1"
            )
        return min(value - self._twin(report.flops), self._config.most_loss)

    def _price_of_size(self, parameters: int, report: Report) -> float:
        return self._config.size_price * math.log(parameters / report.observation.host.parameters)

    def _beyond(self, report: Report, size: float) -> float:
        """How far below the worst finish's potential a trial that came apart must go, in nats."""
        seen = report.observation
        most = seen.host.parameters + sum(max((b.parameters for b in s.catalogue), default=0) for s in seen.slots)
        ticks = seen.total_steps * seen.tick / seen.step
        churn = ticks * len(seen.slots) * (self._config.birth_price + self._config.prune_price)
        return self._price_of_size(most, report) - size + churn
