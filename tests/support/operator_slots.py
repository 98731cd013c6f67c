"""Slots that a test calls by hand, under every operator: seed, gate, vector and class logits from fixed streams."""

import torch
from torch import Tensor, nn

from esper.kasmina.axes.site import Site
from esper.kasmina.births.build import birth_key, build_gate, build_seed, gate_key
from esper.kasmina.slots.beat import Beat
from esper.kasmina.slots.slot import Phase, SeedSlot
from esper.leyline.alpha import Operator
from esper.leyline.topology import Topology

C, B, K = 8, 3, 4
SHAPES = {
    Topology.FEATURE_MAP: (B, C, 3, 3),
    Topology.SEQUENCE: (B, 5, C),
    Topology.SIGNAL: (B, C, 5),
    Topology.VECTOR: (B, C),
}
V = (1.0, 0.5, 0.0, 0.25, 0.0, 1.0, 0.75, 0.125)  # CHANNEL's vector, with exact zeros


def features(topology: Topology, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random features of a topology."""
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[topology], generator=stream, dtype=torch.float64).to(dtype)


def born(topology: Topology, name: str, dtype: torch.dtype, fill: float | None = None) -> nn.Module:
    """A seed at birth, or with every weight set to ``fill``."""
    seed = build_seed(name, dim=C, topology=topology, key=birth_key(3, "r0c0", 1), dtype=dtype, device="cpu")
    if fill is not None:
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.fill_(fill)
    return seed


def equip(slot: SeedSlot, operator: Operator, fades_from: Operator | None = None) -> None:
    """Gives a planted slot what its operators need: logits, a vector, a gate in the seed's dtype."""
    assert slot.site is not None
    assert slot.beat is not None
    assert slot.seed is not None
    slot.operator, slot.fades_from = operator, fades_from
    slot.set_channels(V if Operator.CHANNEL in (operator, fades_from) else None)
    logits = torch.randn(B, K, generator=torch.Generator().manual_seed(5))
    slot.beat.logits = 2 * logits if Operator.CONFIDENCE in (operator, fades_from) else None
    if Operator.GATE in (operator, fades_from):
        dtype = next((p.dtype for p in slot.seed.parameters()), torch.float32)
        site = slot.site
        slot.gate = build_gate(
            dim=site.dim, topology=site.topology, key=gate_key(3, "r0c0", 1, 0), dtype=dtype, device="cpu"
        )


def joined(
    topology: Topology,
    seed: nn.Module,
    operator: Operator,
    *,
    alpha: float = 0.0,
    phase: Phase = Phase.BLEND,
    fades_from: Operator | None = None,
    fade: float = 1.0,
) -> SeedSlot:
    """A slot outside of any model that holds ``seed`` and joins it by ``operator``."""
    shape = SHAPES[topology]
    slot = SeedSlot("r0c0", Site(slot="r0c0", module="", topology=topology, dim=C, shape=shape[1:]), Beat())
    slot.plant(seed)
    slot.phase = phase
    equip(slot, operator, fades_from)
    slot.set_alpha(alpha, fade)
    return slot
