"""The first step of a run that does not begin with random weights."""

from pathlib import Path

from esper.config.tree import EsperConfig
from esper.run.start.origin import find_origin
from esper.run.start.record import write_origin
from esper.run.start.weights import load_weights_from
from esper.tolaria.ranks.handshake import shake_hands
from esper.tolaria.training.engine import Engine
from esper.tolaria.training.going_back import resume


def begin_elsewhere(config: EsperConfig, engine: Engine, run_dir: Path, chosen: int | None) -> None:
    """Puts an engine that has not begun where its run starts: at another run's checkpoint, or with weights from
    elsewhere; without either it stays as it is. Every rank calls it.

    Args:
        config: the run's settings.
        engine: before its `begin`.
        run_dir: RUN, where the record is written.
        chosen: step of a checkpoint of the run itself, which has begun then.

    Raises:
        ConfigError, CheckpointError: see `find_origin` and `load_weights_from`.
        LockstepError: ranks found different ones.
    """
    if chosen is not None:
        return
    own = None if engine.controller is None else engine.controller.state_dict()
    origin, given = find_origin(config, engine.world, own), load_weights_from(config, engine.grown.model)
    if given is not None and engine.average is not None:
        engine.average.restart()  # it was made with the random weights
    begins = given if origin is None else origin.record
    shake_hands(engine.world, {"begins with": "random weights" if begins is None else str(begins)})
    if begins is not None and engine.world.rank == 0:
        write_origin(run_dir, begins)
    if origin is not None:
        resume(engine, engine.evaluator.copies, origin.generation)
