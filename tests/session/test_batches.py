"""Evidence from a user's batches: the naive computation, shares that add up, looks that are functions of their key."""

import copy
import dataclasses
from collections.abc import Iterable

import pytest
import torch
from torch.utils.data import DataLoader, Subset, SubsetRandomSampler, TensorDataset

from esper.accord.config import GateConfig
from esper.accord.lifecycle import ProbeRequest
from esper.kasmina.slots.confidence import evaluating
from esper.leyline.errors import ConfigError
from esper.leyline.events import WorthMeasured
from esper.session.batches import Batches
from tests.support.sessions import A, B, batch, host, loss, make, of, probe, train

REQUEST = ProbeRequest(look=1, shares=4, alpha=0.7, aim="G2", draw="1")


def dataset(size: int = 40) -> TensorDataset:
    return TensorDataset(*batch(7, size))


def samples(batches: Batches, units: Iterable[int], rank: int = 0, world: int = 1) -> list[float]:
    return [float(x.flatten()[0]) for xs, _ in batches.share(units, rank, world) for x in xs]


def test_the_evidence_is_that_of_two_forwards_by_hand():
    session = make()
    train(session, range(7))
    grown, evaluator = session.grown, session.parts.evaluator
    before = torch.get_rng_state()
    found = evaluator.probe_sums(A, REQUEST, session.config.gates)
    assert torch.equal(torch.get_rng_state(), before)
    assert grown.model.training
    units, places = evaluator.probe.draw_look(1, 4, 0, 1, "probe", 0, A, REQUEST.draw)
    assert (len(units), places.tolist()) == (2, [0] * 8 + [1] * 8)
    grown.model.eval()
    differences = []
    with torch.no_grad():
        for unit in units:
            one = probe()[unit]
            with grown.override({A: 0.0}):
                without = loss(grown.model, one)[0]
            with grown.override({A: 0.7}):
                differences.append(without - loss(grown.model, one)[0])
    d = torch.cat(differences).double()
    assert (found["clusters"], found["count"], found["size_sq"]) == (2, 16, 128), "a batch of a list is a cluster"
    by_batch = torch.stack([one.double().sum() for one in differences])
    for power, name in ((1, "total"), (2, "total_sq"), (3, "total_cube")):
        assert found[name] == pytest.approx(float((by_batch**power).sum()), rel=1e-12)
    assert d.abs().max() > 0


@pytest.mark.parametrize("source", ["statistics", "probe"])
def test_each_arm_has_running_statistics_of_the_same_batches_on_every_rank(source: str):
    training = [batch(index, 8) for index in range(5)]
    session = make(host(batch_norm=True), **({"statistics": training} if source == "statistics" else {}))
    train(session, range(7))
    grown, evaluator = session.grown, session.parts.evaluator
    gates = dataclasses.replace(session.config.gates, statistics_samples=24)
    kept = {name: buffer.clone() for name, buffer in grown.model.named_buffers()}
    alone = evaluator.probe_sums(A, REQUEST, gates)
    of = evaluator.statistics.draw_units(24, "statistics", 0, A, REQUEST.draw, REQUEST.look)
    values = []
    for alpha in (0.0, 0.7):  # by hand: torch's average over batches, in a copy
        twin = copy.deepcopy(grown.model)
        norm, seed = twin.get_submodule("1"), twin.get_submodule(f"esper_slots.{A}")
        norm.momentum = None
        norm.reset_running_stats()
        seed.override(alpha)
        with torch.no_grad():
            for unit in of:
                twin.train()((training if source == "statistics" else probe())[unit][0])
            drawn, _ = evaluator.probe.draw_look(1, 4, 0, 1, "probe", 0, A, REQUEST.draw)
            values.append(torch.cat([loss(twin.eval(), probe()[unit])[0] for unit in drawn]))
    assert len(of) == 3
    assert alone["total"] == pytest.approx(float((values[0] - values[1]).sum()), rel=1e-9)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in grown.model.named_buffers())
    shares = []
    for evaluator.world.rank in range(2):
        evaluator.world.size = 2
        shares.append(evaluator.probe_sums(A, REQUEST, gates)["total"])
    evaluator.world.rank, evaluator.world.size = 0, 1
    assert sum(shares) == pytest.approx(alone["total"], rel=1e-12)
    grown.model.eval()  # who trains in eval() keeps the statistics as they are
    with evaluating(grown.model), grown.override({A: 0.7}):
        within = torch.cat([loss(grown.model, probe()[unit])[0] for unit in drawn])
    with evaluating(grown.model), grown.override({A: 0.0}):
        without = torch.cat([loss(grown.model, probe()[unit])[0] for unit in drawn])
    frozen = evaluator.probe_sums(A, REQUEST, gates)["total"]
    assert frozen == pytest.approx(float((without - within).sum()), rel=1e-9)


def test_a_loader_gives_whole_batches_that_augment_alike_everywhere():
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            x, y = super().__getitem__(index)
            return x + torch.randn(()), y

    batches = Batches(DataLoader(Noisy(*batch(7, 40)), 8, shuffle=True), "statistics")
    seen = []
    for stream in (1, 2):
        torch.manual_seed(stream)
        seen.append([x for x, _ in batches.whole(21, "key")])
    assert [len(x) for x in seen[0]] == [8, 8]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("source", ["loader", "list"])
def test_shares_of_all_ranks_and_looks_are_the_whole_once(source: str):
    whole = dataset()
    batches = Batches(DataLoader(whole, 8, shuffle=True) if source == "loader" else list(DataLoader(whole, 8)), "probe")

    def units(look: int, shares: int, rank: int = 0, world: int = 1, key: int = 1) -> list[int]:
        return batches.draw_look(look, shares, rank, world, "key", key)[0]

    alone = units(1, 1)
    assert sorted(alone) == list(range(40 if source == "loader" else 5))
    assert units(1, 1, key=2) != alone
    assert [unit for look in (1, 2, 3) for unit in units(look, 3)] == alone
    for world in (2, 3, 5):
        assert [unit for rank in range(world) for unit in units(1, 1, rank, world)] == alone
    assert len(set(samples(batches, alone))) == 40


def test_a_cluster_that_the_user_names_is_never_split():
    patients = [i // 3 for i in range(40)]
    batches = Batches(DataLoader(dataset(), 8), "probe", cluster=patients)
    assert len(batches.clusters) == 14
    seen: list[int] = []
    for look in range(1, 5):
        for rank in range(3):
            units, places = batches.draw_look(look, 4, rank, 3, 1)
            assert [patients[unit] for unit in units] == [patients[units[places.tolist().index(p)]] for p in places]
            seen += sorted({patients[unit] for unit in units})
    assert sorted(seen) == sorted(set(patients)), "each patient on one rank in one look"


def test_what_a_list_is_drawn_in_and_counted_by_is_the_users_to_say():
    gates = GateConfig(probe_samples=16, min_samples=8, reserve=0.0)
    batched, singly = (Batches(probe(), "probe", cluster=cluster) for cluster in (None, "sample"))
    assert (batched.plan(gates).clusters, singly.plan(gates).clusters) == (8, 64)
    assert batched.plan(gates).looks == singly.plan(gates).looks == 4
    assert singly.draw_look(1, 4, 0, 1, 1)[1] is None
    assert Batches(probe(), "probe", cluster=list("aabbccdd")).plan(gates).clusters == 4
    assert batched.fingerprint() != singly.fingerprint()
    with pytest.raises(ConfigError, match=r"cluster: 3 values for 8 samples or batches of probe; give one for each"):
        Batches(probe(), "probe", cluster=[1, 2, 3])
    with pytest.raises(ConfigError, match=r"cluster = 'patient': expected 'sample', or one value for each"):
        Batches(probe(), "probe", cluster="patient")


def test_a_loader_with_a_sampler_of_a_part_shows_that_part_alone():
    whole = dataset()
    part = Batches(DataLoader(whole, 8, sampler=SubsetRandomSampler([3, 5, 8])), "probe")
    assert sorted(samples(part, [0, 1, 2])) == sorted(float(whole[i][0].flatten()[0]) for i in (3, 5, 8))
    assert Batches(DataLoader(Subset(whole, range(9)), 4), "probe").samples == 9


def test_a_source_is_told_by_its_ends_and_leaves_the_random_stream_alone():
    before = torch.get_rng_state()
    one, same = Batches(DataLoader(dataset(), 8, shuffle=True), "probe"), Batches(DataLoader(dataset(), 4), "probe")
    assert one.fingerprint() == same.fingerprint()
    assert one.fingerprint() != Batches(DataLoader(dataset(39), 8), "probe").fingerprint()
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_drawn_from_is_refused():
    with pytest.raises(ConfigError, match="probe: it is empty"):
        Batches([], "probe")
    with pytest.raises(ConfigError, match="probe: a batch without a tensor"):
        Batches([{"text": "no tensor"}], "probe")
    with pytest.raises(ConfigError, match="validation = generator: it has no length"):
        Batches((b for b in probe()), "validation")


def test_validation_is_measured_where_it_is_given():
    session = make(actions=(), validation=probe()[:3])
    train(session, range(2))
    model = session.grown.model.eval()
    with torch.no_grad():
        values = torch.cat([loss(model, one)[0] for one in probe()[:3]])
    reading = session.state.validation_loss
    assert reading.n == 24
    assert reading.value == pytest.approx(float(values.mean()), rel=1e-12)
    assert make(host(), actions=()).state.validation_loss.value is None


def test_seeds_are_attributed_on_the_validation_batches_that_a_tick_names():
    held_out = [batch(500 + index, 8) for index in range(6)]
    session = make(validation=held_out, control={"attribute_every": 8, "timeout_s": 20.0, "slow_timeout_s": 20.0})
    train(session, range(15))
    session.loss(batch(15)).backward()
    units = session._loop.parts.evaluator.validation.draw_units(16, "worth", 0, 7)
    measured = {}
    evaluate = session._loop.parts.evaluator.worth_sums

    def by_hand(plan, gates, tick):
        levels = dict(plan.levels)
        with torch.no_grad():
            for on in ((), (A,), (B,), (A, B)):
                with session.grown.override({slot: levels[slot] if slot in on else 0.0 for slot in (A, B)}):
                    values = [loss(session.grown.model.eval(), held_out[unit])[0] for unit in units]
                    measured[on] = float(torch.cat(values).mean())
        session.grown.model.train()
        return evaluate(plan, gates, tick)

    session._loop.parts.evaluator.worth_sums = by_hand
    session.step()
    a, b = of(session, WorthMeasured)
    none, one, two, both = (measured[on] for on in ((), (A,), (B,), (A, B)))
    assert [(event.tick, event.slot, event.worth.solo.n) for event in (a, b)] == [(8, A, 16), (8, B, 16)]
    assert (a.worth.solo.value, b.worth.solo.value) == pytest.approx((none - one, none - two), abs=1e-9)
    left_out = a.worth.leave_one_out.value, b.worth.leave_one_out.value
    assert left_out == pytest.approx((two - both, one - both), abs=1e-9)
    assert a.worth.shapley.value + b.worth.shapley.value == pytest.approx(none - both, abs=1e-9)
    assert a.together.value == pytest.approx(none - both, abs=1e-9)
    assert session.state.slot(A).worth == a.worth
    session.close()


def test_attribution_needs_validation_and_a_loss():
    control = {"attribute_every": 5, "timeout_s": 20.0, "slow_timeout_s": 20.0}
    with pytest.raises(ConfigError, match="attribute_every: seeds are measured by loss= on validation=; pass both"):
        make(control=control)
