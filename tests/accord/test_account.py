"""The account of training FLOPs against torch's own counter, on every host, with and without seeds."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.accord.account import moved_lately, probe_flops, step_flops, validation_flops
from esper.kasmina.flops import host_cost
from esper.kasmina.hosts import ResNet20Config
from esper.leyline.events import TickDone
from esper.run.start.costs import build_costs
from tests.support.tiny import act, events, make_engine, schedule, tiny_config

LIFE = {
    "cnn": [
        act(1, "r0c0", "GERMINATE", blueprint="conv_light", ticks=2),
        act(2, "r1c0", "GERMINATE", blueprint="bottleneck", ticks=2),
        act(4, "r0c0", "ADVANCE"),
        act(5, "r1c0", "ADVANCE"),
        act(6, "r0c0", "ADVANCE"),
        act(9, "r0c0", "ADVANCE"),
        act(9, "r1c0", "ADVANCE"),
        act(10, "r0c0", "FOSSILIZE"),
        act(12, "r1c0", "PRUNE"),
    ],
    "gpt": [
        act(1, "r0c0", "GERMINATE", blueprint="attention", ticks=2),
        act(2, "r1c0", "GERMINATE", blueprint="mlp", ticks=2),
        act(4, "r0c0", "ADVANCE"),
        act(5, "r1c0", "ADVANCE"),
        act(6, "r0c0", "ADVANCE"),
        act(9, "r1c0", "ADVANCE"),
    ],
}


@pytest.mark.parametrize(
    ("task", "incubation"), [("cnn", "shadow"), ("cnn", "ste"), ("gpt", "shadow"), ("resnet20", "shadow")]
)
def test_every_step_of_a_life_costs_what_the_counter_counts_within_two_percent(task, incubation, tmp_path):
    host = {"host": ResNet20Config(width=4)} if task == "resnet20" else {}
    kind = task.replace("resnet20", "cnn")
    config = tiny_config(
        kind,
        controller=schedule(*LIFE[kind]),
        slots__incubation=incubation,
        trainer__steps=28,
        control__validate_every=99,
        **host,
    )
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    ratios, firsts, kinds = [], [], set()
    while engine.step < 28:
        costs = engine.terms.costs
        assert costs is not None
        wanted = 10 * step_flops(engine.state.slots, costs, config.slots)
        kinds.add(tuple(entry.stage.name for entry in engine.state.slots))
        with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
            engine.train_step()
        ratio = wanted / counter.get_total_flops()
        beginning = any(s.stage.is_blended and s.alpha(engine.step - 1) == 0.0 for s in engine.state.slots)
        (firsts if beginning else ratios).append(ratio)
        if engine.tick_due():
            engine.tick()
    assert len(kinds) >= 6, kinds
    assert max(ratios) <= 1.02, ratios
    assert min(ratios) >= 0.98, ratios
    assert min(firsts) >= 0.98, firsts  # at alpha 0 no gradient passes the seed: the account says up to a pass too much


def test_the_account_adds_up_steps_probes_and_seeds_that_were_pruned(tmp_path):
    config = tiny_config("cnn", controller=schedule(*LIFE["cnn"]), trainer__steps=28, telemetry__level="full")
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    assert engine.state.flops is None
    result = engine.run()
    ticks = events(engine).of(TickDone)
    spent = [tick.flops for tick in ticks]
    assert spent == sorted(spent)
    assert result.flops == spent[-1]
    assert result.samples == 28 * 10
    bare = 28 * 10 * (engine.terms.costs.host.forward + engine.terms.costs.host.backward)
    assert result.flops > 1.5 * bare


def test_a_run_without_growth_costs_the_host_alone(tmp_path):
    engine = make_engine(tiny_config("cnn"), tmp_path)
    engine.begin(None)
    result = engine.run()
    host = engine.terms.costs.host
    assert result.flops == result.samples * (host.forward + host.backward)


def test_counting_leaves_the_model_its_buffers_and_the_random_streams_as_they_were(tmp_path):
    engine = make_engine(tiny_config("cnn", host=ResNet20Config(width=4)), tmp_path)
    model = engine.grown.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream = torch.get_rng_state()
    example = engine.bundle.example()
    cost = host_cost(engine.grown, example)
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        model(example).sum().backward()
    assert cost.forward + cost.backward == counter.get_total_flops() // len(example)
    downs = [cost.down_to[slot] for slot in cost.down_to]
    assert max(downs) < cost.backward
    assert downs == sorted(downs, reverse=True)  # later slots are nearer to the output


def test_running_statistics_taken_anew_are_charged_on_every_rank_that_takes_them(tmp_path):
    life = schedule(*LIFE["cnn"])
    engine = make_engine(tiny_config("cnn", controller=life, host=ResNet20Config(width=2)), tmp_path)
    engine.begin(None)
    costs, seen = engine.terms.costs, set()
    assert costs is not None
    assert costs.statistics == 64
    assert build_costs(engine.grown, engine.bundle.example(), 3 * 17).statistics == 3 * 17
    while engine.step < 28:
        engine.train_step()
        if not engine.tick_due():
            continue
        slots, state = engine.state.slots, engine.state
        for entry in slots:
            if entry.request is not None:
                with FlopCounterMode(display=False) as counter:
                    count = engine.evaluator.probe_sums(entry.slot, entry.request, engine.terms.gates)["count"]
                assert counter.get_total_flops() == probe_flops(slots, costs, {entry.slot: int(count)})
                seen.add("probe")
        moved = moved_lately(slots, state.tick, engine.step, engine.terms.tick_steps)
        with FlopCounterMode(display=False) as counter:
            engine.evaluator.validation_sums(engine.terms.gates.statistics_samples if moved else 0)
        plain = len(engine.bundle.validation) * validation_flops(slots, replace(costs, statistics=1))
        anew = validation_flops(slots, costs) if moved else 0
        present = all(s.alpha(engine.step - 1) > 0 for s in slots if s.stage.is_blended)
        assert not present or counter.get_total_flops() == plain + anew
        seen.add(("moved", moved, present))
        engine.tick()
    assert seen >= {"probe", ("moved", True, True), ("moved", False, True)}


@pytest.mark.parametrize("task", ["cnn", "gpt"])
def test_a_probe_costs_what_the_counter_counts_and_shares_what_comes_before_its_slot(task, tmp_path):
    engine = make_engine(tiny_config(task, controller=schedule(*LIFE[task]), control__validate_every=99), tmp_path)
    engine.begin(None)
    probed = set()
    while engine.step < 20:
        engine.train_step()
        if not engine.tick_due():
            continue
        for entry in engine.state.slots:
            if entry.request is None:
                continue
            with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
                count = engine.evaluator.probe_sums(entry.slot, entry.request, engine.terms.gates)["count"]
            costs = engine.terms.costs
            assert costs is not None
            assert counter.get_total_flops() == probe_flops(engine.state.slots, costs, {entry.slot: int(count)})
            twice = 2 * (costs.host.forward + sum(costs.seed(s).forward for s in engine.state.slots if s.blueprint))
            assert counter.get_total_flops() < count * twice
            probed.add((entry.slot, entry.stage.name, any(s.stage.is_blended for s in engine.state.slots)))
        engine.tick()
    assert {blended for _, _, blended in probed} == {False, True}, probed
    assert {slot for slot, _, _ in probed} == {"r0c0", "r1c0"}
