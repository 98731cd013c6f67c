"""The network of one checkpoint, rebuilt from its run's config and record on the CPU, without a process group."""

from typing import Any

import torch

from esper.assembly import build_grown
from esper.config import EsperConfig
from esper.kasmina.attach import Grown
from esper.kasmina.birth import birth_key, build_gate, build_seed
from esper.kasmina.phases import phase_of
from esper.leyline.errors import CheckpointError
from esper.tolaria.checkpoint import CheckpointStore
from esper.tolaria.data.parts import Bundle
from esper.tolaria.evaluate import dtype_of
from esper.tolaria.snapshot import load_model, read_common
from esper.tolaria.state import RunState


def rebuild(config: EsperConfig, bundle: Bundle, store: CheckpointStore, step: int) -> tuple[Grown, RunState, str]:
    """The network of a verified checkpoint as it was at that step, on the CPU; its record; the run's id.

    Args:
        config: of the run. bundle: for the shape of its samples. store, step: where the checkpoint lies.

    Raises:
        CheckpointError: the checkpoint does not fit the run's config.
    """
    device = torch.device("cpu")
    payload, state = read_common(store, step)
    grown = build_grown(config, bundle, device)
    if [entry.slot for entry in state.slots] != list(grown.slots):
        raise CheckpointError(f"{store.path(step)}: its slots are not this model's ({', '.join(grown.slots)})")
    dtype = dtype_of(config.trainer.precision)
    for entry in state.slots:
        if entry.stage.has_seed:
            assert entry.blueprint is not None
            holder, site = grown.slots[entry.slot], grown.sites[entry.slot]
            made: dict[str, Any] = {"dim": site.dim, "topology": site.topology, "dtype": dtype, "device": device}
            key = birth_key(config.seed, entry.slot, entry.generation)  # any would do: every weight is loaded
            holder.plant(build_seed(entry.blueprint, key=key, **made))
            holder.gate = build_gate(key=key, **made) if entry.wants_gate(state.step) else None
    load_model(grown, payload["model"], str(store.path(step) / "state.pt"))
    for entry in state.slots:
        holder = grown.slots[entry.slot]
        holder.phase = phase_of(entry.stage, config.slots.incubation)
        holder.operator, holder.fades_from = entry.operators(state.step)
        holder.set_alpha(entry.alpha(state.step), entry.fade(state.step))
    return grown, state, str(payload["run_id"])
