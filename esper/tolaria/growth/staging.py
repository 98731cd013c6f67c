"""Checks a seed before it is planted; a seed that fails gets this rank's veto, with the reason.

Nothing here registers anything, and no random stream of the process moves.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from esper.accord.effects import Veto
from esper.accord.state import RunState
from esper.kasmina.axes.block import OwnBlock
from esper.kasmina.axes.site import Site
from esper.kasmina.births import DamagedEntry, MissingEntry
from esper.kasmina.blueprints import registry
from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import EsperError
from esper.leyline.legality import COPY
from esper.tolaria.ranks.computed import SEED, Computation, describe_computed, digest_twice
from esper.tolaria.ranks.world import World


class Unfit(Exception):
    """A built seed cannot be used; the text says why."""

    veto = Veto.BUILD_FAILED


class NotFinite(Unfit):
    """It holds or returns a number that is not finite."""

    veto = Veto.NONFINITE_AT_BIRTH


def check_weights(seed: nn.Module, site: Site, blueprint: str) -> None:
    """Checks the number of parameters, and that all are finite.

    Raises:
        Unfit: says what is wrong.
    """
    if not isinstance(seed, OwnBlock):
        _check_count(seed, site, blueprint)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in seed.parameters()):
        raise NotFinite(f"{blueprint} is not finite at birth")


def _check_count(seed: nn.Module, site: Site, blueprint: str) -> None:
    count = sum(parameter.numel() for parameter in seed.parameters())
    wanted = registry.info(site.topology, blueprint, site.dim, site.positions).parameters
    if count != wanted:
        raise Unfit(f"{blueprint} has {count} parameters, its formula says {wanted}")


def check_forward(seed: nn.Module, site: Site, blueprint: str, *, dtype: torch.dtype, device: torch.device) -> None:
    """Runs one forward of one sample of ones, in train mode; of a copy of the host's block the host has run it.

    Only the training thread may call it, because it saves and restores the random states.

    Args:
        seed: the seed, on ``device``.
        site: of its slot.
        blueprint: registered name.
        dtype: number format of the features.
        device: device of the seed.

    Raises:
        Unfit: says what is wrong; whatever the forward raises is passed on.
    """
    if isinstance(seed, OwnBlock):
        return
    with torch.no_grad(), undisturbed(device):
        x = torch.ones(1, *site.shape, dtype=dtype, device=device)
        delta = seed(x)
        if x._version:  # whatever was written: a ReLU leaves ones as they are
            raise Unfit(f"{blueprint} writes into its input, the host's feature: work on a copy (inplace=False)")
        if not isinstance(delta, Tensor):
            raise Unfit(f"{blueprint} returns {type(delta).__name__}, not a tensor")
        if delta.shape != x.shape or delta.dtype != x.dtype:
            raise Unfit(f"{blueprint} maps {tuple(x.shape)} {x.dtype} to {tuple(delta.shape)} {delta.dtype}")
        if not bool(torch.isfinite(delta).all()):
            raise NotFinite(f"{blueprint} is not finite at birth: of ones it makes {_first_nonfinite(delta)}")


def computation_of(seed: nn.Module, site: Site, *, dtype: torch.dtype, device: torch.device) -> Computation:
    """One sample of fixed noise through a seed, in train mode, so that ranks can compare what it computes.

    Noise rather than ones: a norm makes zeros of ones, and many functions agree at zero.
    """
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(1, *site.shape, generator=generator).to(device=device, dtype=dtype)
    return Computation(seed, lambda: seed(x.clone()), modes=("train",))


def digest_newborn(world: World, slot: str, seed: nn.Module, site: Site, dtype: torch.dtype) -> int | None:
    """Digests what a seed computes, for the commit that settles its birth; None if ranks cannot compare it."""
    if world.size == 1 or isinstance(seed, OwnBlock):  # of a copy the weights are compared, at its first tick
        return None
    digest = digest_twice(computation_of(seed, site, dtype=dtype, device=world.device))
    if digest is None and world.rank == 0:
        print(
            f"esper: slot {slot}: what the new seed computes does not equal itself when computed twice; ranks do not "
            "compare it",
            file=sys.stderr,
            flush=True,
        )
    return digest


def describe_seeds(
    world: World, grown: Grown, state: RunState, build: Callable[[str, str, int], nn.Module], dtype: torch.dtype
) -> dict[str, str]:
    """Fields for a handshake after a load: what each planted seed computed at its birth, on every rank.

    Args:
        world: the ranks.
        grown: the model.
        state: the agreed record.
        build: builds a seed anew from slot, blueprint and generation.
        dtype: number format of the seeds.
    """
    if world.size == 1:
        return {}
    computations = {}
    for entry in state.slots:
        if entry.stage.has_seed and entry.blueprint not in (None, COPY):  # a copy has come from the host's weights
            assert entry.blueprint is not None
            seed = build(entry.slot, entry.blueprint, entry.generation)
            site = grown.sites[entry.slot]
            computations[f"the seed in {entry.slot}"] = computation_of(seed, site, dtype=dtype, device=world.device)
    return describe_computed(world, computations)


def _first_nonfinite(delta: Tensor) -> float:
    return float(delta[~torch.isfinite(delta)][0])


def veto_of(error: Exception) -> tuple[Veto, str]:
    """This rank's veto for an error while a seed was built or checked, and the reason as text."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, Unfit):
        return error.veto, str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return Veto.OUT_OF_MEMORY, text
    for kind, veto in ((MissingEntry, Veto.LIBRARY_MISSING), (DamagedEntry, Veto.LIBRARY_DAMAGED)):
        if isinstance(error, kind):
            return veto, str(error)
    return Veto.BUILD_FAILED, str(error) if isinstance(error, EsperError) else text
