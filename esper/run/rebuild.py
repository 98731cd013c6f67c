"""Rebuilds the network of one checkpoint from its run's config and record, on the CPU, without a process group."""

import torch

from esper.accord.state import RunState
from esper.config.tree import EsperConfig
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import CheckpointError
from esper.run.assembly import build_grown
from esper.tolaria.checkpoint.snapshot import read_common
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data.parts import Bundle
from esper.tolaria.growth.planting import rebuild_network as rebuild_record
from esper.tolaria.lockstep.ema import write_averages
from esper.tolaria.training.precision import dtype_of


def rebuild_run(
    config: EsperConfig, bundle: Bundle, store: CheckpointStore, step: int, *, averaged: bool = False
) -> tuple[Grown, RunState, str]:
    """Rebuilds the network of a verified checkpoint as it was at that step.

    Args:
        config: the run's settings.
        bundle: the run's data, for the shape of a sample.
        store: the run's checkpoints.
        step: of the checkpoint.
        averaged: whether the weights are to be the average of the weights that lies in it.

    Returns:
        The network on the CPU, its record, and the run's id.

    Raises:
        CheckpointError: the checkpoint does not fit the run's config; it holds no average.
    """
    device = torch.device("cpu")
    payload, state = read_common(store, step)
    grown = build_grown(config, bundle, device)
    if [entry.slot for entry in state.slots] != list(grown.slots):
        raise CheckpointError(f"{store.path(step)}: its slots are not this model's ({', '.join(grown.slots)})")
    rebuild_record(
        grown,
        state,
        payload["model"],
        str(store.path(step) / "state.pt"),
        run_seed=config.seed,
        dtype=dtype_of(config.trainer.precision),
        device=device,
        incubation=config.slots.incubation,
    )
    if averaged:
        write_averages(grown, payload, str(store.path(step) / "state.pt"))
    return grown, state, str(payload["run_id"])
