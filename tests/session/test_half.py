"""Hosts of half precision: seeds and their moments are float32, learn as in a float32 host, are saved and exported."""

from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.precision import seed_dtype
from esper.kasmina.slots.phases import Phase
from esper.leyline.topology import Topology
from tests.support.sessions import A, B, host, loss, make, probe, train

SHAPES = {Topology.FEATURE_MAP: (16, 12, 6, 6), Topology.SEQUENCE: (16, 10, 12), Topology.VECTOR: (64, 12)}
LEARNERS = [
    (Topology.FEATURE_MAP, "conv_small", torch.bfloat16),
    (Topology.SEQUENCE, "mlp_small", torch.bfloat16),
    (Topology.VECTOR, "norm", torch.float16),
]


def learn(topology: Topology, blueprint: str, dtype: torch.dtype) -> tuple[float, float]:
    """Share of the loss that 300 steps of AdamW at 2e-4 leave, and of the weights that they did not move."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Identity()).to(dtype)
    model.register_parameter("unused", nn.Parameter(torch.zeros(1, dtype=dtype), requires_grad=False))
    grown = esper.attach(model, {A: "0"}, torch.randn(SHAPES[topology]).to(dtype), layout={A: topology.value})
    key = birth_key(1, A, 1)
    wide = seed_dtype(dtype)
    seeds = [build_seed(blueprint, dim=12, topology=topology, key=key, dtype=wide, device="cpu") for _ in range(2)]
    with torch.no_grad():
        for parameter in seeds[1].parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    holder = grown.slots[A]
    holder.plant(seeds[0])
    holder.phase = Phase.BLEND
    holder.set_alpha(1.0)
    optimizer = torch.optim.AdamW(seeds[0].parameters(), 2e-4, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in seeds[0].parameters()]
    stream, losses = torch.Generator().manual_seed(0), []
    for _ in range(300):
        x = torch.randn(SHAPES[topology], generator=stream)
        error = (model(x.to(dtype)).float() - x.to(dtype).float() - seeds[1](x).detach()).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        losses.append(error.item())
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    still = sum(int((a == b).sum()) for a, b in zip(before, seeds[0].parameters(), strict=True))
    return losses[-1] / losses[0], still / sum(a.numel() for a in before)


@pytest.mark.parametrize(("topology", "blueprint", "dtype"), LEARNERS)
def test_a_seed_learns_in_half_precision_as_in_float32(topology: Topology, blueprint: str, dtype: torch.dtype):
    wanted, _ = learn(topology, blueprint, torch.float32)
    left, still = learn(topology, blueprint, dtype)
    print(f"{topology} {blueprint} {dtype}: {left:.3f} of the loss left, {wanted:.3f} in float32; unmoved {still:.1%}")
    assert still < 0.001
    assert left == pytest.approx(wanted, abs=0.01)


def dtypes_of(session: esper.Session) -> set[torch.dtype]:
    return {p.dtype for slot in (A, B) for p in session.grown.slots[slot].parameters()}


def test_a_session_keeps_seeds_and_moments_in_float32_through_save_export_and_casts(tmp_path: Path):
    dtype = torch.bfloat16
    session = make(host(dtype=dtype))
    train(session, range(20))
    holder = session.grown.slots[A]
    assert holder.seed is not None
    assert dtypes_of(session) == {torch.float32}
    assert next(session.grown.model.parameters()).dtype is dtype
    moments = [session.optimizer.state[p] for p in holder.parameters()]
    assert moments
    assert {value.dtype for state in moments for value in state.values()} == {torch.float32}
    session.save(tmp_path / "s.pt")
    bits = {name: tensor.clone() for name, tensor in session.grown.model.state_dict().items()}
    again = esper.Session.restore(tmp_path / "s.pt", lambda: host(dtype=dtype), loss=loss, probe=probe(dtype))
    assert all(torch.equal(tensor, bits[name]) for name, tensor in again.grown.model.state_dict().items())
    assert dtypes_of(again) == {torch.float32}
    x = probe(dtype)[0][0]
    plain = session.export(x[:2], partial=True)
    with torch.no_grad():
        wanted = session.grown.model.eval()(x)
        assert plain(x).dtype is dtype
        assert torch.allclose(plain(x).float(), wanted.float(), atol=0.02, rtol=0.02)
    session.grown.model.train()
    seed = [p.detach().clone() for p in holder.parameters()]
    session.to(torch.float32)
    session.to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(seed, holder.parameters(), strict=True))
    assert next(session.grown.model.parameters()).dtype is dtype
    train(session, range(20, 24))
