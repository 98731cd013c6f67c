"""What one trial is made of, as its builder hands it over.

Whatever belongs to a run's data, its batches or its births is a function of the trainer's own, called through these
fields: the same samples in the same order, the same draws of the probe, the same seeds, the same refusals.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from esper.accord.effects import Veto
from esper.accord.lifecycle import ProbeRequest
from esper.accord.state import RunState, Terms
from esper.kasmina.slots.grown import Grown
from esper.leyline.alpha import Operator
from esper.leyline.commands import Command
from esper.leyline.observation import Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How gradients become updates; the same for all nets that are stepped together.

    Fields:
        adamw: torch.optim.AdamW, else torch.optim.SGD.
        momentum: of SGD.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: of the host's matrices.
        seed_weight_decay: of the seeds' matrices.
        clip_norm: L2 norm to which each owner's gradient is clipped by itself; None: no clipping.
        seed_lr_scale: rate of seeds as a multiple of the host's.
        seed_warmup_steps: optimizer steps of a seed's linear warm-up; 0: none.
        vanishing_rms: root mean square of a tensor's gradient below which it vanishes.
        exploding_rms: the same above which it explodes.
        health_every: optimizer steps between two samples of gradient health.
    """

    adamw: bool
    momentum: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    seed_weight_decay: float
    clip_norm: float | None
    seed_lr_scale: float
    seed_warmup_steps: int
    vanishing_rms: float
    exploding_rms: float
    health_every: int


class Samples(Protocol):
    """One part of a data set."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """x and y of these samples, int64 [M], on the CPU."""


class Births(Protocol):
    """Builds and judges seeds by the rules of the trainer."""

    def build(self, slot: str, blueprint: str, generation: int) -> nn.Module | Veto:
        """Builds the seed of a birth and runs it once; a veto where it fails."""

    def build_gate(self, state: RunState, slot: str) -> nn.Module:
        """Builds the gate that the record of a slot wants."""

    def set_size(self, seed: nn.Module, operator: Operator, features: float) -> None:
        """Sets the layer scales of a seed.

        Args:
            seed: not in the network yet.
            operator: by which it will be joined.
            features: root mean square of the features at its site.
        """

    def draw(self, slot: str, generation: int) -> Tensor:
        """Samples of the probe on which the loss around this birth is measured, int64 [M]."""

    def judge(self, blueprint: str, without: Mapping[str, float], within: Mapping[str, float]) -> Veto:
        """Says whether the loss at alpha 0 and at alpha 1 lets the seed be born; `Veto.NONE` if so."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """One trial.

    Fields:
        grown: the host with empty slots and its first weights.
        terms: what the record is judged by.
        seed: of the run; births follow from it.
        budget: training FLOPs of the task.
        rules: of the optimizer.
        language: a sample is a sequence with a target at each position, else it is an image with a class.
        train: training part.
        validation: validation part.
        probe: probe part.
        batch: samples of a global batch, at most.
        eval_batch: samples of a forward in evaluation.
        stage_ticks: ticks for which a staged seed may stay not ready.
        max_consecutive: skipped steps in a row that end a run.
        indices: samples of the batch of an optimizer step, int64 [M].
        epoch: passes over the training part begun by the end of an optimizer step, from 1.
        host_lr: rate of the host at an optimizer step.
        due: whether a tick is due, given the state, the steps done, and the steps skipped in a row.
        validates: whether a tick validates, given its number and the steps done.
        look: samples of a look at the seed in a slot, and for each the place of its cluster, int64 [M] each; of the
            training part where the request is a refill, else of the probe part.
        births: builds and judges seeds.
        propose: the commands of a tick as they travel: one per slot, numbered.
        agree: the sums of one process as all ranks would agree on them: every name, what is not finite counted.
        judge: adds the governor's verdict to a state, given the sums and the optimizer step of the tick before.
    """

    grown: Grown
    terms: Terms
    seed: int
    budget: int
    rules: Rules
    language: bool
    train: Samples
    validation: Samples
    probe: Samples
    batch: int
    eval_batch: int
    stage_ticks: int
    max_consecutive: int
    indices: Callable[[int], Tensor]
    epoch: Callable[[int], int]
    host_lr: Callable[[int], float]
    due: Callable[[RunState, int, int], bool]
    validates: Callable[[int, int], bool]
    look: Callable[[str, ProbeRequest], tuple[Tensor, Tensor]]
    births: Births
    propose: Callable[[Sequence[Command], Observation, RunState], dict[str, Command]]
    agree: Callable[[Mapping[str, float]], dict[str, float]]
    judge: Callable[[RunState, Mapping[str, float], int], RunState]
