"""Collects a session's state for a checkpoint, and loads one: first the topology, then every tensor."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from esper.accord.state import RunState
from esper.kasmina.attach import attach_described
from esper.kasmina.axes.site import Site
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.streams import rng_state, seed_rank, set_rng_state
from esper.leyline.errors import CheckpointError, one_line
from esper.leyline.observation import BlueprintInfo
from esper.leyline.plain import from_plain, to_plain
from esper.leyline.slots import sort_slots
from esper.session.average import average_words, check_average, collect_average, load_average
from esper.session.file import FORMAT, KIND, check_layout, collect_user_parts, to_saveable
from esper.session.loop import Loop
from esper.tolaria.growth.planting import load_weights
from esper.tolaria.growth.staging import describe_seeds
from esper.tolaria.lockstep.buffers import average_running_statistics
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.ranks.handshake import shake_hands
from esper.tolaria.ranks.world import World


def collect(loop: Loop, *, keep: bool = True) -> dict[str, Any]:
    """Collects the whole state, tensors copied to the CPU. Every rank calls it and wraps its model anew.

    Args:
        loop: of the session.
        keep: whether this rank needs the state; without it nothing is copied, and what is returned is empty.

    Raises:
        LockstepError: the ranks no longer hold the same network.
        CheckpointError: scheduler, optimizer or controller hold something that cannot be saved.
        LoopError: it was called within `accumulate`, or an interruption has torn the network.
    """
    parts, grown = loop.parts, loop.grown
    loop.come_between_steps("a save")
    loop.world.allow_slow(True)
    loop.state = parts.evaluator.continue_anew(loop.state)
    lockstep = parts.cycle.lockstep
    average_running_statistics(grown.model, loop.world, lockstep.average)
    lockstep.find_local(grown)
    parts.narrator.report_local_buffers(loop.state, lockstep.news)
    equal = digest_tensors(lockstep.split_tensors(grown)[0].items())
    shake_hands(loop.world, {"weights": str(equal), "steps": str(loop.steps), "ema": average_words(loop)})
    buffer = io.BytesIO()
    torch.save(_collect_own(loop), buffer)
    ranks = loop.world.gather_bytes(buffer.getvalue(), what="save")
    loop.follow(force=True)  # as a restored session does, so that both sum gradients in the same order
    payload: dict[str, Any] = {}
    with on_every_rank(loop.world, "save"):  # only rank 0 has a controller, whose state may be no plain data
        payload = _collect_common(loop, ranks) if keep else {}
    return payload


def _collect_common(loop: Loop, ranks: list[bytes]) -> dict[str, Any]:
    """The payload of `collect`; ``ranks``: what each rank has of its own, as saved bytes."""
    parts, grown = loop.parts, loop.grown
    payload: dict[str, Any] = {
        "format": FORMAT,
        "kind": KIND,
        "settings": to_plain(parts.config),
        "topology": {slot: to_plain(site) for slot, site in grown.sites.items()},
        "copies": {slot: to_plain(info) for slot, info in (grown.copies or {}).items()},
        "memory": grown.heard,
        "run_state": to_plain(loop.state),
        "step": loop.steps,
        "epoch": loop.epochs,
        "model": tree_map_only(
            Tensor, lambda t: t.to("cpu", copy=True), to_saveable(grown.model.state_dict(), "model")
        ),
        "ema": collect_average(loop),
        **collect_user_parts(loop.adopted, parts.controller, parts.controller_plain),
        "ranks": [torch.load(io.BytesIO(raw), weights_only=True) for raw in ranks],
    }
    payload["optimizer"]["state"] = to_saveable(loop.owner.state_by_name(), "optimizer")
    return payload


@contextlib.contextmanager
def on_every_rank(world: World, what: str) -> Iterator[None]:
    """An error that one rank has within the block becomes an error of all; called on every rank, without collectives
    inside.

    Raises:
        CheckpointError: on a rank whose own block went well; names the other ranks and their errors.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    texts = world.gather_text("" if own is None else one_line(own), what=what)
    if own is not None:
        raise own
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
    if failed:
        raise CheckpointError(f"{what} failed on {'; '.join(failed)}")


OWN_KEYS = {"rng", "window", "health", "overflows", "tallies", "heard"}


def _collect_own(loop: Loop) -> dict[str, Any]:
    """The state that only this rank has: `OWN_KEYS`."""
    return {
        "rng": rng_state(loop.world.device),
        "window": loop.window.state(),
        "health": loop.owner.health.state(),
        "overflows": dict(loop.adopted.overflows),
        "tallies": {slot: holder.tally.state() for slot, holder in loop.grown.slots.items()},
        "heard": {slot: holder.heard.state() for slot, holder in loop.grown.slots.items()},
    }


def load(loop: Loop, payload: Mapping[str, Any], where: str) -> None:
    """Puts a session into the state of a payload of `collect`; seeds that have grown since are removed first.

    On another number of ranks each rank takes the counts of several saved ranks, or none, and its random numbers come
    from a stream keyed by (seed, rank, step).

    Raises:
        CheckpointError: the payload does not fit this session. Nothing was changed then, unless the shape of a tensor
            did not fit.
    """
    try:
        with on_every_rank(loop.world, "load"):  # ranks may read different files, and only rank 0 has a controller
            state = _check_payload(loop, payload, where)
    except Exception:
        loop.follow(force=True)  # nothing has changed but the wrapper, which is gone
        raise
    with loop.order.changing("session.load_state_dict()"):
        with on_every_rank(loop.world, "load"):
            _load(loop, payload, where, state)
        shake_hands(loop.world, describe_seeds(loop.world, loop.grown, state, loop.growth.build, loop.growth.dtype))
    loop.follow(force=True)


def _load(loop: Loop, payload: Mapping[str, Any], where: str, state: RunState) -> None:
    grown, adopted, owner, world = loop.grown, loop.adopted, loop.owner, loop.world
    loop.parts.evaluator.continue_anew(loop.state)
    loop.growth.clear()
    loop.growth.plant_record(state)
    load_weights(grown, payload["model"], where)
    adopted.load_host_groups(payload["optimizer"]["groups"])
    owner.load_by_name(payload["optimizer"]["state"])
    for part, saved in ((adopted.scheduler, payload["scheduler"]), (adopted.scaler, payload["scaler"])):
        if part is not None:
            part.load_state_dict(saved)
    loop.state, loop.steps, loop.epochs = state, payload["step"], payload["epoch"]
    controller = loop.parts.controller
    if controller is not None:
        controller.load_state_dict(payload["controller"]["state"])
    ranks = payload["ranks"]
    counted = ranks[min(world.rank, len(ranks) - 1)]
    loop.window.load(counted["window"])
    owner.health.load(counted["health"], world.device)
    adopted.overflows = dict(counted["overflows"])
    taken = ranks[world.rank :: world.size]  # the saved ranks whose counts this rank takes
    for slot, holder in grown.slots.items():
        holder.tally.load(_sum_counts([own["tallies"][slot] for own in taken]))
    if len(ranks) == world.size:
        set_rng_state(ranks[world.rank]["rng"], world.device)
    else:
        loop.window.take_sums(_sum_counts([own["window"]["_sums"] for own in taken]))
        seed_rank(loop.config.seed, world.rank, loop.steps)
    load_average(loop, payload)
    loop.growth.restage(state)
    for slot, holder in grown.slots.items():
        holder.heard.load(_sum_counts([own["heard"][slot] for own in taken]))


def _sum_counts(counts: list[Tensor | None]) -> Tensor | None:
    """Sums up the counts of several saved ranks, so that the present ranks together have all of them."""
    present = [count for count in counts if count is not None]
    return torch.stack(present).sum(0) if present else None


def _check_payload(loop: Loop, payload: Mapping[str, Any], where: str) -> RunState:
    """Checks that a payload fits the session, and returns its record."""
    check_layout(payload, where)
    for rank, own in enumerate(payload["ranks"]):
        if set(own) != OWN_KEYS:
            missing, unknown = sorted(OWN_KEYS - set(own)), sorted(set(own) - OWN_KEYS)
            raise CheckpointError(f"{where}: ranks[{rank}]: missing {missing or 'none'}, unknown {unknown or 'none'}")
    differing = _differences(to_plain(loop.config), payload["settings"], "")
    if differing:
        raise CheckpointError(f"{where}: saved under other settings: {'; '.join(differing[:5])}")
    if list(payload["topology"]) != list(loop.grown.sites):
        raise CheckpointError(f"{where}: its slots are not this model's ({', '.join(loop.grown.slots)})")
    host = {name for name in loop.grown.model.state_dict() if not name.startswith(f"{CONTAINER}.")}
    saved = {name for name in payload["model"] if not name.startswith(f"{CONTAINER}.")}
    if host != saved:
        raise CheckpointError(
            f"{where}: host weights: missing {sorted(host - saved)[:5] or 'none'}, "
            f"unknown {sorted(saved - host)[:5] or 'none'}"
        )
    for name, part in (("scheduler", loop.adopted.scheduler), ("scaler", loop.adopted.scaler)):
        if (part is None) != (payload[name] is None):
            have = (
                f"has a {name} and the session has none" if part is None else f"has no {name} and the session has one"
            )
            raise CheckpointError(f"{where}: it {have}; pass {name}= as it was then")
    if loop.parts.controller is not None and payload["controller"]["config"] != loop.parts.controller_plain:
        raise CheckpointError(f"{where}: saved with another controller; pass controller= as it was then")
    check_average(loop, payload, where)
    try:
        return from_plain(RunState, payload["run_state"], "run_state")
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


_OPERATIONAL = (".control.timeout_s", ".control.slow_timeout_s", ".control.startup_timeout_s")


def _differences(present: Any, saved: Any, path: str) -> list[str]:
    """The settings that differ, without operational ones, a line each."""
    if path in _OPERATIONAL:
        return []
    if isinstance(present, dict) and isinstance(saved, dict):
        keys = dict.fromkeys([*present, *saved])
        return [line for key in keys for line in _differences(present.get(key), saved.get(key), f"{path}.{key}")]
    return [] if present == saved else [f"{path[1:]} was {saved!r}, is {present!r}"]


# from a file ---------------------------------------------------------------------------------------------------------


def rebuild_host(payload: Mapping[str, Any], host: nn.Module, where: str) -> Grown:
    """Attaches the recorded slots and loads the host's weights; `load` plants the seeds.

    Raises:
        CheckpointError: the host is not the recorded one.
    """
    try:
        sites = {slot: from_plain(Site, payload["topology"][slot], slot) for slot in sort_slots(payload["topology"])}
    except ValueError as error:
        raise CheckpointError(f"{where}: topology: {error}") from error
    grown = attach_described(host, sites)
    grown.copies = {slot: from_plain(BlueprintInfo, info, f"copies.{slot}") for slot, info in payload["copies"].items()}
    grown.heard = payload["memory"]
    host_weights = {name: t for name, t in payload["model"].items() if not name.startswith(f"{CONTAINER}.")}
    load_weights(grown, host_weights, where)
    return grown


def rebuild_optimizer(payload: Mapping[str, Any], host: nn.Module, where: str) -> torch.optim.Optimizer:
    """Builds the recorded optimizer, if it is one of torch's.

    Raises:
        CheckpointError: its class is not torch's, or a recorded parameter is not the host's.
    """
    record = payload["optimizer"]
    module, _, name = record["class"].rpartition(".")
    if not module.startswith("torch.optim") or not hasattr(torch.optim, name):
        raise CheckpointError(f"{where}: its optimizer is a {record['class']}; pass optimizer=lambda model: ...")
    parameters = dict(host.named_parameters())
    groups = []
    for index, group in enumerate(record["groups"]):
        missing = [name for name in group["names"] if name not in parameters]
        if missing:
            raise CheckpointError(f"{where}: optimizer group {index} holds {missing[0]}, which the host has not")
        groups.append({**group["options"], "params": [parameters[name] for name in group["names"]]})
    return getattr(torch.optim, name)(groups)
