"""Whether a blueprint of sequences or signals lets one position see another, as declared and as tried."""

import torch
from torch import Tensor, nn

from esper.kasmina.axes.positions import CAUSAL, Mixing
from esper.kasmina.blueprints.entry import Blueprint
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Reach, Topology

_DIM, _LENGTH = 8, 4


def mixes(entry: Blueprint) -> bool:
    """Whether it is declared to: its class is a `Mixing`."""
    return issubclass(entry.factory, Mixing)


def reach_of(where: str, factory: type[nn.Module], topology: Topology, declared: Reach | None) -> Reach | None:
    """Which positions a blueprint mixes, as declared, or as its topology and class tell; None where neither says.

    Args:
        where: what an error calls the blueprint.
        factory: its class.
        topology: axes of its features.
        declared: as registered.

    Raises:
        ConfigError: declared and class contradict each other.
    """
    alone = topology is Topology.VECTOR or (topology.has_length and not issubclass(factory, Mixing))
    if declared is None:
        return Reach.POINT if alone else None
    if topology is not Topology.FEATURE_MAP and alone is not (declared is Reach.POINT):
        kind = "sees one position at a time" if alone else "is a Mixing"
        raise ConfigError(f"{where}: reach = {declared.name}, but it {kind}; correct one of them")
    return declared


def _reached(entry: Blueprint) -> list[list[bool]] | None:
    """By changed position, which positions of the delta differ; None where a small seed cannot run on this machine."""
    axis = entry.topology.value.index("T")
    with undisturbed(seed=0), torch.device("cpu"), torch.no_grad():
        try:
            seed: nn.Module = entry.build(max(_DIM, entry.min_dim)).eval()
            shape = [2 if a == "B" else _LENGTH if a == "T" else max(_DIM, entry.min_dim) for a in entry.topology.value]
            x = torch.randn(shape)
            told = (CAUSAL,) if mixes(entry) else ()
            before, reached = seed(x, *told), []
            for at in range(_LENGTH):
                varied = x.clone()
                varied.select(axis, at).neg_().add_(1.0)
                after: Tensor = seed(varied, *told)
                apart = (before - after).abs().movedim(axis, 0).flatten(1).amax(1)
                reached.append((apart > 1e-6).tolist())
        except Exception:  # whatever is wrong with it shows at its birth, by name
            return None
    return reached


def check_mixing(entry: Blueprint) -> None:
    """Tries a small seed: positions must not see others unless it says so, and never later ones where told so.

    Raises:
        ConfigError: they do.
    """
    reached = _reached(entry) if entry.topology.has_length else None
    where = f"blueprint {entry.name!r} ({entry.topology.value})"
    for at, positions in enumerate(reached or ()):
        if not mixes(entry) and any(changed for other, changed in enumerate(positions) if other != at):
            raise ConfigError(f"{where}: positions see each other; make it a Mixing (esper.kasmina.blueprints)")
        if any(positions[:at]):
            raise ConfigError(f"{where}: positions see later ones though they are told that the host is causal")
