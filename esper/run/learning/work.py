"""One rank of the training of a policy, from its settings to its result."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from scipy.stats import trim_mean

from esper.config.strict import as_plain
from esper.leyline.errors import CheckpointError, Preempted
from esper.leyline.files import RunDir
from esper.leyline.protocols import EventSink, NullSink
from esper.nissa.console import ConsoleSink
from esper.nissa.envelope import Envelope
from esper.nissa.fanout import MultiSink
from esper.nissa.jsonl import JsonlSink
from esper.nissa.wandb_sink import WandbSink
from esper.run.attempt import Attempt
from esper.run.directory import write_done, write_result
from esper.run.learning.config import PolicyRunConfig
from esper.run.learning.kinds import AGENTS, ENVIRONMENTS
from esper.run.learning.warm import warm_up
from esper.run.stopping import StopHandlers
from esper.simic.ppo.evaluate import play
from esper.simic.ppo.measures import Update
from esper.simic.ppo.saves import checkpoints, load_shared
from esper.simic.ppo.seeds import Purpose, make_seed
from esper.simic.ppo.train import Plan, Training
from esper.tamiyo.policy.agent import Agent
from esper.tamiyo.policy.checkpoint import save_policy
from esper.tamiyo.policy.network import GrowthAgent
from esper.tolaria.ranks.handshake import code_digest
from esper.tolaria.ranks.world import World

FIRST_SEED = 1_000_000  # of an evaluation, so that it meets no seed of a training


def build_sink(config: PolicyRunConfig, plain: dict[str, Any], run_dir: Path, attempt: Attempt) -> EventSink:
    """Builds rank 0's sink: file, screen and wandb."""
    jsonl = JsonlSink(RunDir(run_dir).events, Envelope(attempt.run_id, attempt.number, 0), config.telemetry.level)
    sinks: list[EventSink] = [jsonl, ConsoleSink(config.telemetry.console)]
    every = MultiSink(sinks)
    wandb = WandbSink(
        config.telemetry.wandb,
        run_dir=run_dir,
        run_id=attempt.run_id,
        name=f"{config.env.kind}, {config.agent.kind}, seed {config.seed}",
        group=config.run.group,
        job_type="policy",
        config_dict=plain,
        on_fault=every.emit,
    )
    return MultiSink([*sinks, wandb])


def build_agent(config: PolicyRunConfig, env: Any, device: torch.device) -> Agent:
    """Builds the agent with first weights that the seed decides."""
    torch.manual_seed(make_seed(config.seed, Purpose.WEIGHTS))
    return AGENTS[config.agent.kind].make(config.agent, env).to(device)


def learn(config: PolicyRunConfig, plain: dict[str, Any], run_dir: Path, world: World, attempt: Attempt) -> None:
    """Trains on one rank, from the newest checkpoint on; rank 0 evaluates and writes the result.

    Raises:
        Preempted: it was asked to stop; a checkpoint is written.
    """
    torch.set_num_threads(config.world.threads)
    first = config.learn.envs * world.rank
    env = ENVIRONMENTS[config.env.kind].make(config.env, config.learn.envs, first)
    agent = build_agent(config, env, world.device)
    torch.manual_seed(make_seed(config.seed, Purpose.ACTIONS, world.rank, 0))  # of whatever draws from it unasked
    sink = build_sink(config, plain, run_dir, attempt) if world.rank == 0 else NullSink()
    asked: list[bool] = []
    folder = RunDir(run_dir).checkpoints
    plan = Plan(
        updates=config.learn.updates,
        seed=config.seed,
        folder=folder,
        save_every=config.learn.save_every,
        keep=config.learn.keep,
    )
    try:
        training = Training(agent, env, config.ppo, plan, ranks=world, sink=sink)
        newest = world.hear_rank_0(_newest(folder), what="choice of checkpoint")
        if newest:
            training.resume(folder / newest)
        elif config.warm.ticks:
            _warm_up(config, training, env, world)
        StopHandlers(partial(asked.append, True), config.world.grace_s).install()
        tell = partial(_tell, config.learn.updates, training) if world.rank == 0 else (lambda update: None)
        finished = training.run(should_stop=lambda: bool(asked), after_update=tell)
        if not finished:
            raise Preempted(f"saved after update {training.done} of {config.learn.updates}")
        if world.rank == 0:
            result = evaluate(config, agent, seed=FIRST_SEED + config.seed, episodes=config.learn.episodes)
            attempt.check()
            keep_policy(config, agent, run_dir, training.done)
            write_result(run_dir, {**result, "updates": training.done, "steps": training.ppo.steps})
            write_done(run_dir, attempt.number, step=training.ppo.steps, objective=result["greedy"]["mean"])
        world.meet("the end")
    finally:
        sink.close()


def _warm_up(config: PolicyRunConfig, training: Training, env: VectorEnv, world: World) -> None:
    """Clones the teacher, and keeps what came of it as the checkpoint of update 0."""
    found = warm_up(training, config.warm, env, seed=config.seed, device=world.device)
    if world.rank == 0:
        first, last = found[0], found[-1]
        losses = f"cross-entropy {first['loss/policy']:.3f} -> {last['loss/policy']:.3f} nats a decision"
        values = f"value loss {first['loss/value']:.3f} -> {last['loss/value']:.3f}"
        print(f"esper: cloned the teacher in {len(found)} passes: {losses}, {values}", flush=True)
    training.begin()
    training.save()


def keep_policy(config: PolicyRunConfig, agent: Agent, run_dir: Path, updates: int) -> None:
    """Writes RUN/policy.pt, which ``controller=policy controller.checkpoint=RUN/policy.pt`` takes; of a growth policy.

    It says how it was made in terms that hold elsewhere too: no path of this machine.
    """
    if not isinstance(agent, GrowthAgent):
        return
    made = {
        "command": "python launch/policy.py train",
        "seeds": [config.seed],
        "code": code_digest(),
        "updates": updates,
        "env": {name: value for name, value in as_plain(config.env).items() if name != "twins"},
        "agent": as_plain(config.agent),
        "learn": as_plain(config.learn),
        "warm": as_plain(config.warm),
        "ppo": as_plain(config.ppo),
    }
    save_policy(run_dir / "policy.pt", agent, made)


def _newest(folder: Path) -> str:
    found = checkpoints(folder) if folder.is_dir() else []
    return found[-1].name if found else ""


def _tell(updates: int, training: Training, update: Update) -> None:
    """One plain line now and then."""
    if training.done % max(1, updates // 20) and training.done != updates:
        return
    numbers = update.numbers
    paid = numbers.get("charts/episodic_return")
    text = "no episode ended" if paid is None else f"return {paid:.4g}"
    kl, entropy = numbers["losses/approx_kl"], numbers["losses/entropy"]
    print(f"esper: update {training.done}/{updates}  {text}  entropy {entropy:.3f}  kl {kl:.4f}", flush=True)


def evaluate(config: PolicyRunConfig, agent: Agent, *, seed: int, episodes: int) -> dict[str, Any]:
    """Plays whole episodes with a policy that stands still, greedily and drawn; returns statistics of their returns."""
    found: dict[str, Any] = {"seed": seed}
    for name in ("greedy", "sampled"):
        env = ENVIRONMENTS[config.env.kind].make(config.env, config.learn.envs, 0)
        totals = play(agent, env, episodes=episodes, seed=seed, greedy=name == "greedy").flatten()
        spread = float(np.std(totals, ddof=1) / len(totals) ** 0.5) if len(totals) > 1 else 0.0
        middle = float(trim_mean(totals, 0.25))
        found[name] = {"mean": float(totals.mean()), "se": spread, "iqm": middle, "episodes": len(totals)}
    return found


def evaluate_run(config: PolicyRunConfig, run_dir: Path, *, seed: int, episodes: int) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run; writes nothing.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    folder = RunDir(run_dir).checkpoints
    newest = _newest(folder)
    if not newest:
        raise CheckpointError(f"{folder}: no checkpoint yet; python launch/policy.py resume {run_dir}")
    env = ENVIRONMENTS[config.env.kind].make(config.env, config.learn.envs, 0)
    agent = build_agent(config, env, torch.device("cpu"))
    agent.load_state_dict(load_shared(folder / newest)["agent"])
    return {"checkpoint": newest, **evaluate(config, agent, seed=seed, episodes=episodes)}
