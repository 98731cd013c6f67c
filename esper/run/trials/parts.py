"""The parts of a trial from its task and seed, for the plain path and for hosts that are stepped together.

Data, terms and costs depend on the task alone; they are made once and shared by all its trials. What a seed decides
(first weights, order of the data) is made anew.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from esper.accord.account import step_flops
from esper.accord.lifecycle import SlotState
from esper.accord.state import Terms
from esper.config.tree import EsperConfig
from esper.kasmina.blueprints import registry
from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import undisturbed
from esper.run.assembly import build_grown, chance_of, make_terms
from esper.run.trials.config import trial_config
from esper.tolaria.data import BatchPlan, Bundle, load_data
from esper.tolaria.tasks.bind import bind
from esper.tolaria.training.length import plan_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskParts:
    """What all trials of a task share.

    Fields:
        bundle: the data.
        terms: of the run; its ``total_steps`` are the most that the budget can buy.
        budget: FLOPs, by the account of `esper.accord.account`.
        parameters: of the bare host.
        chance: loss of guessing by the training part's frequencies, nats per sample.
    """

    bundle: Bundle
    terms: Terms
    budget: int
    parameters: int
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialParts:
    """One trial before its first step.

    Fields:
        task: what it shares with the other trials of its task.
        config: its settings (optimizer, trainer, control, gates); ``config.seed`` is the trial's.
        grown: the host with empty slots and first weights.
        plan: its batches.
    """

    task: TaskParts
    config: EsperConfig
    grown: Grown
    plan: BatchPlan


def most_steps(budget: int, flops: int, plan: BatchPlan) -> int:
    """Optimizer steps after which a network that costs ``flops`` per sample has spent the budget."""
    epochs, left = divmod(-(-budget // flops), plan.samples_per_epoch)
    return epochs * plan.steps_per_epoch + -(-left // plan.batch)


class TrialMaker:
    """Makes the parts of trials.

    Args:
        configure: from a task and a seed to a config whose ``trainer.steps`` is the budget in steps of the bare host.
        device: of the hosts.
        world_size: ranks that train a host together.
    """

    def __init__(
        self,
        configure: Callable[[Any, int], EsperConfig] = trial_config,
        *,
        device: torch.device | None = None,
        world_size: int = 1,
    ) -> None:
        registry.load_plugins()
        self.configure, self.device, self.world_size = configure, device or torch.device("cpu"), world_size
        self._data: dict[str, Bundle] = {}
        self._tasks: dict[str, TaskParts] = {}

    def shared(self, task: Any, seed: int) -> tuple[TaskParts, EsperConfig]:
        """What the task's trials share, and the config of one, with the most steps that the budget can buy.

        Raises:
            ConfigError: settings of the task are wrong.
            DataError: its data cannot be made.
        """
        config = self.configure(task, seed)
        key = repr(replace(config, seed=0))
        if key not in self._tasks:
            self._tasks[key] = self._make(config)
        parts = self._tasks[key]
        return parts, replace(config, trainer=replace(config.trainer, steps=parts.terms.total_steps))

    def trial(self, task: Any, seed: int) -> TrialParts:
        """The parts of a trial; see `shared` for errors. Random streams are as before."""
        parts, config = self.shared(task, seed)
        with undisturbed(self.device):
            grown = build_grown(config, parts.bundle, self.device)
        plan = plan_batches(config.trainer, parts.bundle, seed)
        return TrialParts(task=parts, config=config, grown=grown, plan=plan)

    def _make(self, config: EsperConfig) -> TaskParts:
        data = repr(config.data)
        if data not in self._data:
            self._data[data] = bind(load_data(config.data), config.task)
        bundle = self._data[data]
        with undisturbed(self.device):
            grown = build_grown(config, bundle, self.device)
            terms = make_terms(config, grown, bundle, self.world_size)
        assert terms.costs is not None
        empty = tuple(SlotState(slot=slot) for slot in terms.places)
        bare = step_flops(empty, terms.costs, config.slots)
        budget = terms.total_steps * config.trainer.batch * bare
        plan = plan_batches(config.trainer, bundle, config.seed)
        steps = most_steps(budget, step_flops(terms.first_slots(), terms.costs, config.slots), plan)
        return TaskParts(
            bundle=bundle,
            terms=replace(terms, total_steps=steps),
            budget=budget,
            parameters=sum(parameter.numel() for parameter in grown.model.parameters()),
            chance=chance_of(bundle),
        )
