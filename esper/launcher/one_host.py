"""One machine of a run on several; srun starts ``python -m esper.launcher.one_host RUN/config.yaml HOST:PORT NAME``.

It does for the ranks of this machine what the launcher does for a run on one: it starts torchrun, passes the first stop
signal on to the ranks, and leaves no process behind. The run's lock is the launcher's, its STATUS.json the launcher's
and rank 0's.
"""

import os
import sys
from pathlib import Path

from esper.config.tree import read_config, read_plain
from esper.launcher.ahead.process import Ahead
from esper.launcher.ahead.torchrun import agent_command, torchrun_arguments, torchrun_environment
from esper.launcher.supervise import supervise
from esper.leyline.errors import ConfigError, EsperError
from esper.nissa.screen import safe_streams


@safe_streams()
def main(argv: list[str]) -> int:
    """Runs this machine's ranks to their end; returns 0 if all ended in order (after a stop, too), else 1."""
    if len(argv) != 3:
        print("usage: python -m esper.launcher.one_host RUN/config.yaml HOST:PORT NAME", file=sys.stderr)
        return ConfigError.exit_code
    path, ahead = Path(argv[0]), Ahead()
    ahead.start()
    try:
        config = read_config(read_plain(path))  # the launcher has checked it whole, and so does each rank
    except EsperError as error:
        ahead.dismiss()
        print(f"esper: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    config.world.rdzv_endpoint, config.world.rdzv_id = argv[1], argv[2]
    first, name = os.environ.get("SLURM_NODEID"), os.environ.get("SLURMD_NODENAME")
    arguments = torchrun_arguments(
        config.world,
        path,
        is_first=None if first is None else first == "0",
        own_name=name,
        patience_s=config.control.startup_timeout_s,
    )
    environment = torchrun_environment(config.world, config.trainer)
    ended = supervise(
        agent_command(arguments),
        environment,
        ready=ahead.take(environment),
        grace_s=config.world.grace_s,
        idle_s=config.control.startup_timeout_s,
    )
    return 0 if ended.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
