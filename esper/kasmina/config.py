"""Settings of the growing model: slots, incubation, budgets, gates."""

from dataclasses import dataclass, field
from enum import StrEnum

from esper.kasmina.channels import channels_path, parse_channels
from esper.leyline.checks import Checks
from esper.leyline.slots import sort_slots


class Incubation(StrEnum):
    """How a TRAINING seed learns. SHADOW: it sees the loss at full alpha in a forward of its own, all else frozen.
    STE: straight-through, forward exactly the host's, gradient as if added. IMMEDIATE: no incubation, blended from
    birth."""

    SHADOW = "shadow"
    STE = "ste"
    IMMEDIATE = "immediate"


class EvidencePolicy(StrEnum):
    """ENFORCE: evidence checks bind. OBSERVE: they are measured and logged only; integrity checks still bind."""

    ENFORCE = "enforce"
    OBSERVE = "observe"


@dataclass(kw_only=True, slots=True)
class SlotsConfig:
    """Where and how seeds may live.

    Fields:
        ids: slot ids in use; empty means every slot of the host.
        incubation: how a TRAINING seed learns.
        embargo_ticks: ticks a slot rests in EMBARGOED after a prune.
        max_live: seeds alive at the same time; null is unlimited. Fossils do not count.
        max_germinations: births in a run; null is unlimited.
        max_parameters: parameters that growth may add, living and fossil; null is unlimited.
        max_flops: forward FLOPs per sample that growth may add; null is unlimited.
        train_fossils: fossilised seeds keep learning.
        channels: slot id -> vector v of CHANNEL, one value in [0, 1] per channel, as text ("1,0.5,0"); null for none.
        history: stage changes remembered per slot.
        planted: slot id -> blueprint of seeds that are part of the network from the first step, as fossils are.
    """

    ids: list[str] = field(default_factory=list)
    incubation: Incubation = Incubation.IMMEDIATE
    embargo_ticks: int = 5
    max_live: int | None = 2
    max_germinations: int | None = None
    max_parameters: int | None = None
    max_flops: int | None = None
    train_fossils: bool = True
    channels: dict[str, str] | None = None
    history: int = 64
    planted: dict[str, str] | None = None

    def __post_init__(self) -> None:
        sort_slots(self.ids)
        sort_slots(self.channels or ())
        for slot, text in (self.channels or {}).items():
            parse_channels(text, channels_path(slot).removeprefix("slots."))
        sort_slots(self.planted or ())
        with Checks(self) as check:
            check("embargo_ticks", self.embargo_ticks >= 0, "ticks, must be >= 0")
            check("max_live", self.max_live is None or self.max_live >= 1, "must be >= 1, or null for no limit")
            for name in ("max_germinations", "max_parameters", "max_flops"):
                value = getattr(self, name)
                check(name, value is None or value >= 0, "must be >= 0, or null for no limit")
            check("history", 1 <= self.history <= 10_000, "must be 1 to 10000")


@dataclass(kw_only=True, slots=True)
class GateConfig:
    """Thresholds of the gates, in stated units.

    Fields:
        evidence: whether evidence checks bind.
        k_se: standard errors by which a paired difference must be better at G2, and may be worse at G3, after the
            correction for skewness. 2.7 at 5 looks: 1.9 % of seeds that do not help pass in a life where differences
            are normal (Bonferroni: 5 one-sided looks of 0.38 % each); the rest, up to 5 %, is room for skewness.
        hold_k_se: the same at G5. 3.14 at 10 looks: 1 % in a life, whatever had passed before.
        looks: scheduled looks at G2 in a life; as many at G3, and at partial alphas, where no gate asks.
        look_every: ticks between looks.
        first_look: dwell in ticks before the first look at G2.
        hold_looks: looks at G5 in a life, however often the seed comes to HOLDING.
        min_dwell: ticks in a stage before ADVANCE or FOSSILIZE is legal.
        min_samples: paired samples under which evidence is absent.
        probe_samples: samples of the probe part drawn for a look; at most half of it, so that looks differ.
        fresh_ticks: age in ticks beyond which evidence is stale.
        min_contribution: nats per sample that a seed must contribute to fossilise.
        auto_advance: gates (of G1, G2, G3) through which a seed goes by itself once they pass; fossilising never is.
        max_vanishing, max_exploding: share of a seed's parameters, 0 to 1, whose gradient may vanish or explode (see
            ``optim.vanishing_rms`` and ``optim.exploding_rms``) for it to be healthy.
        degraded_ticks: ticks for which a seed may run by a fallback taken at run time before it is pruned.
    """

    evidence: EvidencePolicy = EvidencePolicy.ENFORCE
    k_se: float = 2.7
    hold_k_se: float = 3.14
    looks: int = 5
    look_every: int = 2
    first_look: int = 3
    hold_looks: int = 10
    min_dwell: int = 1
    min_samples: int = 64
    probe_samples: int = 192
    fresh_ticks: int = 1
    min_contribution: float = 0.002
    auto_advance: list[str] = field(default_factory=list)
    max_vanishing: float = 0.9
    max_exploding: float = 0.1
    degraded_ticks: int = 3

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("k_se", "hold_k_se"):
                check(name, getattr(self, name) >= 0, "standard errors, must be >= 0")
            for name in ("looks", "look_every", "first_look", "hold_looks", "min_dwell"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("min_samples", self.min_samples >= 2, "must be >= 2 (a standard error needs two)")
            check("probe_samples", self.probe_samples >= self.min_samples, "must be >= gates.min_samples")
            check("fresh_ticks", self.fresh_ticks >= 0, "ticks, must be >= 0")
            check("min_contribution", self.min_contribution >= 0, "nats, must be >= 0")
            check("auto_advance", set(self.auto_advance) <= {"G1", "G2", "G3"}, "may hold G1, G2, G3")
            for name in ("max_vanishing", "max_exploding"):
                check(name, 0 <= getattr(self, name) <= 1, "a share, must be in [0, 1]")
            check("degraded_ticks", self.degraded_ticks >= 0, "ticks, must be >= 0")
