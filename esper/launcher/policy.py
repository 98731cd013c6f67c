"""Trains a policy from a command line: compose, check, write RUN/config.yaml, start torchrun, report the end.

    python launch/policy.py train env.name=recall agent.hidden=64 learn.updates=100
    python launch/policy.py resume RUN
    python launch/policy.py evaluate RUN [--episodes N] [--seed N]

``train`` is composed by Hydra from conf/policy.yaml as a run is from conf/config.yaml: ``--help``, ``--cfg job`` and
``-m`` work alike. Workers read RUN/config.yaml and use no Hydra. In a Slurm job on one host
(``world.rdzv_endpoint=slurm``) the training stops and saves in time before the job's limit.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.launcher import compose
from esper.launcher.ahead.process import Ahead
from esper.launcher.ahead.torchrun import agent_command, rendezvous_of, torchrun_arguments, torchrun_environment
from esper.launcher.defaults import store_classes
from esper.launcher.early import interrupt_on_stop
from esper.launcher.slurm import FROM_SLURM, TimeLimit, check_single_task, find_job
from esper.launcher.start import LaunchResult, results_of_errors, show_result, status_of_silent, write_status
from esper.launcher.supervise import supervise
from esper.leyline.errors import ConfigError, EsperError, Preempted
from esper.leyline.files import RunDir
from esper.nissa.screen import safe_streams
from esper.run.attempt import BEFORE, latest_attempt
from esper.run.directory import check_run, find_run, hold_run, read_status
from esper.run.lock import LOCKED, name_launch
from esper.tolaria.training.config import TrainerConfig

WORKER = "esper.run.learning.worker"
_NEEDS = "training a policy needs gymnasium: pip install 'esper[policy]', or bash launch/setup.sh"


def begin(plain: dict[str, Any], launch: str, ahead: Ahead) -> LaunchResult:
    """Runs one training to its end (or prepares it, or prints what it would do).

    Args:
        plain: its settings.
        launch: "run", "prepare" or "plan", as for any run.
        ahead: the process that was started to be torchrun's agent, if any.

    Raises:
        EsperError: it could not be started.
    """
    from esper.run.learning.config import build_policy_config
    from esper.simic.ppo.saves import checkpoints

    config = build_policy_config(plain)
    folder = Path(config.run.dir).expanduser().absolute()
    config.run.dir = plain["run"]["dir"] = str(folder)
    in_slurm = config.world.rdzv_endpoint == FROM_SLURM
    if launch == "run":
        check_single_task()
        if in_slurm and len(find_job(config.world).hosts) > 1:
            raise ConfigError(
                "world.nnodes: in a Slurm job a policy is trained on one host; for several, launch=prepare prints the "
                "torchrun that each of them runs"
            )
    arguments = torchrun_arguments(config.world, RunDir(folder).config, WORKER)
    environment = torchrun_environment(config.world, TrainerConfig())
    line = " ".join([*(f"{key}={value}" for key, value in environment.items()), "torchrun", shlex.join(arguments)])
    if launch == "plan":
        known = check_run(config.run, plain)
        print(f"run directory: {folder} ({'resumed' if known else 'new'})\n{line}")
        return LaunchResult(0, "planned")
    with hold_run(config.run, plain) as lock:
        if launch == "prepare":
            print(f"run directory: {folder}\n{line}")
            return LaunchResult(0, "prepared")
        status, mark = read_status(folder)
        if status is not None and status["status"] == "done":
            return _result_of(folder, status)
        ranks = config.world.nproc_per_node * config.world.nnodes
        print(f"esper: starting {ranks} {'rank' if ranks == 1 else 'ranks'} in {folder}", flush=True)
        environment |= {BEFORE: str(latest_attempt(folder)[0]), LOCKED: str(folder)}
        name_launch(lock, rendezvous_of(arguments))
        limit = TimeLimit(os.environ["SLURM_JOB_ID"], config.world.grace_s) if in_slurm else lambda: None
        command = agent_command(arguments)
        ready = ahead.take(environment)
        ended = supervise(command, environment, grace_s=config.world.grace_s, lock=lock, ready=ready, stop_due=limit)
        status, mark_now = read_status(folder)
        if status is None or mark_now == mark:
            saved = RunDir(folder).checkpoints.is_dir() and bool(checkpoints(RunDir(folder).checkpoints))
            status = status_of_silent(ended, saved=saved)
            write_status(folder, status)
        return _result_of(folder, status)


def _result_of(folder: Path, status: dict[str, Any]) -> LaunchResult:
    """The result that a status means, with the command that goes on."""
    run, kind = shlex.quote(str(folder)), status["status"]
    code = 0 if kind == "done" else Preempted.exit_code if kind == "preempted" else status["exit_code"]
    message = f": {status['message']}" if status.get("message") else ""
    again = f"; python launch/policy.py evaluate {run}" if kind == "done" else ""
    if kind in ("preempted", "failed") and code != ConfigError.exit_code:
        again = f"; to go on: python launch/policy.py resume {run}"
    objective = status.get("objective")
    paid = "" if objective is None else f", mean return {objective:.4g}"
    return LaunchResult(code, f"{kind}{message}{paid} (run directory: {folder}){again}", objective)


def _resume(run: Path) -> LaunchResult:
    from esper.run.learning.config import load_policy_config

    _, plain = load_policy_config(find_run(run).config)
    plain["run"]["resume"] = "must"
    return begin(plain, "run", Ahead())


def _evaluate(run: Path, episodes: int, seed: int | None) -> LaunchResult:
    from esper.run.learning.config import load_policy_config
    from esper.run.learning.work import FIRST_SEED, evaluate_run

    config, _ = load_policy_config(find_run(run).config)
    result = evaluate_run(config, run, seed=FIRST_SEED + config.seed if seed is None else seed, episodes=episodes)
    print(json.dumps(result, indent=2))
    return LaunchResult(0, "planned", result["greedy"]["mean"])  # all is said


@safe_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code."""
    compose.make_cwd_importable()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # Hydra reads the rest, its --help too
        try:
            import gymnasium  # noqa: F401 - a run with a trained policy does without
        except ModuleNotFoundError:
            print(f"esper: {_NEEDS}", file=sys.stderr, flush=True)
            return ConfigError.exit_code
        from esper.run.learning.config import own_classes

        store_classes(own_classes())
        return compose.main(arguments[1:], root="policy", begin=begin)
    parser = argparse.ArgumentParser(
        "esper policy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="compose settings with Hydra and train (train --help)")
    again = commands.add_parser("resume", help="go on with a training", allow_abbrev=False)
    again.add_argument("run", metavar="RUN", type=Path, help="run directory")
    judge = commands.add_parser("evaluate", help="play whole episodes with the newest checkpoint", allow_abbrev=False)
    judge.add_argument("run", metavar="RUN", type=Path, help="run directory")
    judge.add_argument("--episodes", metavar="N", type=int, default=8, help="of each environment; 8")
    judge.add_argument("--seed", metavar="N", type=int, help="of the evaluation; one that no training has")
    given = parser.parse_args(arguments)
    results: list[LaunchResult] = []
    with results_of_errors(results):
        run = given.run.absolute()
        if given.command == "resume":
            interrupt_on_stop()
            try:
                results.append(_resume(run))
            except KeyboardInterrupt:
                results.append(LaunchResult(Preempted.exit_code, "interrupted before the run had started"))
        elif given.episodes < 1:
            raise ConfigError(f"--episodes {given.episodes}: at least 1")
        else:
            try:
                results.append(_evaluate(run, given.episodes, given.seed))
            except ModuleNotFoundError as error:
                raise EsperError(f"no {error.name} here; {_NEEDS}") from None
    show_result(results[0])
    return results[0].code
