"""Settings of the growing model: slots, incubation, budgets, gates. The governor's: `esper.accord.governor.config`."""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from esper.leyline.channels import channels_path, parse_channels
from esper.leyline.fields import Checks
from esper.leyline.legality import COPY
from esper.leyline.slots import sort_slots
from esper.leyline.stages import Incubation


class Baseline(StrEnum):
    """STANDING: the network without the seed. CONTINUED: also copies with and without it that are trained on."""

    STANDING = "standing"
    CONTINUED = "continued"


class EvidencePolicy(StrEnum):
    """ENFORCE: evidence checks bind. OBSERVE: they are measured and logged only; integrity checks still bind."""

    ENFORCE = "enforce"
    OBSERVE = "observe"


def _compiles(expression: str) -> bool:
    try:
        re.compile(expression)
    except re.error:
        return False
    return True


class CopyInit(StrEnum):
    """IDENTITY: the last projections of a copied block begin at zero. COPY: all weights are the host's."""

    IDENTITY = "identity"
    COPY = "copy"


@dataclass(kw_only=True, slots=True)
class SlotsConfig:
    """Where and how seeds may live."""

    ids: list[str] = field(default_factory=list)
    """Slot ids in use, as [r0c0, r1c0]; empty: every slot of the host."""

    incubation: Incubation = Incubation.IMMEDIATE
    """How a seed in TRAINING learns: ``shadow`` sees the loss at full alpha in a forward of its own, ``ste`` is
    straight-through (the host's output, the gradient as if the seed were added), ``immediate`` is no incubation: the
    seed blends from birth.
    """

    embargo_ticks: int = 5
    """Ticks that a slot rests in EMBARGOED after a prune; 0: none."""

    max_live: int | None = 2
    """Seeds alive at the same time, fossils not counted; null: no limit."""

    max_germinations: int | None = None
    """Births in a run; null: no limit."""

    max_parameters: int | None = None
    """Parameters that growth may add, living seeds and fossils together; null: no limit."""

    max_flops: int | None = None
    """Forward FLOPs per sample that growth may add; null: no limit."""

    max_memory_mib: int | None = None
    """Mebibytes that growth may take on each rank, living seeds and fossils together, as forecast before a birth
    (docs/health.md); null: no limit.
    """

    memory_batch: int | None = None
    """Samples of one forward on a rank, by which memory is forecast; null: those of the trainer. A session knows none,
    so that it needs this for ``max_memory_mib``.
    """

    train_fossils: bool = True
    """Whether fossilised seeds keep learning."""

    channels: dict[str, str] | None = None
    """Vectors v of the operator CHANNEL: slot id -> one value in [0, 1] per channel, as text, {r0c0: "1,0.5,0"}; null:
    none.
    """

    history: int = 64
    """Stage changes remembered per slot, 1 to 10000."""

    planted: dict[str, str] | None = None
    """Seeds that are part of the network from the first step, as fossils are: slot id -> blueprint, {r0c0: conv_light};
    null: none.
    """

    blocks: list[str] = field(default_factory=list)
    """Whole blocks on offer beside the parts that every slot offers: ``block`` (attention and MLP, or a residual pair
    of convolutions) and ``copy`` (a copy of the host's own block at the site; docs/blocks.md); empty: none.
    """

    block_scale: float = 0.1
    """Size of a ``block`` at its birth: its layer scale as a share of the features at its site, 0 to 1."""

    copy_init: CopyInit = CopyInit.IDENTITY
    """Weights of a ``copy``: ``identity`` is the host's with the last projections at zero, so that it computes the
    identity at its birth; ``copy`` is the host's as they are.
    """

    copy_moments: float = 0.0
    """Share of the optimizer's averages with which a ``copy`` begins: of those that the host's block has as the copy
    enters, averages of squares by its square; 0 to 1, 0: fresh.
    """

    copy_zero: list[str] = field(default_factory=list)
    """Regular expressions for whole names of modules, as the copied block has them, that are zero under
    ``copy_init=identity``, for example [attn.c_proj]; empty: the known ones of GPT-2, Llama, ViT and ResNet.
    """

    def __post_init__(self) -> None:
        sort_slots(self.ids)
        sort_slots(self.channels or ())
        for slot, text in (self.channels or {}).items():
            parse_channels(text, channels_path(slot).removeprefix("slots."))
        sort_slots(self.planted or ())
        with Checks(self) as check:
            check("embargo_ticks", self.embargo_ticks >= 0, "ticks, must be >= 0")
            check("max_live", self.max_live is None or self.max_live >= 1, "must be >= 1, or null for no limit")
            for name in ("max_germinations", "max_parameters", "max_flops", "max_memory_mib"):
                value = getattr(self, name)
                check(name, value is None or value >= 0, "must be >= 0, or null for no limit")
            known = sorted(set(self.blocks) - {"block", COPY})
            check("blocks", not known and len(set(self.blocks)) == len(self.blocks), "block, copy, both or none")
            check("copy_moments", 0 <= self.copy_moments <= 1, "must be 0 to 1")
            check("block_scale", 0 < self.block_scale <= 1, "must be above 0, to 1")
            for name in self.copy_zero:
                check("copy_zero", _compiles(name), f"{name!r} is no regular expression")
            for slot, name in (self.planted or {}).items():
                planted = f"{slot}: a copy is of a host that has trained; give the host one more block"
                check("planted", name != COPY, planted)
            check("memory_batch", self.memory_batch is None or self.memory_batch >= 1, "samples, must be >= 1, or null")
            check("history", 1 <= self.history <= 10_000, "must be 1 to 10000")


@dataclass(kw_only=True, slots=True)
class GateConfig:
    """Thresholds of the gates, in stated units."""

    evidence: EvidencePolicy = EvidencePolicy.ENFORCE
    """``enforce``: checks of evidence bind. ``observe``: they are measured and logged only, for baselines that decide
    without them; integrity checks still bind.
    """

    false_share: float = 0.05
    """Share of a run's fossils, in (0, 1), that may be expected to be false: true contribution not above
    ``min_contribution``. The births of a run share it out (docs/gates.md); the first one has 0.1835 of it.
    """

    help_level: float = 0.05
    """Chance, in (0, 1), that luck lets a seed that does not help pass G2 in its life."""

    harm_level: float = 0.05
    """Chance, in (0, 1), that luck speaks so much against a seed that does not hurt that G3 refuses it."""

    look_every: int = 2
    """Ticks between looks."""

    relook_every: int = 10
    """Ticks between looks at a seed in HOLDING whose looks are spent, and between looks at a partial alpha."""

    fossil_every: int | None = 50
    """Ticks between looks at a fossil, of which one that the network is better without is told; null: none."""

    first_look: int = 3
    """Ticks in the stage before the first look at G2."""

    min_dwell: int = 1
    """Ticks in a stage before ADVANCE or FOSSILIZE is legal."""

    min_samples: int = 64
    """Paired samples below which evidence is absent."""

    probe_samples: int = 128
    """Samples of the probe part that a look draws, at least. The looks of a life are equal shares of the part, and no
    two of them draw the same sample: evidence adds up, so this decides how it is spread over time, not how much it is.
    """

    reserve: float = 0.125
    """Share of the looks, 0 to 0.5, that is kept for seeds in HOLDING once all others are spent, and for fossils."""

    statistics_samples: int = 4096
    """Training samples from which a host with BatchNorm, and no other, takes running statistics of each arm anew."""

    birth_k_se: float = 3.0
    """Standard errors of the mean probe loss by which a seed may raise it at its birth, at alpha 1; one that raises it
    more is not born.
    """

    max_left_out: float = 0.01
    """Share of a look's samples, 0 to 1, that may have a loss that is not finite. They are left out and told of; with
    more than this the look gives no evidence.
    """

    fresh_ticks: int = 1
    """Age in ticks beyond which evidence is stale; 0: only this tick's is fresh."""

    min_contribution: float = 0.002
    """Nats per sample that a seed must be shown to contribute more than, to fossilise."""

    baseline: Baseline = Baseline.STANDING
    """What a seed must be better than at G5. ``standing``: the network without it, as it is. ``continued``: also the
    network without it after the same further steps, which tells help from reliance and from mere speed.
    """

    continue_steps: int = 100
    """Further optimizer steps of the copies; they are compared at three tenths of them and at the end."""

    continue_piece: int = 100
    """Steps of copies taken in a tick, which lasts that much longer; all copies need four times ``continue_steps``."""

    continue_batch: int = 32
    """Samples of a batch of the copies, the same on every rank; at most the run's own batch."""

    continue_spans: float = 8.0
    """Spans between both comparisons over which help is extrapolated at most; never beyond the run."""

    continue_se: float = 1.64
    """Standard errors by which the help that is left then must be above ``min_contribution``."""

    continuations: int = 3
    """Times that a life is continued; then only PRUNE is left."""

    auto_advance: list[str] = field(default_factory=list)
    """Gates (of G1, G2, G3) through which a seed goes by itself once they pass; empty: none. Fossilising always takes a
    command.
    """

    max_vanishing: float = 0.9
    """Share of a seed's parameters, 0 to 1, whose gradient may vanish (see ``optim.vanishing_rms``) for it to be
    healthy.
    """

    max_exploding: float = 0.1
    """Share of a seed's parameters, 0 to 1, whose gradient may explode (see ``optim.exploding_rms``) for it to be
    healthy.
    """

    allow_foldable: bool = False
    """Whether a seed may be born, and become a fossil, that export would fold into a layer of the host that learns
    itself, such as low rank at a Linear layer: it adds nothing that the layer cannot learn. At a frozen layer, and by
    MULTIPLY, it adds something, and needs no leave.
    """

    degraded_ticks: int = 3
    """Ticks that a seed may run by a fallback taken at run time before it is pruned."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("false_share", "help_level", "harm_level"):
                check(name, 0 < getattr(self, name) < 1, "a chance, must be between 0 and 1")
            check("birth_k_se", self.birth_k_se >= 0, "standard errors, must be >= 0")
            for name in ("look_every", "relook_every", "first_look", "min_dwell"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            for name in ("continue_piece", "continue_batch", "continuations"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("fossil_every", self.fossil_every is None or self.fossil_every >= 1, "ticks, must be >= 1, or null")
            check("min_samples", self.min_samples >= 2, "must be >= 2 (a standard error needs two)")
            check("probe_samples", self.probe_samples >= self.min_samples, "must be >= gates.min_samples")
            check("statistics_samples", self.statistics_samples >= 2, "must be >= 2 (a variance needs two)")
            check("reserve", 0 <= self.reserve <= 0.5, "a share, must be in [0, 0.5]")
            check("max_left_out", 0 <= self.max_left_out <= 1, "a share, must be in [0, 1]")
            check("fresh_ticks", self.fresh_ticks >= 0, "ticks, must be >= 0")
            check("min_contribution", self.min_contribution >= 0, "nats, must be >= 0")
            check("continue_steps", self.continue_steps >= 4, "optimizer steps, must be >= 4")
            check("continue_spans", self.continue_spans >= 0, "must be >= 0")
            check("continue_se", self.continue_se >= 0, "standard errors, must be >= 0")
            check("auto_advance", set(self.auto_advance) <= {"G1", "G2", "G3"}, "may hold G1, G2, G3")
            for name in ("max_vanishing", "max_exploding"):
                check(name, 0 <= getattr(self, name) <= 1, "a share, must be in [0, 1]")
            check("degraded_ticks", self.degraded_ticks >= 0, "ticks, must be >= 0")
