"""Makes the recipe of one trial for hosts that are stepped together: the trainer's own functions, bound to a config.

A trial of a recipe and a run of the same config on one rank come to the same numbers (tests/simic/batched).
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.accord.config import Baseline
from esper.accord.effects import Veto
from esper.accord.judge import judge_tick
from esper.accord.lifecycle import ProbeRequest
from esper.accord.state import RunState, Terms
from esper.config.tree import EsperConfig
from esper.kasmina.slots.grown import Grown
from esper.leyline.alpha import Operator
from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError
from esper.leyline.observation import Observation
from esper.leyline.stages import Incubation
from esper.run.trials.parts import TrialMaker, TrialParts
from esper.simic.batched import BatchedTrials
from esper.simic.batched.recipe import Recipe, Rules
from esper.tamiyo.scripted import Scripted
from esper.tolaria.data.augment import Augment
from esper.tolaria.data.clusters import draw_share
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import draw
from esper.tolaria.data.task import Task
from esper.tolaria.growth import planting
from esper.tolaria.growth.config import OptimizerKind, Schedule
from esper.tolaria.growth.policy import lr_shape
from esper.tolaria.growth.size import judge_birth, set_size
from esper.tolaria.growth.staging import check_forward, check_weights, veto_of
from esper.tolaria.lockstep.propose import propose
from esper.tolaria.lockstep.tick import tick_due
from esper.tolaria.lockstep.wire import ObserveLayout
from esper.tolaria.training.looks import refills_of
from esper.tolaria.training.precision import HALF, dtype_of


@dataclass(frozen=True, slots=True)
class RunBirths:
    """Births by the trainer's rules, for one run; see `esper.simic.batched.recipe.Births`."""

    config: EsperConfig
    grown: Grown
    terms: Terms
    probe: int
    dtype: torch.dtype

    @property
    def _options(self) -> dict[str, Any]:
        return {"run_seed": self.config.seed, "dtype": self.dtype, "device": torch.device("cpu")}

    def build(self, slot: str, blueprint: str, generation: int) -> nn.Module | Veto:
        """Builds a seed and runs it once; a veto where it fails."""
        site = self.grown.sites[slot]
        try:
            seed = planting.build(self.grown, slot, blueprint, generation, **self._options)
            check_weights(seed, site, blueprint)
            check_forward(seed, site, blueprint, dtype=self.dtype, device=torch.device("cpu"))
        except Exception as error:
            return veto_of(error)[0]
        return seed

    def build_gate(self, state: RunState, slot: str) -> nn.Module:
        """Builds the gate that the record of a slot wants."""
        return planting.gate_for(self.grown.sites[slot], state.slot(slot), **self._options)

    def set_size(self, seed: nn.Module, operator: Operator, features: float) -> None:
        """Sets the layer scales of a seed."""
        set_size(seed, operator, features)

    def draw(self, slot: str, generation: int) -> Tensor:
        """Samples of the probe on which the loss around this birth is measured."""
        count = min(self.config.gates.probe_samples, self.probe)
        return draw(self.probe, count, "birth", self.config.seed, slot, generation)

    def judge(self, blueprint: str, without: Mapping[str, float], within: Mapping[str, float]) -> Veto:
        """Says whether the loss at alpha 0 and at alpha 1 lets the seed be born."""
        try:
            judge_birth(blueprint, self.terms.gates, without, within)
        except Exception as error:
            return veto_of(error)[0]
        return Veto.NONE


def batched_trials(size: int, maker: TrialMaker) -> BatchedTrials[Any]:
    """Hosts of this process, those of one shape stepped together; for `make_environment`."""
    return BatchedTrials(size, lambda task, seed: make_recipe(maker.trial(task, seed)))


def make_recipe(parts: TrialParts) -> Recipe:
    """The recipe of a trial from its parts.

    Raises:
        ConfigError: such a run cannot be stepped together with others; says which setting is in the way.
    """
    config, grown, plan = parts.config, parts.grown, parts.plan
    bundle, terms, chance = parts.task.bundle, parts.task.terms, parts.task.chance
    _check(config, bundle)
    layout, controller = ObserveLayout(list(grown.slots)), Scripted()
    optim, governor, trainer, control = config.optim, config.governor, config.trainer, config.control

    def proposed(commands: Sequence[Command], observation: Observation, state: RunState) -> dict[str, Command]:
        controller.commands = commands
        return propose(controller, observation, state.proposals, terms.names)

    refills = functools.cache(lambda: refills_of(terms.probe, bundle, plan))

    def look(slot: str, request: ProbeRequest) -> tuple[Tensor, Tensor]:
        if request.refill:
            return bundle.train_clusters.members(refills().shares[request.look - 1])
        clusters, key = bundle.probe_clusters, ("probe", config.seed, slot, request.draw)
        return clusters.members(draw_share(len(clusters), request.look, request.shares, 0, 1, *key))

    def due(state: RunState, step: int, row: int) -> bool:
        if tick_due(state, step, row, control, terms, max_consecutive=trainer.max_consecutive):
            return True
        return control.every == 0 and plan.epoch_ends(step - 1, step)

    def judge(state: RunState, sums: Mapping[str, float], since: int) -> RunState:
        return judge_tick(state, sums, terms, governor, chance=chance, since=since) if governor.enabled else state

    return Recipe(
        grown=grown,
        terms=terms,
        seed=config.seed,
        budget=parts.task.budget,
        rules=Rules(
            adamw=optim.kind is OptimizerKind.ADAMW,
            momentum=optim.momentum,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            seed_weight_decay=optim.seed_weight_decay,
            clip_norm=optim.clip_norm,
            seed_lr_scale=optim.seed_lr_scale,
            seed_warmup_steps=optim.seed_warmup_steps,
            vanishing_rms=optim.vanishing_rms,
            exploding_rms=optim.exploding_rms,
            health_every=optim.health_every,
        ),
        language=bundle.task is Task.LANGUAGE,
        train=bundle.train,
        validation=bundle.validation,
        probe=bundle.probe,
        batch=trainer.batch,
        eval_batch=trainer.eval_batch,
        stage_ticks=control.stage_ticks,
        max_consecutive=trainer.max_consecutive,
        indices=plan.indices,
        epoch=lambda step: plan.locate(step)[0] + 1,
        host_lr=lambda step: optim.lr * lr_shape(optim, step, terms.total_steps),
        due=due,
        validates=lambda tick, step: step >= terms.total_steps or tick % control.validate_every == 0,
        look=look,
        births=RunBirths(config, grown, terms, len(bundle.probe), dtype_of(trainer.precision)),
        propose=proposed,
        agree=lambda values: layout.decode(layout.encode(values, 0)),
        judge=judge,
    )


def _check(config: EsperConfig, bundle: Bundle) -> None:
    trainer, optim = config.trainer, config.optim
    in_the_way = {
        "trainer.precision": trainer.precision in HALF,
        "trainer.accumulate": trainer.accumulate > 1,
        "trainer.max_tokens": trainer.max_tokens is not None,
        "trainer.compile": trainer.compile,
        "trainer.recompute": trainer.recompute,
        "trainer.channels_last": trainer.channels_last,
        "trainer.patience": trainer.patience is not None,
        "trainer.limit": trainer.limit is not None,
        "task.kind": config.task.kind != "data",
        "optim.schedule": optim.schedule is Schedule.PLATEAU,
        "optim.clip_norms": bool(optim.clip_norms),
        "trainer.ema": trainer.ema is not None,
        "optim.fused": bool(optim.fused),
        "slots.incubation": config.slots.incubation is Incubation.STE,
        "slots.channels": bool(config.slots.channels),
        "gates.baseline": config.gates.baseline is not Baseline.STANDING,
        "control.attribute_every": config.control.attribute_every > 0,
        "library.enabled": config.library.enabled,
        "data.augment": bundle.augment is not Augment.NONE,
    }
    wrong = [name for name, present in in_the_way.items() if present]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: hosts that are stepped together do without; leave it at its default")
