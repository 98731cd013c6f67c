"""Checks a seed before it is planted; a seed that fails gets this rank's veto, with the reason.

Nothing here registers anything, and no random stream of the process moves.
"""

import torch
from torch import Tensor, nn

from esper.accord.effects import Veto
from esper.kasmina.births import DamagedEntry, MissingEntry
from esper.kasmina.blueprints import registry
from esper.kasmina.slots.sites import Site
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import EsperError


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
    count = sum(parameter.numel() for parameter in seed.parameters())
    wanted = registry.info(site.topology, blueprint, site.dim, site.positions).parameters
    if count != wanted:
        raise Unfit(f"{blueprint} has {count} parameters, its formula says {wanted}")
    if not all(bool(torch.isfinite(parameter).all()) for parameter in seed.parameters()):
        raise NotFinite(f"{blueprint} is not finite at birth")


def check_forward(seed: nn.Module, site: Site, blueprint: str, *, dtype: torch.dtype, device: torch.device) -> None:
    """Runs one forward of one sample of ones, in train mode.

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
    with torch.no_grad(), undisturbed(device):
        x = torch.ones(1, *site.shape, dtype=dtype, device=device)
        delta = seed(x)
        if not isinstance(delta, Tensor):
            raise Unfit(f"{blueprint} returns {type(delta).__name__}, not a tensor")
        if delta.shape != x.shape or delta.dtype != x.dtype:
            raise Unfit(f"{blueprint} maps {tuple(x.shape)} {x.dtype} to {tuple(delta.shape)} {delta.dtype}")
        if not bool(torch.isfinite(delta).all()):
            raise NotFinite(f"{blueprint} is not finite at birth: of ones it makes {_first_nonfinite(delta)}")


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
