"""The size of a seed at its birth: relative to the features at its site, and without a jump of the loss.

A staged seed waits one tick. Meanwhile its slot tallies the mean square of the feature in every training forward; the
sums travel in the observe vector, so that all ranks agree on its root (RMS) to the bit. Before the commit that settles
the birth, each rank sets the seed's layer scale to a tenth of that, and compares the loss at alpha 1 with that at
alpha 0 on the same probe samples, all of them on every rank. A seed that raises it visibly is refused: MOVES_LOSS.

*Visibly* means by more than `gates.birth_k_se` standard errors of the mean loss itself. The paired error would be too
fine a measure: a random map almost always hurts a little, and a seed has its ramp to learn better.

Nothing of this is stored. A run that resumes or goes back between staging and entry repeats the same steps, hears the
same features and comes to the same bits; what lies in the library has no size yet.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from esper.accord.config import GateConfig
from esper.accord.effects import Veto
from esper.accord.state import RunState, Terms
from esper.kasmina.axes.block import OwnBlock
from esper.kasmina.blueprints.parts import LAYER_SCALE_INIT, LayerScale
from esper.kasmina.slots.grown import Grown
from esper.leyline.alpha import Operator
from esper.tolaria.growth.staging import NotFinite, Unfit
from esper.tolaria.ranks.memory import free_bytes

LEAST = 1e-3  # RMS of a feature that is about to die; a gamma near 0 would have no gradient behind it
UNHEARD = "no training forward has passed its site since it was staged"


class MeasuresBirth(Protocol):
    """An evaluator, as far as a birth needs it."""

    def birth_sums(self, slot: str, generation: int, gates: GateConfig) -> tuple[dict[str, float], ...]:
        """Sums of the loss at alpha 0 and at alpha 1 over the same samples, all of them on every rank; empty without.

        Args:
            slot: holds the seed that is about to be born.
            generation: of that seed.
            gates: says how many samples to draw.
        """


class Unheard(Unfit):
    """No feature has passed its site yet."""

    veto = Veto.NOT_READY


class NoRoom(Unfit):
    """This rank has less memory left than it is forecast to take."""

    veto = Veto.OUT_OF_MEMORY


class MovesLoss(Unfit):
    """It raises the loss at its birth."""

    veto = Veto.MOVES_LOSS


def set_size(seed: nn.Module, operator: Operator, features: float, share: float = LAYER_SCALE_INIT) -> None:
    """Sets the layer scales of a seed at birth.

    Args:
        seed: not planted yet.
        operator: by which it will be joined.
        features: RMS of the features at its site.
        share: of that, which the scales begin with.
    """
    features = max(features, LEAST)
    for module in seed.modules():
        if isinstance(module, LayerScale):
            module.set_size(1.0 if operator is Operator.MULTIPLY else features, features, share)


@dataclass(frozen=True, slots=True)
class BirthCheck:
    """Gives staged seeds their size, and refuses those that raise the loss.

    Fields:
        grown: the model.
        state: the agreed record.
        sums: the reduced observe vector by name.
        evaluator: measures the loss; None where there is none.
        terms: of the run.
    """

    grown: Grown
    state: RunState
    sums: Mapping[str, float]
    evaluator: MeasuresBirth | None
    terms: Terms

    def __call__(self, slot: str, seed: nn.Module) -> None:
        """Checks one seed.

        Raises:
            Unfit: it cannot be born in this tick; says why.
        """
        entry = self.state.slot(slot)
        assert entry.staged is not None
        self._check_room(slot, str(entry.staged.blueprint))
        if isinstance(seed, OwnBlock):
            return  # its size is that of its host's block, and its weights are not those that it enters with
        count, total = self.sums[f"{slot}.feature_count"], self.sums[f"{slot}.feature_sq"]
        if count == 0:
            raise Unheard(UNHEARD)
        operator = entry.staged.operator or Operator.ADD
        share = self.terms.slots_config.block_scale if entry.staged.blueprint == "block" else LAYER_SCALE_INIT
        set_size(seed, operator, math.sqrt(total / count), share)
        if self.evaluator is None:
            return
        holder = self.grown.slots[slot]
        holder.seed, holder.operator = seed, Operator.ADD if operator.is_gated else operator
        try:
            sums = self.evaluator.birth_sums(slot, entry.generation + 1, self.terms.gates)
        finally:
            holder.seed, holder.operator = None, Operator.ADD
        if sums:
            judge_birth(str(entry.staged.blueprint), self.terms.gates, *sums)

    def _check_room(self, slot: str, blueprint: str) -> None:
        need = self.terms.info(slot, blueprint).memory
        free = free_bytes(next(self.grown.model.parameters()).device)
        if need is not None and free is not None and need > free:
            raise NoRoom(f"{blueprint} is forecast to take {need} bytes, {free} are free here")


def judge_birth(blueprint: str, gates: GateConfig, without: Mapping[str, float], within: Mapping[str, float]) -> None:
    """Judges the loss around a birth.

    Args:
        blueprint: of the seed.
        gates: says by how much a seed may raise the loss.
        without: `sample_sums` at alpha 0.
        within: `sample_sums` at alpha 1, of the same samples.

    Raises:
        Unfit: it raises the loss visibly, or makes one that is not finite.
    """
    count = without["count"]
    if count < 2 or not math.isfinite(without["loss"]):
        return  # no sample, or a host that is broken by itself
    before, after = without["loss"] / count, within["loss"] / count
    if not math.isfinite(after):
        raise NotFinite(f"{blueprint} makes a loss that is not finite at alpha 1")
    se = math.sqrt(max(0.0, without["loss_sq"] / count - before * before) / (count - 1))
    most = gates.birth_k_se
    if after - before > most * se:
        raise MovesLoss(
            f"{blueprint} moves the loss of {count:.0f} probe samples from {before:.4f} to {after:.4f} at alpha 1, "
            f"by more than gates.birth_k_se = {most:g} standard errors of {se:.4f}"
        )
