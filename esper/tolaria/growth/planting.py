"""Builds what the record of a slot describes: the seed, its gate, and what the slot computes.

These are pure functions of the record and the run's seed, so every rank, a resume, an export and a final test get the
same modules.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from esper.accord.config import CopyInit, SlotsConfig
from esper.accord.lifecycle import SlotState
from esper.accord.state import RunState
from esper.kasmina.axes.block import OwnBlock
from esper.kasmina.axes.site import Site
from esper.kasmina.births.build import birth_key, build_gate, build_seed, gate_key
from esper.kasmina.births.own import copy_block, set_weights
from esper.kasmina.births.projections import last_projections
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.phases import Phase, phase_of
from esper.kasmina.slots.slot import SeedSlot
from esper.leyline.errors import CheckpointError, ConfigError
from esper.leyline.legality import COPY
from esper.leyline.stages import Incubation

POWERS = {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1}  # of a gradient, in what optimizers keep


def build(
    grown: Grown,
    slot: str,
    blueprint: str,
    generation: int,
    *,
    run_seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """Builds the seed that every rank builds alike: its weights are a function of (run seed, slot, generation).

    A copy of the host's block has the host's weights of this moment; it takes others when it enters, or from a file.

    Args:
        grown: the model.
        slot: slot id.
        blueprint: registered name.
        generation: births in that slot up to this one.
        run_seed: of the run.
        dtype: number format of the seed.
        device: device of the seed.
    """
    if blueprint == COPY:
        return copy_block(grown, slot)
    key, site = birth_key(run_seed, slot, generation), grown.sites[slot]
    return build_seed(blueprint, dim=site.dim, topology=site.topology, key=key, dtype=dtype, device=device)


def enter(grown: Grown, slot: str, slots: SlotsConfig, optimizer: torch.optim.Optimizer) -> None:
    """Gives a copy that has just been planted the host's present weights, as ``slots.copy_init`` says, and a share of
    its moments, as ``slots.copy_moments`` says; any other seed has its own.
    """
    seed = grown.slots[slot].seed
    if not isinstance(seed, OwnBlock):
        return
    source = grown.model.get_submodule(grown.sites[slot].module)
    zeroed = last_projections(source, slots.copy_zero) if slots.copy_init is CopyInit.IDENTITY else ()
    set_weights(seed, source, zeroed)
    if slots.copy_moments:
        sources = dict(source.named_parameters())
        for name, parameter in seed.block.named_parameters():
            _take_moments(optimizer, parameter, sources[name], slots.copy_moments)


def _take_moments(optimizer: torch.optim.Optimizer, to: Tensor, source: Tensor, share: float) -> None:
    """Starts the moments of a parameter at a share of those of another; a frozen one has none to give.

    Raises:
        ConfigError: the optimizer keeps something of another kind.
    """
    unknown = sorted(set(optimizer.state.get(source, {})) - set(POWERS))
    if unknown:
        raise ConfigError(f"slots.copy_moments: {type(optimizer).__name__} keeps {', '.join(unknown)}; set it to 0")
    for key, value in optimizer.state.get(source, {}).items():
        if isinstance(value, Tensor):
            optimizer.state[to][key] = value.detach().clone() * share ** POWERS[key]


def gate_for(site: Site, entry: SlotState, *, run_seed: int, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Builds the gate of a slot: a function of (run seed, slot, generation, first step of its ramp), so ranks agree."""
    assert entry.ramp is not None
    key = gate_key(run_seed, entry.slot, entry.generation, entry.ramp.first_step)
    return build_gate(dim=site.dim, topology=site.topology, key=key, dtype=dtype, device=device)


def find_taken(grown: Grown, state: RunState) -> list[SlotState]:
    """The records of slots that hold a seed, or are not yet as an empty slot is."""
    taken = {slot for slot, holder in grown.slots.items() if holder.phase is not Phase.OFF or holder.seed is not None}
    return [entry for entry in state.slots if entry.stage.has_seed or entry.slot in taken]


def seat(holder: SeedSlot, entry: SlotState, step: int, incubation: Incubation) -> None:
    """Makes a slot compute what its record says, at optimizer step ``step``."""
    holder.phase = phase_of(entry.stage, incubation)
    holder.operator, holder.fades_from = entry.operators(step)
    holder.set_alpha(entry.alpha(step), entry.fade(step))


def load_weights(grown: Grown, weights: Mapping[str, Tensor], where: str) -> None:
    """Loads weights into a model whose seeds and gates are in place; every tensor must fit.

    Raises:
        CheckpointError: names what does not fit, and ``where``, the file.
    """
    try:
        grown.model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: {' '.join(str(error).split())}") from error


def rebuild_network(
    grown: Grown,
    state: RunState,
    weights: Mapping[str, Tensor],
    where: str,
    *,
    run_seed: int,
    dtype: torch.dtype,
    device: torch.device,
    incubation: Incubation,
) -> None:
    """Makes a model with empty slots the network of a record, for evaluation: no optimizer knows of its seeds.

    Args:
        grown: with empty slots.
        state: the record.
        weights: of the whole network, seeds and gates included.
        where: the file that they come from, for an error.
        run_seed: of the run.
        dtype: of the seeds.
        device: of the model.
        incubation: of the run.

    Raises:
        CheckpointError: the weights do not fit.
    """
    for entry in state.slots:
        if entry.stage.has_seed:
            assert entry.blueprint is not None
            holder, site = grown.slots[entry.slot], grown.sites[entry.slot]
            holder.plant(
                build(
                    grown, entry.slot, entry.blueprint, entry.generation, run_seed=run_seed, dtype=dtype, device=device
                )
            )
            if entry.wants_gate(state.step):
                holder.set_gate(gate_for(site, entry, run_seed=run_seed, dtype=dtype, device=device))
    load_weights(grown, weights, where)
    for entry in state.slots:
        seat(grown.slots[entry.slot], entry, state.step, incubation)
