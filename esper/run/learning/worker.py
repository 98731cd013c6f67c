"""One rank of the training of a policy: ``torchrun ... -m esper.run.learning.worker RUN/config.yaml``.

The same command serves a first start and a resume. How it ends is as with any other run, see `esper.run.ending`.
"""

import esper.run.leaving  # noqa: F401  first, as it says
from esper.run.parent import PARENT  # before what takes seconds: it remembers the agent

# isort: split

import os
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from esper.leyline.files import RunDir
from esper.nissa.screen import safe_streams
from esper.run.attempt import Attempt, begin_attempt
from esper.run.ending import end_rank, run_as_rank
from esper.run.learning.config import load_policy_config
from esper.run.learning.work import learn
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.world import World


def run(config_path: Path) -> int:
    """Runs one rank to its end; returns the process's exit code (0 after a requested stop, too)."""
    run_dir, rank = config_path.absolute().parent, int(os.environ.get("RANK", "0"))
    world: World | None = None
    attempt: Attempt | None = None
    failure: Exception | None = None
    try:
        config, plain = load_policy_config(config_path)
        limit = config.learn.timeout_s
        world = World(config.world, ControlConfig(timeout_s=limit, slow_timeout_s=limit))
        attempt = begin_attempt(run_dir, world)
        world.heartbeat = Heartbeat(RunDir(run_dir).heartbeat, world.rank, world.size)
        learn(config, plain, run_dir, world, attempt)
    except Exception as error:
        failure = error
    return end_rank(failure, run_dir=run_dir, rank=rank, world=world, attempt=attempt, step=None)


@record
@safe_streams()
def main() -> None:
    """Entry point of ``python -m esper.run.learning.worker``."""
    run_as_rank(run, "esper.run.learning.worker", PARENT)


if __name__ == "__main__":
    main()
