"""Settings of the growing model: slots, incubation, budgets, gates."""

from dataclasses import dataclass, field
from enum import StrEnum

from esper.leyline.channels import channels_path, parse_channels
from esper.leyline.checks import Checks
from esper.leyline.slots import sort_slots
from esper.leyline.stages import Incubation


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


@dataclass(kw_only=True, slots=True)
class GovernorConfig:
    """When a run is judged sick, what it goes back to, and how long growth waits then.

    Fields:
        enabled: judge at every tick, keep snapshots, roll back.
        history: losses of healthy ticks that a new one is compared with. min_history: fewer say nothing.
        deviations: robust standard deviations (1.4826 times the median absolute deviation) above the median, and
        rise: nats as a share of the chance level, that a loss must *both* exceed to be out of line.
        patience: ticks out of line in a row that are a panic; what is not finite is one at once.
        blowup: multiples of the chance level (or of the least loss so far, if that is more) above which a training loss
        has diverged however it came there.
        collapse: share of the chance level from which a training loss is collapsed, if its median had been below
        clearly_better: another share of it.
        snapshot_ticks: ticks between snapshots in memory; a save takes one too. ring: how many are kept, by each rank.
        blame_ticks: a change in a slot older than this, in ticks, is not blamed.
        embargo_ticks: ticks for which no seed germinates in a slot that was blamed.
        max_replays: rollbacks without a recovery between them, after which the run ends as diverged.
        recover_ticks: healthy ticks beyond the tick of the panic that are a recovery.
        cool_ticks: ticks without births after the first panic that growth is blamed for; each further one doubles it.
        trial_ticks: healthy ticks that one seed must then stand blended before others may be born.
        max_trips: panics that growth is blamed for, without a success between them, after which births stay forbidden.
    """

    enabled: bool = True
    history: int = 16
    min_history: int = 8
    deviations: float = 6.0
    rise: float = 0.1
    patience: int = 2
    blowup: float = 3.0
    collapse: float = 0.95
    clearly_better: float = 0.8
    snapshot_ticks: int = 5
    ring: int = 3
    blame_ticks: int = 10
    embargo_ticks: int = 50
    max_replays: int = 3
    recover_ticks: int = 10
    cool_ticks: int = 20
    trial_ticks: int = 5
    max_trips: int = 3

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("min_history", self.min_history >= 3, "ticks, must be >= 3")
            check("history", self.history >= self.min_history, "ticks, must not be below governor.min_history")
            check("deviations", self.deviations > 0, "must be > 0")
            check("rise", self.rise > 0, "must be > 0")
            for name in ("patience", "snapshot_ticks", "blame_ticks", "cool_ticks", "trial_ticks", "max_trips"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("blowup", self.blowup > 1, "must be > 1")
            check("clearly_better", 0 < self.clearly_better < self.collapse, "must be between 0 and governor.collapse")
            check("ring", self.ring >= 2, "must be >= 2: one that is cleared, and one that is yet to be")
            for name in ("embargo_ticks", "max_replays", "recover_ticks"):
                check(name, getattr(self, name) >= 0, "must be >= 0")
