"""A seed's size at birth: in proportion to the features at its site, agreed, the same after a restore; no jump."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.blueprints import registry
from esper.kasmina.blueprints.parts import LAYER_SCALE_INIT
from esper.kasmina.slots.grown import Grown
from esper.leyline.alpha import Operator
from esper.leyline.events import BirthVetoed, Fault
from esper.leyline.topology import Topology
from esper.tolaria.growth import size
from tests.support.sessions import EVERY, A, host, loss, make, probe, train
from tests.support.tiny import act, bits, make_engine, schedule, tiny_config

SHAPES = {
    Topology.FEATURE_MAP: (8, 12, 6, 6),
    Topology.SEQUENCE: (8, 10, 12),
    Topology.SIGNAL: (8, 12, 10),
    Topology.VECTOR: (64, 12),
}
BUILT_IN = [(topology, info.name) for topology, shape in SHAPES.items() for info in registry.catalogue(topology, 12, 9)]


@pytest.mark.parametrize(("topology", "blueprint"), [each for each in BUILT_IN if each[1] != "noop"])
def test_every_blueprint_is_born_small_against_features_of_any_size(topology: Topology, blueprint: str):
    ratios, factors = [], []
    x = torch.randn(SHAPES[topology], generator=torch.Generator().manual_seed(0))
    for features in (0.01, 1.0, 100.0):
        for operator, found in ((Operator.ADD, ratios), (Operator.MULTIPLY, factors)):
            seed = build_seed(
                blueprint, dim=12, topology=topology, key=birth_key(1, "r0c0", 1), dtype=torch.float32, device="cpu"
            )
            size.set_size(seed, operator, features)
            with torch.no_grad():
                delta = seed(features * x)
            ratio = delta.norm() / (features * x).norm()
            found.append(ratio.item() if operator is Operator.ADD else delta.std().item())
    for found in (ratios, factors):
        assert min(found) > 0.0005, found
        assert max(found) <= 0.13, found
    if blueprint != "attention" or topology is not Topology.FEATURE_MAP:  # a gain by tanh, which saturates
        assert max(ratios) / min(ratios) < 1.2, ratios  # an eps of a norm is felt at 0.01
        assert max(factors) / min(factors) < 1.2, factors


def gamma(grown: Grown, slot: str) -> Tensor:
    seed = grown.slots[slot].seed
    assert seed is not None
    return seed.scale.gamma.detach().clone()


def test_it_is_a_tenth_of_the_rms_of_the_features_that_training_forwards_had(tmp_path: Path):
    life = schedule(
        act(1, "r0c0", "GERMINATE", blueprint="conv_light"),
        act(1, "r1c0", "GERMINATE", operator="MULTIPLY", blueprint="norm"),
    )
    engine = make_engine(tiny_config("cnn", controller=life, trainer__accumulate=2), tmp_path)
    engine.begin(None)
    seen: list[Tensor] = []
    site = engine.grown.model.get_submodule(engine.grown.sites["r0c0"].module)
    spent = []
    while engine.state.tick < 3:
        listening, before = engine.state.tick == 1, engine.state
        handle = site.register_forward_hook(lambda *call: seen.append(call[2].detach().clone())) if listening else None
        engine.train_step()
        if handle is not None:
            handle.remove()
        if engine.tick_due():
            engine.tick()
            spent.append(engine.state.flops - (before.flops or 0))
    assert len(seen) == 4
    by_hand = torch.cat(seen).double().square().mean().sqrt().item()
    assert gamma(engine.grown, "r0c0") == pytest.approx(LAYER_SCALE_INIT * by_hand, rel=1e-6)
    assert by_hand < 0.9
    assert gamma(engine.grown, "r1c0") == pytest.approx(LAYER_SCALE_INIT, rel=1e-6)
    assert not engine.grown.slots["r0c0"].heard.listening
    costs = engine.terms.costs
    assert costs is not None
    seeds = [costs.seeds[slot][name].forward for slot, name in (("r0c0", "conv_light"), ("r1c0", "norm"))]
    assert spent[0] == spent[1] == 20 * (costs.host.forward + costs.host.backward)
    assert spent[2] == spent[1] + 32 * sum(2 * costs.host.forward + seed for seed in seeds)


def test_a_seed_that_moves_the_loss_is_refused_by_name_and_nothing_has_changed(monkeypatch):
    alone = make(host(), actions=())
    train(alone, range(12))
    quiet = size.set_size

    def loud(seed: nn.Module, operator: Operator, features: float, share: float) -> None:
        quiet(seed, operator, 3000 * features, share)

    monkeypatch.setattr(size, "set_size", loud)
    session = make(host(), actions=[act(2, A, "GERMINATE", blueprint="norm")])
    train(session, range(12))
    (refused,) = [event for event in session.events if isinstance(event, BirthVetoed)]
    assert (refused.reason, refused.slot) == ("MOVES_LOSS", A)
    (told,) = [event.what for event in session.events if isinstance(event, Fault)]
    assert "norm moves the loss of 16 probe samples from" in told
    assert "gates.birth_k_se = 3 standard errors" in told
    assert session.grown.slots[A].seed is None
    assert bits(session.grown.model.named_parameters()) == bits(alone.grown.model.named_parameters())


def test_a_restore_between_staging_and_entry_comes_to_the_same_bits(tmp_path: Path):
    session = make(host())
    train(session, range(EVERY + 1))  # staged at the first tick, one step of the second behind it
    assert session.state.slot(A).staged is not None
    session.save(tmp_path / "s.pt")
    heard = session.grown.slots[A].heard.state()
    assert heard is not None
    assert heard[0] == 8
    train(session, range(EVERY + 1, 2 * EVERY))
    session.close()
    again = esper.Session.restore(tmp_path / "s.pt", host, loss=loss, probe=probe())
    train(again, range(EVERY + 1, 2 * EVERY))
    wanted, found = gamma(session.grown, A), gamma(again.grown, A)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, torch.full_like(found, LAYER_SCALE_INIT))


def test_a_slot_whose_site_has_not_run_waits(tmp_path: Path):
    engine = make_engine(
        tiny_config("cnn", controller=schedule(act(1, "r0c0", "GERMINATE", blueprint="norm"))), tmp_path
    )
    engine.begin(None)
    while engine.state.tick < 4:
        engine.train_step()
        if engine.tick_due():
            if engine.state.tick in (1, 2):
                engine.grown.slots["r0c0"].heard.listen(True)  # as if no forward had passed
            engine.tick()
            staged = engine.state.slot("r0c0").staged is not None
            assert staged == (engine.state.tick in (1, 2, 3))
