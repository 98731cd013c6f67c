"""Collects what a checkpoint holds, and rebuilds a run from it: first the topology from the record, then every tensor.

state.pt      format, config digest, settings that may change, agreed state, model, optimizer by parameter name,
              controller, wandb run id, and the teacher's identity (never the teacher itself); the network from which
              copies are made while a seed is continued in them
rank-N.pt     format, rank, random number state of this rank
"""

from dataclasses import dataclass
from typing import Any

from esper.accord.state import RunState
from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import rng_state, seed_rank, set_rng_state
from esper.leyline.errors import CheckpointError
from esper.leyline.plain import from_plain, to_plain
from esper.tolaria.checkpoint.ring import Generation
from esper.tolaria.checkpoint.store import FORMAT, CheckpointStore, rank_file
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.growth.planting import load_weights
from esper.tolaria.ranks.world import World

COMMON_KEYS = {
    "format",
    "config_digest",
    "layouts",
    "settings",
    "run_state",
    "model",
    "optimizer",
    "controller",
    "run_id",
    "teacher",
}
OPTIONAL_KEYS = {"observers", "continuation"}  # an observer has a state; copies of a seed are under way
OWN_KEYS = {"format", "rank", "rng_cpu", "rng_cuda", "rng_python", "rng_numpy"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What makes a run the run that it is, for its checkpoints.

    Fields:
        config_digest: digest of the settings that it keeps for its whole life.
        settings: the others, by dotted path.
        run_id: of wandb.
        teacher: the teacher's identity, or None.
    """

    config_digest: int
    settings: dict[str, Any]
    run_id: str
    teacher: dict[str, Any] | None


def share_of(rank: int, local_rank: int) -> tuple[str, ...] | None:
    """Names of the files that a rank verifies: rank 0 all (None), each its own, and one rank a machine state.pt.

    What one rank of a machine finds damaged no rank goes on from, since all agree on what is valid.
    """
    if rank == 0:
        return None
    return ("state.pt", rank_file(rank)) if local_rank == 0 else (rank_file(rank),)


def collect_common(
    grown: Grown,
    owner: ParameterOwner,
    state: RunState,
    controller: dict[str, Any],
    identity: Identity,
    observers: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Everything that is equal on all ranks: plain data and the living tensors, not copies.

    Args:
        grown: the model.
        owner: owns its optimizer.
        state: the agreed record.
        controller: the controller's state.
        identity: of the run.
        observers: states of those observers that have one; without any the key is left out.
    """
    optional = {"observers": observers} if observers else {}
    return {
        **optional,
        "format": FORMAT,
        "config_digest": identity.config_digest,
        "settings": identity.settings,
        "run_state": to_plain(state),
        "layouts": _layouts(grown),
        "model": dict(grown.model.state_dict()),
        "optimizer": owner.state_by_name(copies=False),
        "controller": controller,
        "run_id": identity.run_id,
        "teacher": identity.teacher,
    }


def _layouts(grown: Grown) -> dict[str, str]:
    """By slot, the axes of its feature, whether the host is causal there and whether it may be left out."""
    return {slot: site.describe() for slot, site in grown.sites.items()}


def find_changes(generation: Generation, identity: Identity) -> dict[str, tuple[Any, Any]]:
    """Checks that a checkpoint is of this run; returns the settings that were changed since, as (before, after).

    Raises:
        CheckpointError: it was saved by a run with another teacher, or with other settings that may not change.
    """
    check_teacher(generation.common, identity.teacher, generation.where)
    if generation.common["config_digest"] != identity.config_digest:
        raise CheckpointError(
            f"{generation.where}: saved under other settings; config.yaml was edited since: put it back"
        )
    before, after = generation.common["settings"], identity.settings
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    return {key: (before.get(key), after.get(key)) for key in keys}


def check_teacher(payload: dict[str, Any], present: dict[str, Any] | None, where: str) -> None:
    """Checks that a run goes on with the teacher that it had.

    Args:
        payload: common part of a checkpoint.
        present: identity of this run's teacher, or None.
        where: where the checkpoint lies, for an error.

    Raises:
        CheckpointError: the run had another teacher; the text says which.
    """
    before = payload["teacher"]
    if (before and before["digest"]) != (present and present["digest"]):
        names = [f"{who['source']} (digest {who['digest']:016x})" if who else "none" for who in (before, present)]
        raise CheckpointError(f"{where}: its teacher was {names[0]}, now it is {names[1]}; put the former back")


def collect_own(world: World) -> dict[str, Any]:
    """Everything that is this rank's own."""
    return {"format": FORMAT, "rank": world.rank, **rng_state(world.device)}


def _check_keys(payload: dict[str, Any], wanted: set[str], where: str) -> None:
    missing, unknown = sorted(wanted - set(payload)), sorted(set(payload) - wanted)
    if missing or unknown:
        raise CheckpointError(f"{where}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")


def read_common(store: CheckpointStore, step: int) -> tuple[dict[str, Any], RunState]:
    """Maps state.pt of a verified checkpoint; its tensors are to be copied (see `CheckpointStore.load`).

    Raises:
        CheckpointError: a key is missing or unknown; the text names it.
    """
    where = str(store.path(step) / "state.pt")
    payload = store.load(step, "state.pt", mapped=True)
    _check_keys(payload, COMMON_KEYS | (OPTIONAL_KEYS & set(payload)), where)
    try:
        return payload, from_plain(RunState, payload["run_state"], "run_state")
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def read_generation(store: CheckpointStore, step: int, world: World) -> Generation:
    """Reads a verified checkpoint for this rank; changes nothing.

    Raises:
        CheckpointError: a key is missing or unknown; the text names it.
    """
    payload, state = read_common(store, step)
    name, own = rank_file(world.rank), None
    manifest = store.manifest(step)
    if name in manifest.files and manifest.world_size == world.size:
        own = store.load(step, name)
        _check_keys(own, OWN_KEYS, str(store.path(step) / name))
    return Generation(state, payload, own, str(store.path(step)), "disk", cleared=True)


def put_back(
    generation: Generation, grown: Grown, owner: ParameterOwner, growth: Growth, world: World, seed: int
) -> None:
    """Restores the run of a generation: topology, weights, moments, random numbers, staged births.

    The model may have grown in any way since. So every seed and every birth under way is removed first, and the result
    is the same as from a fresh start. On another world size a rank without random numbers of its own draws from a
    stream keyed by (seed, rank, step). The generation's tensors are copied.

    Raises:
        CheckpointError: it does not fit this model; the text says which checkpoint it is.
    """
    state, where = generation.state, generation.where
    if [entry.slot for entry in state.slots] != list(grown.slots):
        have = ", ".join(grown.slots)
        raise CheckpointError(f"{where}: its slots are not this model's ({have})")
    was = generation.common["layouts"]
    for slot, layout in _layouts(grown).items():
        if was.get(slot) != layout:
            raise CheckpointError(
                f"{where}: slot {slot} had features {was.get(slot)}, now they are {layout}; is the host the same?"
            )
    growth.clear()
    growth.plant_record(state)
    load_weights(grown, generation.common["model"], where)
    owner.load_by_name(generation.common["optimizer"])
    owner.set_lr(state.step, {entry.slot: entry.learn_step for entry in state.slots})
    growth.restage(state)
    if generation.own is not None:
        set_rng_state(generation.own, world.device)
    else:
        seed_rank(seed, world.rank, state.step)
