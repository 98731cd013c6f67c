"""The growth environment over real hosts: Gymnasium's rules, the same hosts as a main job, and an honest reward."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from esper.leyline.commands import Command
from esper.leyline.errors import EsperError
from esper.leyline.observation import Observation
from esper.leyline.protocols import Ending
from esper.leyline.stages import Op
from esper.run.trials.config import trial_config
from esper.run.trials.environment import make_environment, plain_trials
from esper.run.trials.parts import TrialMaker
from esper.run.trials.plain import PlainTrials
from esper.simic.env.reward import RewardConfig
from esper.simic.env.tasks import Family, GrowthTask
from esper.simic.env.twins import Curve, Twins
from esper.simic.env.vector import PARTS, GrowthVectorEnv
from esper.tamiyo.heuristic import HeuristicConfig
from esper.tamiyo.policy.options import OPTIONS
from esper.tamiyo.registry import build_controller
from tests.support.tiny import bits, make_engine

DIGITS = GrowthTask(name="digits", family=Family.DIGITS, width=4, depth=2, samples=200, noise=0.0, steps=40, every=5)
RECALL = GrowthTask(name="recall", family=Family.RECALL, width=8, depth=1, samples=200, noise=0.0, steps=30, every=5)
QUICK = {"gates.evidence": "observe", "slots.embargo_ticks": 1}
MAKER = TrialMaker(lambda task, seed: trial_config(task, seed, QUICK))
OP = {op: OPTIONS.ops.index(op) for op in Op}
Actions = dict[str, np.ndarray]


class Curves:
    """Where the twins of these tests are kept, so that each is trained once."""

    folder: Path | None = None


@pytest.fixture(scope="module", autouse=True)
def _curves(tmp_path_factory: pytest.TempPathFactory) -> None:
    Curves.folder = tmp_path_factory.mktemp("curves")


def environment(envs: int = 2, tasks: tuple[GrowthTask, ...] = (DIGITS, RECALL), **more: Any) -> GrowthVectorEnv:
    return make_environment(tasks, envs, seeds=2, maker=MAKER, folder=Curves.folder, **more)


def waiting(env: GrowthVectorEnv) -> Actions:
    return {head: np.zeros(env.num_envs, np.int64) for head in env.single_action_space.spaces}


def legal(env: GrowthVectorEnv, seen: dict[str, np.ndarray], draws: np.random.Generator) -> Actions:
    """Random options that the masks allow."""

    def pick(mask: np.ndarray) -> int:
        return int(draws.choice(np.flatnonzero(mask)))

    actions = waiting(env)
    for i in range(env.num_envs):
        op = actions["op"][i] = pick(seen["mask_op"][i])
        if OPTIONS.ops[op] is Op.WAIT:
            continue
        slot = actions["slot"][i] = pick(seen["mask_slot"][i, op])
        for head in ("tempo", "target", "curve"):
            actions[head][i] = draws.integers(env.single_action_space[head].n)
        if OPTIONS.ops[op] is Op.GERMINATE:
            actions["blueprint"][i] = pick(seen["mask_blueprint"][i, slot])
        if OPTIONS.ops[op] in (Op.GERMINATE, Op.SET_ALPHA_TARGET):
            which = int(OPTIONS.ops[op] is Op.SET_ALPHA_TARGET)
            actions["operator"][i] = pick(seen["mask_operator"][i, which, slot])
        if OPTIONS.ops[op] in (Op.SET_ALPHA_TARGET, Op.PRUNE):
            line = 1 + actions["operator"][i] if OPTIONS.ops[op] is Op.SET_ALPHA_TARGET else 0
            actions["speed"][i] = pick(seen["mask_speed"][i, slot, line])
    return actions


def walk(env: GrowthVectorEnv, seed: int, steps: int) -> Iterator[tuple[Actions, Any]]:
    """Steps with random legal actions."""
    draws = np.random.default_rng(seed)
    seen, _ = env.reset(seed=seed)
    for _ in range(steps):
        actions = legal(env, seen, draws)
        after = env.step(actions)
        yield actions, after
        seen = after[0]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) and one.dtype == object:
        return all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(np.array_equal(one, other, equal_nan=not isinstance(one, str) and np.asarray(one).dtype.kind == "f"))


def test_the_rules_of_gymnasium() -> None:
    env = environment()
    assert env.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    first, infos = env.reset(seed=3)
    assert first in env.observation_space
    assert {name: array.dtype for name, array in first.items()} == {
        name: space.dtype for name, space in env.observation_space.spaces.items()
    }
    assert np.array_equal(infos["action_mask"], first["mask_op"])
    again, _ = env.reset(seed=3)
    assert same(first, again)
    assert not same(first, env.reset(seed=4)[0])
    runs = [list(walk(env, 5, 12)) for _ in range(2)]
    assert all(same(a, b) for (_, one), (_, other) in zip(*runs, strict=True) for a, b in zip(one, other, strict=True))
    kept = {name: array.copy() for name, array in runs[0][0][1][0].items()}
    env.step(waiting(env))
    assert same(kept, runs[0][0][1][0])  # arrays that were returned are not used again
    ends = 0
    for actions, (seen, rewards, terminated, truncated, told) in runs[0]:
        assert actions["op"].shape == (2,)
        assert seen in env.observation_space
        assert rewards.shape == (2,)
        assert np.isfinite(rewards).all()
        assert not (terminated & truncated).any()
        parts = np.stack([told["reward_terms"][name] for name in PARTS]).sum(0)
        assert rewards == pytest.approx(parts, abs=1e-12)
        over = terminated | truncated
        ends += int(over.sum())
        assert np.array_equal(told.get("_final_obs", np.zeros(2, bool)), over)
        for i in np.flatnonzero(over):
            assert told["final_obs"][i] in env.single_observation_space
            assert told["final_info"]["ending"][i] == Ending.SPENT
            assert told["final_info"]["flops"][i] >= told["flops"][i]  # the next one has just begun
            assert not same(told["final_obs"][i], {name: array[i] for name, array in seen.items()})
    assert ends >= 2


class Repeats:
    """Says in a main job what was said in an episode."""

    name = "repeats"

    def __init__(self, said: list[list[Command]]) -> None:
        self.said, self.seen = said, list[Observation]()

    def decide(self, observation: Observation) -> list[Command]:
        self.seen.append(replace(observation, remaining=0.0))
        return self.said[len(self.seen) - 1]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


@pytest.mark.parametrize("who", ["random", "heuristic"])
def test_an_episode_is_a_main_job_with_that_controller_bit_for_bit(who: str, tmp_path: Path) -> None:
    """What was said through the environment, said in a main job, gives the same course and the same net."""
    env = environment(1, (DIGITS,))
    draws = np.random.default_rng(8)
    rules = HeuristicConfig(eager=True, warmup_ticks=1, life_ticks=1, blueprints=["norm", "bottleneck"], tempo_ticks=1)
    heuristic = build_controller(rules, slots=("r0c0", "r0c1", "r1c0"), seed=0)
    seen, _ = env.reset(seed=11)
    episode, over, observed, total = env._episodes[0], False, [], 0.0
    while not over:
        trial = env.trials.trials[0]  # type: ignore[attr-defined]
        (observation,) = env.observations()
        observed.append(replace(observation, remaining=0.0))
        if who == "random":
            seen, rewards, ended, _, infos = env.step(legal(env, seen, draws))
        else:
            seen, rewards, ended, _, infos = env.obey([heuristic.decide(observation)])
        over, total = bool(ended[0]), total + float(rewards[0])
    assert len([commands for commands in episode.said if commands]) >= 3
    assert infos["final_info"]["total"][0] == pytest.approx(total)

    _, config = MAKER.shared(DIGITS, episode.seed)
    repeats = Repeats(episode.said)
    job = make_engine(config, tmp_path, controller=repeats)
    job.begin(None)
    while job.step < trial.engine.step:
        job.train_step()
        if job.tick_due() and len(repeats.seen) < len(episode.said):
            job.tick()
    turn = job.open_tick()
    assert repeats.seen == observed
    assert (turn.state.flops, turn.state.validation_loss) == (episode.report.flops, episode.report.validation_loss)
    assert bits(job.grown.model.named_parameters()) == bits(trial.engine.grown.model.named_parameters())


def test_without_growth_every_reward_is_zero_and_each_part_has_its_sign() -> None:
    env = environment(2, (DIGITS,), config=RewardConfig(size_price=0.5, birth_price=0.1, prune_price=0.2))
    env.reset(seed=1)
    for _ in range(20):
        assert env.step(waiting(env))[1].tolist() == [0.0, 0.0]  # the host is its twin, bit for bit
    env.reset(seed=1)
    parts: dict[str, list[float]] = {name: [] for name in PARTS}
    script = {0: Op.GERMINATE, 1: Op.WAIT, 2: Op.ADVANCE, 4: Op.PRUNE}
    for tick in range(6):
        actions = waiting(env)
        actions["op"][0] = OP[script.get(tick, Op.WAIT)]
        actions["tempo"][0] = actions["target"][0] = 0 if script.get(tick) is Op.PRUNE else 3
        actions["target"][0] = OPTIONS.targets.index(1.0)
        _, rewards, _, _, infos = env.step(actions)
        assert rewards[1] == 0.0
        for name in PARTS:
            parts[name].append(float(infos["reward_terms"][name][0]))
    births, prunes, sizes = (np.array(parts[name]) for name in ("births", "prunes", "size"))
    assert sorted(births.tolist()) == [-0.1, 0, 0, 0, 0, 0]
    assert sorted(prunes.tolist()) == [-0.2, 0, 0, 0, 0, 0]
    assert sizes[births < 0] < 0
    assert sizes.sum() == pytest.approx(0.0, abs=1e-12)  # what was born is gone
    assert parts["apart"] == [0.0] * 6
    assert np.abs(parts["loss"]).max() > 0


def test_a_host_that_comes_apart_terminates_below_every_finish() -> None:
    touchy = {"min_history": 3, "history": 3, "patience": 1, "blowup": 1.01, "deviations": 0.01, "rise": 1e-3}
    settings = {"optim.lr": 3.0, **{f"governor.{name}": value for name, value in touchy.items()}}
    sick = TrialMaker(lambda task, seed: trial_config(task, seed, settings))
    twins = Twins(lambda size: plain_trials(size, MAKER))
    env = GrowthVectorEnv(plain_trials(1, sick), (DIGITS,), twins, seeds=1, slots=3, entries=8)
    env.reset(seed=0)
    for _ in range(8):
        _, _, terminated, _, infos = env.step(waiting(env))
        if terminated[0]:
            break
    assert infos["final_info"]["ending"][0] == Ending.DIVERGED
    assert infos["reward_terms"]["apart"][0] < 0
    assert infos["final_info"]["total"][0] < -RewardConfig().most_loss
    assert infos["potential"][0] == -RewardConfig().most_loss
    dead = TrialMaker(lambda task, seed: trial_config(task, seed, {"optim.lr": 1e30}))
    with pytest.raises(EsperError, match="diverged at its first tick, before any decision"):
        GrowthVectorEnv(plain_trials(1, dead), (DIGITS,), twins, seeds=1, slots=3, entries=8).reset(seed=0)
    with pytest.raises(EsperError, match="comes apart without any growth"):
        Twins(lambda size: plain_trials(size, dead)).curve(DIGITS, 0)


def test_a_cut_truncates_and_shows_what_was_cut() -> None:
    env = environment(1, (DIGITS,), most_ticks=3)
    env.reset(seed=2)
    ends = [env.step(waiting(env)) for _ in range(6)]
    assert [bool(truncated[0]) for _, _, _, truncated, _ in ends] == [False, False, True] * 2
    assert not any(terminated[0] for _, _, terminated, _, _ in ends)
    assert ends[2][4]["final_info"]["ending"][0] == Ending.RUNNING


def test_each_environment_has_a_stream_of_its_own() -> None:
    env = environment(2, most_ticks=2)
    env.reset(seed=[7, 8])
    drawn = [[(e.task.name, e.seed) for e in env._episodes]]
    for _ in range(8):
        _, _, _, truncated, _ = env.step(waiting(env))
        if truncated.any():
            drawn.append([(e.task.name, e.seed) for e in env._episodes])
    assert len({pair for pairs in drawn for pair in pairs}) >= 3
    alone = environment(1, most_ticks=2)
    alone.reset(seed=[8])
    assert (alone._episodes[0].task.name, alone._episodes[0].seed) == drawn[0][1]
    with pytest.raises(EsperError, match="3 seeds for 2 environments"):
        env.reset(seed=[1, 2, 3])


def test_a_saved_environment_goes_on_with_the_same_bits() -> None:
    env, other = environment(), environment()
    steps = list(itertools.islice(walk(env, 6, 9), 9))
    state = env.state_dict()
    other.load_state_dict(state)
    seen = steps[-1][1][0]
    for _ in range(6):
        actions = legal(env, seen, np.random.default_rng(1))
        expected, found = env.step(actions), other.step(actions)
        assert all(same(a, b) for a, b in zip(expected, found, strict=True))
        seen = expected[0]
    with pytest.raises(EsperError, match="a saved environment of 2 hosts"):
        environment(1).load_state_dict(state)


def test_an_illegal_option_is_an_error_that_names_the_head() -> None:
    env = environment(1, (RECALL,))
    env.reset(seed=0)
    for head, option, text in (("op", OP[Op.PRUNE], "head 'op' is not legal for PRUNE"),):
        actions = waiting(env)
        actions[head][0] = option
        with pytest.raises(EsperError, match=text):
            env.step(actions)


def refuse(size: int) -> Any:
    raise AssertionError(f"{size} hosts would be trained")


def test_twins_are_trained_once_and_kept_on_disk(tmp_path: Path) -> None:
    made: list[int] = []

    def make(size: int) -> PlainTrials:
        made.append(size)
        return plain_trials(size, MAKER)

    twins = Twins(make, folder=tmp_path, key="a")
    twins.prepare([(DIGITS, 0), (DIGITS, 1), (DIGITS, 0)])
    curve = twins.curve(DIGITS, 0)
    assert made == [2]
    assert len(list(tmp_path.iterdir())) == 2
    assert curve.flops[-1] >= 1.2 * MAKER.shared(DIGITS, 0)[0].budget
    host = plain_trials(1, MAKER)
    report = host.begin(0, DIGITS, 0)
    while report.ending is Ending.RUNNING:
        assert curve(report.flops) == report.validation_loss.value
        (report,) = host.advance([[]])
    assert curve != twins.curve(DIGITS, 1)
    read = Twins(refuse, folder=tmp_path, key="a")
    assert read.curve(DIGITS, 0) == curve
    next(tmp_path.glob("*.json")).write_text("{")
    with pytest.raises(EsperError, match="not the curve of a twin; remove it"):
        Twins(refuse, folder=tmp_path, key="a").prepare([(DIGITS, 0), (DIGITS, 1)])


def test_tasks_that_differ_in_their_budget_alone_share_a_twin() -> None:
    made: list[int] = []

    def make(size: int) -> PlainTrials:
        made.append(size)
        return plain_trials(size, MAKER)

    short = replace(DIGITS, name="short", steps=30)
    twins = Twins(make, tasks=(short, DIGITS))
    curve = twins.curve(short, 0)
    assert twins.curve(DIGITS, 0) is curve
    assert made == [1]
    assert curve == Twins(make).curve(DIGITS, 0)
    host = plain_trials(1, MAKER)
    report = host.begin(0, short, 0)
    while report.ending is Ending.RUNNING:
        assert curve(report.flops) == report.validation_loss.value
        (report,) = host.advance([[]])


def test_rewards_in_units_of_noise_are_one_factor_of_those_in_nats() -> None:
    assert Curve((1, 2, 3, 4), (9.0, 1.0, 1.0, 1.0)).noise == 0.02
    totals = []
    for config in (RewardConfig(), RewardConfig(in_noise=True)):
        env = environment(1, (DIGITS,), config=config)
        paid = [after[1][0] for _, after in walk(env, 5, 6)]
        totals.append(np.array(paid))
    unit = env.twins.curve(DIGITS, env.reset(seed=5)[1]["seed"][0]).noise
    assert np.abs(totals[0]).sum() > 0
    assert totals[0] == pytest.approx(totals[1] * unit)


def test_a_curve_is_interpolated_in_flops() -> None:
    curve = Curve((10, 20, 40), (3.0, 2.0, 1.0))
    assert [curve(flops) for flops in (0, 10, 15, 20, 30, 40, 99)] == [3.0, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0]
