"""The environment of a growth policy: N hosts in training as one Gymnasium `VectorEnv`.

    an episode     one trial: a task drawn at random, a host's first weights, its training until the FLOPs are spent
    a step         one control tick of all hosts: at most one command each
    observation    arrays of `esper.tamiyo.policy.arrays`, masks among them, padded to the same size in all hosts
    action         an option per head of `esper.tamiyo.policy.options`; heads that do not matter are not read
    reward         `esper.simic.env.reward`; every part of it is in the infos

Where a trial ends, the next one begins within the step (``SAME_STEP``): the old one's last observation and infos are
``infos["final_obs"]`` and ``infos["final_info"]``. A spent budget *terminates* an episode, and so does a host that
comes apart; what ends it from outside *truncates* it.

Tasks and trials' seeds are drawn from a stream that belongs to the environment alone, which `reset` seeds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from esper.leyline.commands import Command
from esper.leyline.errors import EsperError
from esper.leyline.observation import Observation
from esper.leyline.plain import from_plain, to_plain
from esper.leyline.protocols import Ending, Trials
from esper.simic.env.episode import Episode, why_illegal_choice
from esper.simic.env.reward import Payment, Reward, RewardConfig
from esper.simic.env.tasks import GrowthTask
from esper.simic.env.twins import Twins
from esper.tamiyo.policy.arrays import array_shapes, arrays_of, stack
from esper.tamiyo.policy.features import LAYOUT, Layout
from esper.tamiyo.policy.masks import Arrays
from esper.tamiyo.policy.options import OPTIONS, Options, to_commands

OVER = (Ending.SPENT, Ending.DIVERGED)
ALL_TWINS = 4  # for each environment: if there are no more in all, they are trained at once, many at a time
PARTS = ("loss", "size", "births", "prunes", "apart")  # of a reward


class GrowthVectorEnv(VectorEnv):
    """See above; `esper.run.trials.environment` puts one together.

    Args:
        trials: the hosts, N of them.
        tasks: from which episodes are drawn, each as likely as the others.
        twins: curves without growth.
        seeds: trials' seeds are 0 to this; few, since each task and seed has a twin to train.
        first_seed: added to them: policies are judged on other seeds than they learn from.
        slots: most slots of a host; observations are padded to it.
        entries: most blueprints of a slot's catalogue, likewise.
        config: what growth is paid for.
        layout: features.
        options: what the heads choose from.
        most_ticks: steps after which an episode is cut off; None never does.

    Fields:
        choices: what the heads choose from.
    """

    def __init__(
        self,
        trials: Trials[GrowthTask],
        tasks: Sequence[GrowthTask],
        twins: Twins,
        *,
        seeds: int,
        slots: int,
        entries: int,
        first_seed: int = 0,
        config: RewardConfig | None = None,
        layout: Layout = LAYOUT,
        options: Options = OPTIONS,
        most_ticks: int | None = None,
    ) -> None:
        if not tasks or seeds < 1 or not 0 <= first_seed <= 2**31 - seeds:
            raise EsperError(f"{len(tasks)} tasks, {seeds} seeds from {first_seed}: one of each is needed, below 2^31")
        self.num_envs = len(trials)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": []}
        self.trials, self.tasks, self.twins = trials, tuple(tasks), twins
        self._seeds, self._first_seed, self._most_ticks = seeds, first_seed, most_ticks
        self._config, self._layout, self.choices = config or RewardConfig(), layout, options
        self._room = {"slots": slots, "entries": entries}
        shapes = array_shapes(slots, entries, layout=layout, options=options)
        self.single_observation_space = spaces.Dict({name: _space(*shape) for name, shape in shapes.items()})
        counts = {
            "op": len(options.ops),
            "slot": slots,
            "blueprint": entries,
            "operator": len(options.operators),
            "tempo": len(options.tempos),
            "target": len(options.targets),
            "speed": len(options.speeds),
            "curve": len(options.curves),
        }
        self.single_action_space = spaces.Dict({head: spaces.Discrete(count) for head, count in counts.items()})
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._draws = [np.random.default_rng(env) for env in range(self.num_envs)]
        self._episodes: list[Episode] = []
        self._rows: list[Arrays] = []  # the present observation of each

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Arrays, dict[str, Any]]:
        """Begins an episode in every environment.

        Args:
            seed: of the streams that tasks and seeds are drawn from: one for each environment, or the first of N in a
                row; None lets the streams go on.
            options: none are known.

        Raises:
            EsperError: an option, or another number of seeds than environments.
        """
        if options:
            raise EsperError(f"reset options {', '.join(map(str, options))}: this environment has none")
        if seed is None:
            seed = [None] * self.num_envs
        given = [seed + env for env in range(self.num_envs)] if isinstance(seed, int) else seed
        if len(given) != self.num_envs:
            raise EsperError(f"{len(given)} seeds for {self.num_envs} environments; give one for each")
        for env, one in enumerate(given):
            if one is not None:
                self._draws[env] = np.random.default_rng(np.random.SeedSequence(one))
        pairs = [self._draw(env) for env in range(self.num_envs)]
        every = [(task, self._first_seed + seed) for task in self.tasks for seed in range(self._seeds)]
        self.twins.prepare(every if len(every) <= ALL_TWINS * self.num_envs else pairs)
        self._episodes = self._begin([(env, *pair) for env, pair in enumerate(pairs)])
        infos: dict[str, Any] = {}
        self._rows = [self._look(env) for env in range(self.num_envs)]
        for env, row in enumerate(self._rows):
            infos = self._add_info(infos, self._info(env, row), env)
        return stack(self._rows), infos

    def step(
        self, actions: Mapping[str, np.ndarray]
    ) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Takes every host to its next tick.

        Args:
            actions: option per head, int [N].

        Returns:
            observations, rewards float64 [N], terminated bool [N], truncated bool [N], infos.

        Raises:
            EsperError: `reset` has not been called, or an option is not legal where it matters.
        """
        if not self._episodes:
            raise EsperError("step before reset")
        said = []
        for env, episode in enumerate(self._episodes):
            choice = {head: int(option[env]) for head, option in actions.items()}
            why = why_illegal_choice(self._rows[env], choice, self.choices)
            if why is not None:
                raise EsperError(f"environment {env}: {why}; choose by the masks of the observation")
            said.append(to_commands(episode.report.observation, choice, self.choices))
        return self.obey(said)

    def obey(self, said: Sequence[list[Command]]) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """As `step`, with the commands of any controllers, as many for each host as they like.

        Args:
            said: commands for each host; those that are not legal are refused by its run, as in a main job.
        """
        reports = self.trials.advance(said)
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        paid: list[Payment] = []
        finals: dict[int, dict[str, Any]] = {}
        for env, (episode, report) in enumerate(zip(self._episodes, reports, strict=True)):
            terms = episode.take(report, said[env])
            paid.append(terms)
            rewards[env] = terms.reward
            terminated[env] = report.ending in OVER
            late = self._most_ticks is not None and episode.ticks >= self._most_ticks
            truncated[env] = not terminated[env] and (late or report.ending is Ending.CUT)
            if terminated[env] or truncated[env]:
                row = self._look(env)
                final = self._info(env, row, terms) | {"total": episode.total, "ticks": episode.ticks}
                finals[env] = {"final_obs": row, "final_info": final}
        drawn = [(env, *self._draw(env)) for env in finals]
        for (env, _, _), episode in zip(drawn, self._begin(drawn), strict=True):
            self._episodes[env] = episode
        self._rows = [self._look(env) for env in range(self.num_envs)]
        infos: dict[str, Any] = {}
        for env, (row, terms) in enumerate(zip(self._rows, paid, strict=True)):
            infos = self._add_info(infos, self._info(env, row, terms) | finals.get(env, {}), env)
        return stack(self._rows), rewards, terminated, truncated, infos

    def playing(self) -> list[GrowthTask]:
        """The task of each host."""
        return [episode.task for episode in self._episodes]

    def observations(self) -> list[Observation]:
        """What a controller of each host would see now."""
        return [episode.report.observation for episode in self._episodes]

    def state_dict(self) -> dict[str, Any]:
        """Where every environment is, as plain data: its stream, and the trial so far as what was said in it."""
        return {
            "draws": [draws.bit_generator.state for draws in self._draws],
            "episodes": [
                {
                    "task": episode.task.name,
                    "seed": episode.seed,
                    "said": [[to_plain(command) for command in commands] for commands in episode.said],
                }
                for episode in self._episodes
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lives the episodes of `state_dict` again, from their beginnings to where they were.

        Raises:
            EsperError: there are more or fewer environments than there were, or a task is not among those given.
        """
        known = {task.name: task for task in self.tasks}
        saved = state["episodes"]
        if len(saved) != self.num_envs or any(entry["task"] not in known for entry in saved):
            names = ", ".join(sorted({entry["task"] for entry in saved}))
            raise EsperError(
                f"a saved environment of {len(saved)} hosts with tasks {names}: this one has {self.num_envs} hosts and "
                f"tasks {', '.join(known)}"
            )
        for draws, saved_draws in zip(self._draws, state["draws"], strict=True):
            draws.bit_generator.state = saved_draws
        pairs = [(known[entry["task"]], int(entry["seed"])) for entry in saved]
        self.twins.prepare(pairs)
        scripts = [[[from_plain(Command, c) for c in commands] for commands in entry["said"]] for entry in saved]
        self._episodes = self._begin([(env, *pair) for env, pair in enumerate(pairs)])
        longest = max(map(len, scripts))
        waits = [longest - len(script) for script in scripts]  # hosts go on together, so the short ones begin later
        for tick in range(longest + 1):
            due = [env for env, wait in enumerate(waits) if tick == wait > 0]
            for env, episode in zip(due, self._begin([(env, *pairs[env]) for env in due]), strict=True):
                self._episodes[env] = episode
            if tick < longest:
                pairs_ = zip(scripts, waits, strict=True)
                said = [script[tick - wait] if tick >= wait else [] for script, wait in pairs_]
                for env, report in enumerate(self.trials.advance(said)):
                    if tick >= waits[env]:
                        self._episodes[env].take(report, said[env])
        self._rows = [self._look(env) for env in range(self.num_envs)]

    def _draw(self, env: int) -> tuple[GrowthTask, int]:
        draws = self._draws[env]
        return self.tasks[int(draws.integers(len(self.tasks)))], self._first_seed + int(draws.integers(self._seeds))

    def _begin(self, drawn: Sequence[tuple[int, GrowthTask, int]]) -> list[Episode]:
        """Begins episodes, each of an environment, a task and a seed; their hosts train their first tick together."""
        if not drawn:
            return []
        self.twins.prepare((task, seed) for _, task, seed in drawn)
        episodes = []
        for (_, task, seed), report in zip(drawn, self.trials.begin_many(drawn), strict=True):
            if report.ending is not Ending.RUNNING:
                raise EsperError(
                    f"task {task.name}, seed {seed}: {report.ending.value} at its first tick, before any decision; "
                    "choose another task, a larger budget, or a lower learning rate"
                )
            curve = self.twins.curve(task, seed)
            unit = curve.noise if self._config.in_noise else 1.0
            episodes.append(Episode(task, seed, report, Reward(self._config, curve, report, unit=unit)))
        return episodes

    def _look(self, env: int) -> Arrays:
        episode = self._episodes[env]
        return arrays_of(
            episode.report.observation, episode.memory, layout=self._layout, options=self.choices, **self._room
        )

    def _info(self, env: int, row: Arrays, terms: Payment | None = None) -> dict[str, Any]:
        episode = self._episodes[env]
        report = episode.report
        loss = report.validation_loss.value
        info: dict[str, Any] = {
            "action_mask": row["mask_op"],
            "task": episode.task.name,
            "seed": episode.seed,
            "flops": report.flops,
            "parameters": report.parameters,
            "validation_loss": float("nan") if loss is None else loss,
            "ending": report.ending.value,
        }
        if terms is not None:
            info["reward_terms"] = {name: getattr(terms, name) for name in PARTS}
            info["potential"] = terms.potential
        return info


def _space(shape: tuple[int, ...], dtype: np.dtype) -> gym.Space[Any]:
    if dtype == np.bool_:
        return spaces.Box(0, 1, shape, dtype=np.bool_)
    return spaces.Box(-np.inf, np.inf, shape, dtype=np.float32)
