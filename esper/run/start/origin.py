"""A run that goes on from another one: whose checkpoint it begins with, and what that has cost.

The other run is left as it is. Its checkpoint must lie where its learning rate was stable, since one that has cooled
down goes on worse than it says (Hagele et al. 2024, "Scaling laws and compute-optimal training beyond fixed training
durations"). FLOPs are counted on; RUN/origin.json says how many of them the other run had spent, so that a result tells
the sunk ones from its own.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esper.config.strict import Reader
from esper.config.tree import EsperConfig, read_plain
from esper.leyline.errors import ConfigError
from esper.leyline.files import RunDir
from esper.tolaria.checkpoint.ring import Generation
from esper.tolaria.checkpoint.snapshot import read_generation
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.growth.config import OptimConfig
from esper.tolaria.growth.policy import stable_until
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.ranks.world import World


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run goes on from.

    Fields:
        generation: of the other run.
        record: the other run, its step, FLOPs and samples, and the digest of its weights; equal on all ranks.
    """

    generation: Generation
    record: dict[str, Any]


def _stable_step(config: EsperConfig, run: Path, store: CheckpointStore) -> int:
    """Step of the checkpoint to go on from.

    Raises:
        ConfigError: none lies in the stable part of that run, or the one that is named does not.
    """
    plain = read_plain(RunDir(run).config)
    reader = Reader()
    optim = reader.section(OptimConfig, plain.get("optim"), "optim")
    if reader.problems:
        raise ConfigError([f"{RunDir(run).config}: {line}" for line in reader.problems])
    assert isinstance(optim, OptimConfig)
    steps, wanted = sorted(store.steps()), config.trainer.resume_step
    where = f"trainer.resume_from = {str(run)!r}"
    length = plain["trainer"]["steps"]
    if length is None:
        raise ConfigError(f"{where}: its length is trainer.epochs; go on from a run of trainer.steps")
    stable = stable_until(optim, length)
    if stable is None:
        raise ConfigError(
            f"{where}: its optim.schedule = {optim.schedule} goes down from the start, so it has no stable part; go on "
            "from a run of schedule wsd or constant"
        )
    fit = [step for step in steps if optim.warmup_steps <= step <= stable]
    listed = ", ".join(map(str, fit)) or "none"
    if wanted is not None and wanted not in fit:
        raise ConfigError(
            f"trainer.resume_step = {wanted}: no checkpoint of {run} in its stable part (steps {optim.warmup_steps} to "
            f"{stable}); there are {listed}"
        )
    if not fit:
        have = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"{where}: no checkpoint lies in its stable part, up to step {stable}; there are {have}")
    return wanted if wanted is not None else fit[-1]


def find_origin(config: EsperConfig, world: World, controller: dict[str, Any] | None) -> Origin | None:
    """Reads what the run goes on from; None if it begins from nothing.

    Args:
        config: the run's settings.
        world: the ranks.
        controller: state of this run's controller, which it keeps if the other run had one of another kind.

    Raises:
        ConfigError: the other run has no checkpoint to go on from, or is longer than this one.
        CheckpointError: the checkpoint is damaged.
    """
    if config.trainer.resume_from is None:
        return None
    run = Path(config.trainer.resume_from).expanduser().absolute()
    store = CheckpointStore.of_run(run)
    step = _stable_step(config, run, store)
    if config.trainer.steps is not None and config.trainer.steps <= step:
        raise ConfigError(f"trainer.steps = {config.trainer.steps}: it goes on from step {step}; set more than that")
    store.verify(step, ("state.pt",))
    generation = read_generation(store, step, world)
    was = read_plain(RunDir(run).config)["controller"].get("kind")
    if was != config.controller.kind and controller is not None:
        generation = replace(generation, common={**generation.common, "controller": controller})
    state = generation.state
    record = {
        "run": str(run),
        "run_id": generation.common["run_id"],
        "step": step,
        "flops": state.flops,
        "samples": state.samples,
        "weights": digest_tensors(generation.common["model"].items()),
    }
    return Origin(generation, record)
