"""Trains a policy: rollout, update, numbers, alarms, checkpoint; again and again, on every rank alike.

    begin or resume -> [ collect -> update -> tell -> save? -> stop? ] * updates

A run that was stopped and resumed has the same bits as one that was not, on a CPU, if its environment can save itself
(``state_dict`` and ``load_state_dict``). If it cannot, **episodes restart**: resuming begins a new episode everywhere,
with seeds that the number of updates decides; weights, optimizer, scale and random streams go on.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gymnasium.vector import VectorEnv

from esper.leyline.errors import CheckpointError, LockstepError
from esper.leyline.events import PolicyAlarm, PolicySaved, PolicyUpdated
from esper.leyline.protocols import EventSink, NullSink
from esper.simic.ppo import saves
from esper.simic.ppo.alarms import Alarm, Alarms
from esper.simic.ppo.config import PPOConfig
from esper.simic.ppo.measures import Update
from esper.simic.ppo.ppo import PPO
from esper.simic.ppo.ranks import MAX, Alone, Ranks
from esper.simic.ppo.rollout import Collector
from esper.simic.ppo.seeds import Purpose, make_generator, make_seed
from esper.tamiyo.policy.agent import Agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to train, and what to keep.

    Fields:
        updates: number of rollouts to learn from, all in all.
        seed: of everything random.
        folder: of the checkpoints, shared by all ranks; None: none are written.
        save_every: updates between checkpoints; there is one at the end, and one when asked to stop, in any case.
        keep: newest checkpoints that are kept.
    """

    updates: int
    seed: int
    folder: Path | None = None
    save_every: int = 50
    keep: int = 2


class Training:
    """The training of a policy on one rank.

    Args:
        agent: learns; every rank builds it alike, see `Purpose.WEIGHTS`.
        env: this rank's environments, as many as every other rank has.
        config: how it learns.
        plan: for how long.
        ranks: that train together.
        sink: takes the events; rank 0's tells.
        make_ppo: builds the learner.
    """

    def __init__(
        self,
        agent: Agent,
        env: VectorEnv,
        config: PPOConfig,
        plan: Plan,
        *,
        ranks: Ranks | None = None,
        sink: EventSink | None = None,
        make_ppo: type[PPO] = PPO,
    ) -> None:
        self.ranks: Ranks = ranks or Alone()
        self.agent, self.env, self.config, self.plan = agent, env, config, plan
        self._sink: EventSink = sink or NullSink()
        first = env.num_envs * self.ranks.rank
        self.numbers = range(first, first + env.num_envs)  # of this rank's environments among those of all ranks
        generators = [make_generator(plan.seed, Purpose.ACTIONS, number) for number in self.numbers]
        self.collector = Collector(env, agent, generators)
        self.ppo = make_ppo(agent, config, self.ranks, envs=env.num_envs, seed=plan.seed)
        self.alarms = Alarms(config.alarms)
        self.done = 0  # updates
        self._begun = False

    def run(
        self,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        after_update: Callable[[Update], None] = lambda update: None,
    ) -> bool:
        """Trains to the end; returns false if it was asked to stop before, with a checkpoint written.

        Args:
            should_stop: asked after every update; one rank that says so stops all.
            after_update: gets what each update did.
        """
        self.begin()
        stop = self._any_stops(should_stop())
        while self.done < self.plan.updates and not stop:
            update = self._advance()
            after_update(update)
            stop = self._any_stops(should_stop())
            if stop or self.done == self.plan.updates or self.done % self.plan.save_every == 0:
                self.save()
        return self.done >= self.plan.updates

    def begin(self) -> None:
        """Begins an episode in every environment, unless they have begun or been resumed."""
        if not self._begun:
            self._begin()

    def _begin(self) -> None:
        self.collector.start([make_seed(self.plan.seed, Purpose.ENVIRONMENT, n, self.done) for n in self.numbers])
        self._begun = True

    def _advance(self) -> Update:
        """One rollout and what is learned from it."""
        begun = time.perf_counter()
        rollout = self.collector.collect(self.config.ticks)
        between = time.perf_counter()
        update = self.ppo.update(rollout, self.done, self.done / self.plan.updates)
        ended = time.perf_counter()
        self.done += 1
        update.numbers["charts/SPS"] = (
            self.config.ticks * self.env.num_envs * self.ranks.size / max(ended - begun, 1e-9)
        )
        alarms = self.alarms.judge(update.numbers)
        if self.ranks.rank == 0:
            self._tell(update, alarms, collect_s=between - begun, update_s=ended - between)
        return update

    def _tell(self, update: Update, alarms: list[Alarm], *, collect_s: float, update_s: float) -> None:
        numbers, axes = dict(update.numbers), self._axes()
        self._sink.emit(PolicyUpdated(numbers=numbers, collect_ms=1e3 * collect_s, update_ms=1e3 * update_s, **axes))
        for alarm in alarms:
            self._sink.emit(
                PolicyAlarm(
                    symptom=alarm.symptom,
                    head=alarm.head,
                    value=alarm.value,
                    limit=alarm.limit,
                    updates=alarm.updates,
                    **axes,
                )
            )

    def _axes(self) -> dict[str, int]:
        return {"step": self.ppo.steps, "tick": self.done * self.config.ticks, "epoch": self.done}

    def _any_stops(self, stop: bool) -> bool:
        """Whether any rank stops; and all ranks must hold the same weights, by a checksum of their bits."""
        bits = torch.cat(
            [parameter.detach().flatten().cpu().view(torch.int32) for parameter in self.agent.parameters()]
        )
        places = torch.arange(1, len(bits) + 1)
        check = float(((bits.to(torch.int64) * places).sum() % (2**31 - 1)).item())
        sums = torch.tensor([float(stop), check, -check], dtype=torch.float64)
        stop_any, most, least = self.ranks.all_reduce(sums, MAX, what="agreement").tolist()
        if most != -least:
            raise LockstepError(
                f"ranks hold different policies after update {self.done}; resume from the last checkpoint"
            )
        return stop_any > 0

    def save(self) -> Path | None:
        """Writes a checkpoint; called on every rank. Returns its folder, or None if none are written."""
        if self.plan.folder is None:
            return None
        path = saves.save(self.plan.folder, self.done, self._shared(), self._own(), self.ranks, keep=self.plan.keep)
        if self.ranks.rank == 0:
            self._sink.emit(PolicySaved(**self._axes(), path=path.name))
        return path

    def _shared(self) -> dict[str, Any]:
        return {
            "agent": self.agent.state_dict(),
            "optimizer": self.ppo.optimizer.state_dict(),
            "sigma": self.ppo.scale.sigma,
            "alarms": self.alarms.state_dict(),
            "done": self.done,
            "steps": self.ppo.steps,
            "seed": self.plan.seed,
        }

    def _own(self) -> dict[str, Any]:
        save_env = getattr(self.env, "state_dict", None)
        return {
            "env": save_env() if callable(save_env) else None,
            "collector": self.collector.state_dict(),
            "scale": self.ppo.scale.state_dict(),
            "actions": [generator.get_state() for generator in self.collector.generators],
            "torch": torch.get_rng_state(),
        }

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint; called on every rank.

        Raises:
            CheckpointError: it is damaged, or is one of other ranks, environments, agents or another seed.
        """
        shared, own = saves.load(path, self.ranks)
        if shared["seed"] != self.plan.seed:
            raise CheckpointError(f"{path}: of seed {shared['seed']}, this training has {self.plan.seed}; give it that")
        if len(own["actions"]) != self.env.num_envs:
            raise CheckpointError(
                f"{path}: of {len(own['actions'])} environments a rank, this has {self.env.num_envs}; start as many"
            )
        try:
            self.agent.load_state_dict(shared["agent"])
        except RuntimeError as error:
            raise CheckpointError(f"{path}: of another agent ({' '.join(str(error).split())[:200]})") from None
        self.ppo.optimizer.load_state_dict(shared["optimizer"])
        self.ppo.steps, self.done = shared["steps"], shared["done"]
        self.ppo.scale.load_state_dict(own["scale"])
        self.alarms.load_state_dict(shared["alarms"])
        for generator, state in zip(self.collector.generators, own["actions"]):
            generator.set_state(state)
        torch.set_rng_state(own["torch"])
        load_env = getattr(self.env, "load_state_dict", None)
        if own["env"] is not None and callable(load_env):
            load_env(own["env"])
            self.collector.load_state_dict(own["collector"])
            self._begun = True
        else:
            self._begin()
