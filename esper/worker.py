"""One rank of a run: ``torchrun ... -m esper.worker RUN/config.yaml``. It uses no Hydra; the config is a file.

    join the ranks -> number the attempt -> load data -> build host and slots -> shake hands -> newest checkpoint
    valid on all ranks -> train -> result.json, STATUS.json

The same command serves a first start, a restart by torchrun and a resume: what the run goes on from lies in RUN.
"""

import esper.run.leaving  # noqa: F401  first, as it says
from esper.run.parent import PARENT  # before what takes seconds: it remembers the agent

# isort: split

import os
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from esper.config.tree import load_config
from esper.nissa.lane import say
from esper.nissa.screen import safe_streams
from esper.run.attempt import Attempt, begin_attempt
from esper.run.ending import end_rank, run_as_rank
from esper.run.environment import Phases, process_began
from esper.run.train import train
from esper.tolaria.ranks.config import WorldConfig
from esper.tolaria.ranks.world import World


def describe_ranks(config: WorldConfig, size: int) -> str:
    """One line if another number of ranks was started than the config has; else nothing."""
    expected = config.nnodes * config.nproc_per_node
    if size == expected:
        return ""
    return (
        f"{size} {'rank' if size == 1 else 'ranks'} started, and world.nnodes = {config.nnodes} times "
        f"world.nproc_per_node = {config.nproc_per_node} is {expected}: the run goes on alike but for rounding; for "
        f"the same bits: torchrun --nnodes={config.nnodes} --nproc-per-node={config.nproc_per_node}"
    )


def run(config_path: Path) -> int:
    """Runs one rank to its end; returns the process's exit code (0 after a requested stop, too)."""
    run_dir = config_path.absolute().parent
    world: World | None = None
    attempt: Attempt | None = None
    rank = int(os.environ.get("RANK", "0"))
    failure: Exception | None = None
    phases = Phases.of_rank()
    if not phases.has("agent"):
        phases.end("agent", process_began)
    phases.end("import")
    try:
        config, plain = load_config(config_path)
        world = World(config.world, config.control)
        attempt = begin_attempt(run_dir, world)
        phases.end("meet")
        if rank == 0 and (odd := describe_ranks(config.world, world.size)):
            say(odd)
        train(config, plain, run_dir, world, attempt, phases)
    except Exception as error:
        failure = error
    step = world.heartbeat.step if world is not None and world.heartbeat is not None else None
    return end_rank(failure, run_dir=run_dir, rank=rank, world=world, attempt=attempt, step=step)


@record
@safe_streams()
def main() -> None:
    """Entry point of ``python -m esper.worker``."""
    run_as_rank(run, "esper.worker", PARENT)


if __name__ == "__main__":
    main()
