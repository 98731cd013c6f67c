"""A compiled grown model: the contracts hold, a life compiles each seed once, and nothing else is ever compiled."""

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.births.build import birth_key, build_gate, build_seed
from esper.kasmina.compiler import Compiler
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.regions import region_of
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError
from esper.leyline.events import BirthVetoed, CommandRefused, Fault, StageChanged
from esper.leyline.stages import Incubation
from esper.leyline.topology import Topology
from esper.tolaria.training.engine import Engine
from tests.support.bitwise import bits as same_bits
from tests.support.tiny import act, events, make_engine, schedule, tiny_config

C = 8
A, B = "r0c0", "r1c0"


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)  # one kernel each: not compiled
        self.site = nn.Sequential(nn.Conv2d(C, C, 1), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.site(self.below(x)))


def compiled(backend: Any = "eager", **more: Any) -> tuple[Grown, Compiler, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(4, C, 5, 5)
    grown = attach(Stack(), {A: "site"}, x)
    compiler = Compiler(grown, backend, train_sizes=(4,), eval_sizes=(4,), **more)
    compiler.host(x)
    return grown, compiler, x


def born(weights: float | None = None) -> nn.Module:
    key = birth_key(3, A, 1)
    seed = build_seed("conv_small", dim=C, topology=Topology.FEATURE_MAP, key=key, dtype=torch.float32, device="cpu")
    if weights is not None:
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.fill_(weights)
    return seed


def plant(grown: Grown, compiler: Compiler | None, seed: nn.Module, operator: Operator = Operator.ADD) -> None:
    region = None if compiler is None else compiler.stage(A, seed, operator)
    grown.slots[A].plant(seed, region)
    grown.slots[A].phase, grown.slots[A].operator = Phase.BLEND, operator
    if operator is Operator.GATE:
        grown.slots[A].gate = build_gate(dim=C, topology=Topology.FEATURE_MAP, key=1, dtype=torch.float32, device="cpu")
        if compiler is not None:
            compiler.follow()


def gradients(grown: Grown, x: Tensor) -> dict[str, Tensor]:
    """Output, and the gradients of everything."""
    x = x.clone().requires_grad_()
    grown.model.zero_grad()
    output = grown.model(x)
    output.backward(torch.linspace(-2, 2, output.numel()).view_as(output))
    named = dict(grown.model.named_parameters())
    assert x.grad is not None
    return {"output": output, "x": x.grad, **{name: p.grad for name, p in named.items() if p.grad is not None}}


BROKEN = [(float("inf"), Operator.ADD), (None, Operator.MULTIPLY)]
ALL = [(w, o) for w in (None, float("inf"), float("nan")) for o in (Operator.ADD, Operator.MULTIPLY, Operator.GATE)]


@pytest.mark.parametrize(
    ("backend", "cases"),
    [
        ("aot_eager", BROKEN),
        pytest.param("eager", ALL, marks=pytest.mark.slow),
        pytest.param("aot_eager", ALL, marks=pytest.mark.slow),
        pytest.param("inductor", ALL, marks=pytest.mark.slow),
    ],
)
def test_at_alpha_0_output_and_host_gradient_are_those_of_the_compiled_host_bit_for_bit(
    backend: str, cases: list[tuple[float | None, Operator]]
) -> None:
    grown, compiler, x = compiled(backend)
    wanted = gradients(grown, x)
    for weights, operator in cases:
        plant(grown, compiler, born(weights), operator)
        region = grown.slots[A].region
        assert region is not None
        assert region.graphs == 3
        found = gradients(grown, x)
        for name, tensor in wanted.items():
            assert same_bits(found[name], tensor), (name, weights, operator)
        for name, parameter in grown.slots[A].named_parameters():
            assert parameter.grad is not None, name
            assert weights is not None or not parameter.grad.any(), "live and empty"
        leaf = x.clone().requires_grad_()
        feature = leaf.view_as(leaf)
        upstream = torch.linspace(-1, 1, x.numel()).view_as(x).clone()
        upstream.view(-1)[:2] = torch.tensor([-0.0, 0.0])
        grown.slots[A](feature, feature).backward(upstream)
        assert same_bits(leaf.grad, upstream), "the sign of a zero"
        assert region.graphs == 3
        grown.slots[A].uproot()


@pytest.mark.parametrize(
    ("operator", "backend"),
    [
        (Operator.CONFIDENCE, "eager"),
        *(pytest.param(o, b, marks=pytest.mark.slow) for o in Operator for b in ("eager", "inductor")),
    ],
)
def test_a_ramp_costs_no_compile_and_agrees_with_eager(operator: Operator, backend: str) -> None:
    grown, compiler, x = compiled(backend)
    plain = attach(copy.deepcopy(Stack()), {A: "site"}, x)
    plain.model.load_state_dict(grown.model.state_dict())
    for one in (grown, plain):
        one.slots[A].set_channels([0.125 * c for c in range(C)])
    plant(grown, compiler, born(), operator)
    plant(plain, None, born(), operator)
    region = grown.slots[A].region
    assert region is not None
    graphs = region.graphs
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for alpha in (0.0, 0.1, 0.45, 1.0, 0.6, 0.0):
        for one in (grown, plain):
            one.slots[A].set_alpha(alpha)
        with grown.logits(logits), plain.logits(logits):
            found, wanted = gradients(grown, x), gradients(plain, x)
        assert found.keys() == wanted.keys()
        # A traced graph may sum the gradients of its paths in another order: an error of the size of the terms, not of
        # their sum, which GATE's three paths make small.
        rtol, share = (1e-4, 1e-5) if backend == "inductor" else (1e-5, 1e-6)
        for name, tensor in wanted.items():
            assert torch.allclose(found[name], tensor, rtol=rtol, atol=share * float(tensor.detach().abs().max())), name
    assert region.graphs == graphs == 3
    assert grown.slots[A].degraded is None


def test_a_new_operator_or_gate_is_rehearsed_at_the_tick_and_not_in_a_step() -> None:
    grown, compiler, x = compiled()
    plant(grown, compiler, born())
    slot = grown.slots[A]
    assert slot.region is not None
    assert not compiler.follow()
    slot.operator, slot.fades_from = Operator.MULTIPLY, Operator.ADD
    assert compiler.follow()
    assert slot.region.graphs == 6
    for fade in (0.2, 0.9):
        slot.set_alpha(0.5, fade)
        gradients(grown, x)
    assert slot.region.graphs == 6


def test_ste_has_a_graph_of_its_own() -> None:
    grown, compiler, x = compiled(incubation=Incubation.STE)
    wanted = gradients(grown, x)
    plant(grown, compiler, born())
    slot = grown.slots[A]
    slot.phase = Phase.STRAIGHT
    assert slot.region is not None
    graphs = slot.region.graphs
    found = gradients(grown, x)
    assert same_bits(found["output"], wanted["output"])
    assert all(bool(p.grad is not None and p.grad.any()) for p in slot.parameters())
    assert slot.region.graphs == graphs == 4


def test_what_a_pruned_seed_leaves_behind_is_nothing() -> None:
    grown, compiler, x = compiled()
    plant(grown, compiler, born())
    gradients(grown, x)
    slot = grown.slots[A]
    left = [weakref.ref(slot.seed), weakref.ref(slot.region), weakref.ref(next(slot.parameters()))]
    slot.uproot()
    gc.collect()
    assert [ref() for ref in left] == [None, None, None]


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, pytest.param(lambda m: pickle.loads(pickle.dumps(m)), marks=pytest.mark.slow)]
)
def test_a_copy_of_a_compiled_grown_model_compiles_for_itself(twin: Any) -> None:
    grown, compiler, x = compiled()
    plant(grown, compiler, born())
    grown.slots[A].set_alpha(0.5)
    model = twin(grown.model)
    assert set(model.state_dict()) == set(grown.model.state_dict())
    assert same_bits(model(x), grown.model(x))
    mine = Grown(model, grown.sites).slots[A]
    assert mine.region is not None
    assert mine.region is not grown.slots[A].region
    assert mine.region.owner is mine
    assert region_of(model.site).owner is model.site
    model.double()
    assert torch.allclose(model(x.double()), grown.model(x).double(), atol=1e-6)
    assert mine.degraded is None


@pytest.mark.parametrize("own_regions", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_user_s_own_compile_around_the_model_sees_no_break_and_no_recompile_on_alpha(own_regions: bool) -> None:
    grown, compiler, x = compiled()
    expected_empty = grown.model(x)
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    whole = torch.compile(grown.model, backend=count, fullgraph=True)
    assert torch.equal(whole(x), expected_empty)
    assert len(graphs) == 1
    plant(grown, compiler if own_regions else None, born())
    for alpha in (0.3, 0.0, 0.7, 1.0):
        grown.slots[A].set_alpha(alpha)
        assert torch.equal(whole(x), grown.model(x)), alpha
    assert len(graphs) == 2, "one for the planted seed, none for a tick of alpha"


def test_a_seed_that_falls_back_at_run_time_says_so_and_goes_on_with_the_same_numbers() -> None:
    calls: list[int] = []

    def limited(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        if len(calls) > limit:
            raise RuntimeError("out of registers")
        return graph.forward

    limit = 100
    grown, compiler, x = compiled(limited)
    plant(grown, compiler, born())
    slot = grown.slots[A]
    slot.set_alpha(0.5)
    wanted = grown.model(x)
    assert (compiler.take_degraded(), slot.degraded) == ({}, None)
    limit = len(calls)
    assert torch.allclose(grown.model(x.double().float()[..., :3]), grown.model(x[..., :3]))  # another shape: a compile
    assert slot.degraded is not None
    assert "out of registers" in slot.degraded
    assert set(compiler.take_degraded()) == {A, "site"}
    assert compiler.take_degraded() == {}, "told once"
    assert torch.allclose(grown.model(x), wanted)
    slot.uproot()
    assert slot.degraded is None


# whole lives --------------------------------------------------------------------------------------------------------

# Three seeds: one goes the whole way with a partial target and one back from HOLDING; one is pruned by a ramp; one is
# planted after it.
LIFE = schedule(
    act(1, A, "GERMINATE", blueprint="norm", ticks=2, target=1.0),
    act(2, B, "GERMINATE", blueprint="norm", ticks=1, operator="MULTIPLY"),
    act(3, A, "ADVANCE"),
    act(4, B, "ADVANCE"),
    act(5, A, "ADVANCE"),
    act(6, B, "ADVANCE"),
    act(7, A, "SET_ALPHA_TARGET", target=0.4, ticks=2, curve="LINEAR"),
    act(8, B, "PRUNE", ticks=2, curve="SIGMOID"),
    act(9, A, "SET_ALPHA_TARGET", target=1.0, ticks=1),
    act(11, A, "ADVANCE"),
    act(12, A, "SET_ALPHA_TARGET", target=0.7, ticks=1),
    act(13, A, "SET_ALPHA_TARGET", target=1.0, ticks=2),
    act(15, A, "ADVANCE"),
    act(15, B, "GERMINATE", blueprint="norm", ticks=1),
    act(16, A, "FOSSILIZE"),
    act(17, B, "ADVANCE"),
)
TICKS = 19


def finish(engine: Engine) -> Engine:
    while engine.step < engine.terms.total_steps:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
    return engine


def life(task: str, run_dir: Path, compile_: bool, **settings: Any) -> Engine:
    config = tiny_config(
        task,
        trainer__steps=2 * TICKS,
        trainer__compile=compile_,
        trainer__precision="fp64",
        **{"controller": LIFE, "trainer__compile_backend": "eager", **settings},
    )
    engine = make_engine(config, run_dir)
    engine.begin(None)
    return engine


# Sequences are compiled in test_any_model.py (an encoder) and slots/test_recomputed.py (blocks), too.
@pytest.mark.parametrize("task", ["cnn", pytest.param("gpt", marks=pytest.mark.slow)])
def test_a_life_of_three_seeds_compiles_the_host_once_and_each_seed_once(task: str, tmp_path: Path) -> None:
    torch._dynamo.utils.counters.clear()
    batch = {"trainer__batch": 9 if task == "gpt" else 10}  # no ragged batch of one sample, which is a graph of its own
    engine = life(task, tmp_path / "compiled", True, **batch)
    compiler = engine.growth.compiler
    assert compiler is not None
    host = {name: region.graphs for name, region in compiler.regions.items()}
    assert list(host.values()) == [2, 3], "LEARN and MEASURE; THROUGH behind the first slot"
    seen: dict[int, Any] = {}
    planted: dict[int, set[int]] = {}
    while engine.step < engine.terms.total_steps:
        engine.train_step()
        for holder in engine.grown.slots.values():
            if holder.region is not None:
                seen[id(holder.seed)] = holder.region
                planted.setdefault(id(holder.seed), set()).add(holder.region.graphs)
        if engine.tick_due():
            engine.tick()
    assert len(events(engine).of(StageChanged)) >= 16
    assert events(engine).of(CommandRefused) == events(engine).of(Fault) == []
    assert {name: region.graphs for name, region in compiler.regions.items()} == host, "growth recompiled the host"
    assert list(planted.values()) == [{3}] * 3, "LEARN, THROUGH, MEASURE: all before it was planted, none after"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5 + 3 * 3, "dynamo's own count"
    assert not torch._dynamo.utils.counters["graph_break"]

    eager = finish(life(task, tmp_path / "eager", False, **batch))
    for (name, mine), (other, theirs) in zip(
        engine.grown.model.named_parameters(), eager.grown.model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-9), name
    assert engine.state.validation_loss.value == pytest.approx(eager.state.validation_loss.value, abs=1e-9)


def test_a_seed_that_cannot_be_compiled_is_a_veto_and_one_that_stops_being_so_an_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = schedule(act(1, A, "GERMINATE", blueprint="norm", ticks=1))
    engine = life("cnn", tmp_path, True, controller=short)
    compiler = engine.growth.compiler
    assert compiler is not None
    kept, compiler.backend = compiler.backend, _fails
    while not events(engine).of(BirthVetoed):
        engine.train_step()
        if engine.tick_due():
            engine.tick()
        assert engine.step < 12
    assert engine.grown.slots[A].seed is None
    said = [event.what for event in events(engine).of(Fault)]
    assert len(said) == 1
    assert "the seed for r0c0 cannot be compiled: BackendCompilerFailed" in said[0]
    compiler.backend = kept
    compiler.regions["stages.0"].failure = "for the test"
    while engine.state.tick < 6:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
    said = [event.what for event in events(engine).of(Fault)][1:]
    assert said == ["stages.0 runs without its compiled graph from here on: for the test"]


@pytest.mark.slow
def test_a_compiled_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    settings = {"checkpoint__every_ticks": 1, "checkpoint__keep": 100}
    whole = finish(life("cnn", tmp_path, True, **settings))
    config = tiny_config(
        "cnn",
        trainer__steps=2 * TICKS,
        trainer__compile=True,
        trainer__precision="fp64",
        controller=LIFE,
        trainer__compile_backend="eager",
        **settings,
    )
    for step in (4, 14):  # a staged seed; one in BLENDING and one in its prune ramp
        again = make_engine(config, tmp_path)
        again.begin(step)
        assert again.growth.compiler is not None
        compiled = [report.where for report in again.growth.compiler.reports]
        assert len(compiled) == len(set(compiled)), "each seed once, as the operator that it has wants it"
        finish(again)
        for (name, mine), (_, theirs) in zip(
            whole.grown.model.named_parameters(), again.grown.model.named_parameters(), strict=True
        ):
            assert same_bits(mine, theirs), (step, name)


def _fails(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no such instruction")


def test_an_unknown_backend_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing_like_it"):
        life("cnn", tmp_path, True, trainer__compile_backend="nothing_like_it")


def test_an_export_of_a_compiled_model_is_plain_and_computes_the_same() -> None:
    grown, compiler, x = compiled()
    plant(grown, compiler, born())
    grown.slots[A].set_alpha(1.0)
    plain = grown.export(x, fold=False)
    assert grown.slots[A].region is not None, "the model itself is left as it is"
    assert all(region_of(module) is None for module in plain.modules())
    assert same_bits(plain.eval()(x), grown.model.eval()(x))
