"""A host that works in place computes and learns bit for bit as its twin without it does, whatever grows in it."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.compiler import Compiler
from esper.kasmina.export.exporter import export
from esper.kasmina.flops import host_cost
from esper.kasmina.hosts.custom import CustomHostConfig
from esper.kasmina.slots.confidence import confident
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Operator
from esper.leyline.plain import to_plain
from esper.leyline.stages import Stage
from esper.tolaria.growth.staging import Unfit, check_forward
from tests.support.bitwise import bits
from tests.support.in_place import KINDS, C, ask, images, twins
from tests.support.sessions import GATES
from tests.support.tiny import act, make_engine, schedule, tiny_config
from tests.support.tiny import bits as digests
from tests.support.working_seeds import born, set_to_work

SITES = {"r0c0": "site"}
LEVELS = [(Phase.BLEND, 0.0), (Phase.BLEND, 0.5), (Phase.BLEND, 1.0), (Phase.STRAIGHT, 0.0)]
every_kind = pytest.mark.parametrize("kind", KINDS)


def grown_twins(kind: str) -> tuple[Grown, Grown]:
    one, other = (esper.attach(model, SITES, images()) for model in twins(kind))
    return one, other


def plant(grown: Grown, operator: Operator = Operator.ADD, blueprint: str = "conv_light") -> Any:
    set_to_work(grown, "r0c0", born(grown, "r0c0", blueprint), 0.0, operator)
    return grown.slots["r0c0"]


def seat(grown: Grown, phase: Phase, alpha: float, operator: Operator) -> None:
    """As a record would: before blending a gated operator is ADD."""
    holder = grown.slots["r0c0"]
    holder.phase, blended = phase, phase is Phase.BLEND
    holder.operator = operator if blended or not operator.is_gated else Operator.ADD
    holder.set_alpha(alpha)


def learnt(grown: Grown, call: Any = None) -> dict[str, Tensor]:
    """Output and every gradient of one step, in train()."""
    model = grown.model.train()
    model.zero_grad()
    torch.manual_seed(4)
    x = images()
    with confident(grown, x):
        output = (call or model)(x)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **found}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert bits(one[name], other[name]), name


@pytest.mark.parametrize("operator", Operator)
@every_kind
def test_outputs_and_gradients_are_the_twin_s(kind: str, operator: Operator) -> None:
    one, other = grown_twins(kind)
    bare = learnt(one)
    same(bare, learnt(other))
    for grown in (one, other):
        plant(grown, operator)
    for phase, alpha in LEVELS:
        for grown in (one, other):
            seat(grown, phase, alpha, operator)
        found = learnt(one)
        same(found, learnt(other))
        if alpha == 0.0:
            same({name: found[name] for name in bare}, bare)
    for grown in (one, other):
        seat(grown, Phase.OFF, 0.0, operator)
    shadow = [learnt(g, lambda x, g=g: g.incubate("r0c0", x)) for g in (one, other)]
    same(*shadow)
    assert all(name == "output" or name.startswith("esper_slots") for name in shadow[0])
    for grown in (one, other):
        seat(grown, Phase.BLEND, 0.5, operator)
    with torch.no_grad():
        for alphas in (0.0, 1.0, torch.tensor([1.0, 0.0, 0.0, 0.5])):
            outputs = []
            for grown in (one, other):
                with grown.override({"r0c0": alphas}), confident(grown, images()):
                    outputs.append(grown.model.eval()(images()))
            assert bits(*outputs), alphas


@every_kind
def test_what_is_measured_at_the_start_is_the_twin_s_and_leaves_the_batch_alone(kind: str) -> None:
    batch = images()
    one, other = (esper.attach(model, SITES, batch) for model in twins(kind))
    assert host_cost(one, batch) == host_cost(other, batch)
    assert one.parameters_without_gradient(batch) == other.parameters_without_gradient(batch) == []
    assert bits(batch, images()), "a dry run works on a copy"


@every_kind
def test_it_is_exported_to_the_twin_s_bits(kind: str) -> None:
    outputs = []
    for grown in grown_twins(kind):
        holder = plant(grown)
        holder.phase = Phase.BLEND
        holder.set_alpha(1.0)
        grown.model.eval()
        outputs += [export(grown, fold=False).module(images()), grown.model(images())]
    assert bits(outputs[0], outputs[1])
    assert bits(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", ["block", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("add", "input"))])
def test_compiled_regions_behind_a_site_work_in_place(kind: str) -> None:
    results = []
    for grown in grown_twins(kind):
        compiler = Compiler(grown, "aot_eager", train_sizes=(4,), eval_sizes=(4,))
        compiler.host(images())
        assert set(compiler.regions) == {"block"}
        holder = grown.slots["r0c0"]
        seed = born(grown, "r0c0")
        holder.plant(seed, compiler.stage("r0c0", seed))
        steps = []
        for phase, alpha in LEVELS[:3]:
            holder.phase = phase
            holder.set_alpha(alpha)
            steps.append(learnt(grown))
        holder.phase = Phase.OFF
        steps.append(learnt(grown, lambda x, g=grown: g.incubate("r0c0", x)))
        assert not compiler.take_degraded()
        results.append(steps)
    for one, other in zip(*results, strict=True):
        same(one, other)


def test_a_seed_that_writes_into_its_input_is_no_seed() -> None:
    """Its input is the host's feature, which alpha 0 must leave as it is."""
    site = grown_twins("relu")[0].sites["r0c0"]
    for in_place in (False, True):
        seed = nn.Sequential(nn.ReLU(inplace=in_place), nn.Conv2d(C, C, 1))
        check = partial(check_forward, seed, site, "own", dtype=torch.float32, device=torch.device("cpu"))
        if in_place:
            with pytest.raises(Unfit, match=r"^own writes into its input, the host's feature: work on a copy"):
                check()
        else:
            check()


def batches(start: int, count: int) -> list[tuple[Tensor, Tensor]]:
    stream = torch.Generator().manual_seed(start)
    labels = [torch.randint(3, (8,), generator=stream) for _ in range(count)]
    return [(torch.randn(8, 1, 6, 6, generator=stream) + y.view(-1, 1, 1, 1) * 0.7, y) for y in labels]


LIFE = [
    act(1, "r0c0", "GERMINATE", blueprint="conv_light", ticks=1),
    act(3, "r0c0", "ADVANCE"),
    act(5, "r0c0", "ADVANCE"),
    act(7, "r0c0", "ADVANCE"),
    act(8, "r0c0", "FOSSILIZE"),
]


def lived(model: nn.Module, incubation: str) -> tuple[dict[str, str], list[float], Any]:
    """A user's loop through the life of one seed: weights at the end, losses, the stage reached."""
    torch.manual_seed(6)
    grown = esper.attach(model, SITES, images())
    session = esper.Session(
        grown,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        controller={"kind": "schedule", "actions": LIFE},
        loss=ask,
        probe=batches(9, 4),
        every=2,
        gates=GATES,
        slots={"incubation": incubation},
    )
    losses = []
    for batch in session.epoch(batches(5, 20)):
        loss = session.loss(batch)
        loss.backward()
        session.step()
        losses.append(loss.item())
    stage = session.state.slot("r0c0").stage
    session.close()
    return digests(model.state_dict().items()), losses, stage


@pytest.mark.parametrize("incubation", ["immediate", "ste", "shadow"])
@pytest.mark.parametrize("kind", ["relu", "add", "input"])
def test_a_life_in_a_session_is_the_twin_s(kind: str, incubation: str) -> None:
    one, other = twins(kind)
    found = lived(one, incubation)
    assert found == lived(other, incubation)
    assert found[2] is Stage.FOSSILIZED


@pytest.mark.parametrize("kind", ["norm", "input"])
def test_a_run_is_the_twin_s(kind: str, tmp_path: Path) -> None:
    found = []
    for in_place in (True, False):
        host = CustomHostConfig(
            path="tests.support.in_place:build", options={"kind": kind, "in_place": in_place}, sites=SITES
        )
        config = tiny_config("cnn", host=host, trainer__steps=20, controller=schedule(*LIFE))
        engine = make_engine(config, tmp_path / str(in_place))
        engine.begin(None)
        engine.run()
        assert engine.state.slot("r0c0").stage is Stage.FOSSILIZED
        found.append((digests(engine.grown.model.state_dict().items()), to_plain(engine.state)))
    assert found[0] == found[1]
