"""One rank of the training of a policy: ``torchrun ... -m esper.run.learning.worker RUN/config.yaml``.

The same command serves a first start and a resume. How it ends is as with any other run, see `esper.run.ending`.
"""

from esper.run.leaving import leave_with  # first, as it says
from esper.run.parent import PARENT, die_with_parent  # before what takes seconds: it remembers the agent

# isort: split

import os
import signal
import sys
import traceback
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from esper.leyline.errors import ConfigError
from esper.leyline.files import RunDir, write_json
from esper.nissa.screen import safe_streams
from esper.run.attempt import Attempt, begin_attempt
from esper.run.ending import code_for_torchrun, ending_of, is_witness, needs_traceback, status_of
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
    ending = ending_of(failure)
    beat = world.heartbeat if world is not None and isinstance(world.heartbeat, Heartbeat) else None
    witness, code = is_witness(rank, beat, ending), 0
    if failure is not None:
        status = {**status_of(failure, None if attempt is None else attempt.number), "step": None}
        code = int(status["exit_code"])
        if beat is not None and ending.marked:
            beat.mark("failed", status["message"])
        if witness and ending.writes and (attempt is None or attempt.holds()):
            try:
                write_json(RunDir(run_dir).status, status)
            except OSError as error:
                print(f"esper: {RunDir(run_dir).status}: cannot be written ({error.strerror})", file=sys.stderr)
        if needs_traceback(failure):
            traceback.print_exception(failure)
        if status["message"] and (witness or not ending.shared):
            print(f"esper: rank {rank}: {status['message']}", file=sys.stderr, flush=True)
    if world is not None:
        world.close()
    if attempt is not None:
        attempt.release()
    return code_for_torchrun(ending, code)


@record
@safe_streams()
def main() -> None:
    """Entry point of ``python -m esper.run.learning.worker``."""
    if len(sys.argv) != 2:
        print("usage: torchrun ... -m esper.run.learning.worker RUN/config.yaml", file=sys.stderr)
        sys.exit(ConfigError.exit_code)
    die_with_parent(PARENT, signal.SIGHUP)  # if the agent is killed, its ranks must not train on
    code = run(Path(sys.argv[1]))
    leave_with(code)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
