"""A launcher without Hydra around the stand-in worker: python -m tests.support.stand_in_launcher RUN RANKS GRACE_S."""

import sys
from pathlib import Path

from esper.config.tree import RunConfig
from esper.launcher.ahead.torchrun import agent_command, torchrun_arguments, torchrun_environment
from esper.launcher.supervise import supervise
from esper.launcher.unsaved import NothingUnsaved
from esper.leyline.files import RunDir
from esper.run.directory import hold_run
from esper.tolaria.ranks.config import WorldConfig
from esper.tolaria.training.config import TrainerConfig


def main() -> None:
    folder, world = Path(sys.argv[1]), WorldConfig(nproc_per_node=int(sys.argv[2]), grace_s=float(sys.argv[3]))
    run = RunConfig(dir=str(folder))
    with hold_run(run, {"run": {"dir": run.dir, "resume": "auto"}}) as lock:
        arguments = torchrun_arguments(world, RunDir(folder).config, "tests.support.stand_in_worker")
        environment = torchrun_environment(world, TrainerConfig())
        unsaved = NothingUnsaved(folder, still_s=0.5)
        print(
            supervise(agent_command(arguments), environment, grace_s=world.grace_s, lock=lock, nothing_unsaved=unsaved)
        )


if __name__ == "__main__":
    main()
