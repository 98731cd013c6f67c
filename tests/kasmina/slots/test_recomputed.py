"""A host whose activations are computed again in backward learns bit for bit what its twin does that keeps them.

What a forward depends on besides its tensors, the alphas that are overridden, the class logits handed in and the frozen
weights of a shadow forward, must be there when a part of it runs a second time, after the forward has returned.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.kasmina.compiler import Compiler
from esper.kasmina.export.exporter import export
from esper.kasmina.flops import host_cost
from esper.kasmina.hosts.custom import CustomHostConfig
from esper.kasmina.slots.confidence import confident
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError
from esper.leyline.stages import Stage
from esper.tolaria.ranks.computed import Computation
from tests.support.bitwise import bits
from tests.support.checkpointed import FORMS, SITES, ask, sequences, twins
from tests.support.sessions import GATES
from tests.support.tiny import act, make_engine, schedule, tiny_config
from tests.support.tiny import bits as digests
from tests.support.working_seeds import born, set_to_work

LEVELS = [(Phase.BLEND, 0.0), (Phase.BLEND, 0.5), (Phase.BLEND, 1.0), (Phase.STRAIGHT, 0.0)]
PLACES = [
    pytest.param(form, place, marks=[] if form in FORMS[:2] else [pytest.mark.slow])
    for form in FORMS
    for place in SITES
]
everywhere = pytest.mark.parametrize(("form", "place"), PLACES)
pytestmark = pytest.mark.filterwarnings("error:None of the inputs have requires_grad")


class Dropping(nn.Module):
    """A seed that draws random numbers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.map(nn.functional.dropout(x, 0.4, self.training)))


def grown_twins(
    form: str, place: str, operator: Operator = Operator.ADD, *, draws: bool = False
) -> tuple[Grown, Grown]:
    made = []
    for model in twins(form):
        grown = esper.attach(model, {"r0c0": SITES[place]}, sequences())
        torch.manual_seed(8)
        seed = Dropping(grown.sites["r0c0"].dim) if draws else born(grown, "r0c0")
        set_to_work(grown, "r0c0", seed, 0.0, operator)
        made.append(grown)
    return made[0], made[1]


def seat(grown: Grown, phase: Phase, alpha: float, operator: Operator = Operator.ADD) -> None:
    """As a record would: before blending a gated operator is ADD."""
    holder = grown.slots["r0c0"]
    holder.phase, blended = phase, phase is Phase.BLEND
    holder.operator = operator if blended or not operator.is_gated else Operator.ADD
    holder.set_alpha(alpha)


def value(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum()


def gradients(grown: Grown, loss: Tensor) -> dict[str, Tensor]:
    grown.model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in grown.model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def learnt(grown: Grown, call: Any = None) -> dict[str, Tensor]:
    """Loss and every gradient of one step, in train(), backward far outside of the forward's surroundings."""
    model = grown.model.train()
    torch.manual_seed(4)
    with confident(grown, sequences()):
        output = (call or model)(sequences())
    return gradients(grown, value(output))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert bits(one[name], other[name]), name


@pytest.mark.parametrize("operator", Operator)
@everywhere
def test_outputs_and_gradients_are_the_twin_s(form: str, place: str, operator: Operator) -> None:
    one, other = grown_twins(form, place, operator)
    for phase, alpha in LEVELS:
        for grown in (one, other):
            seat(grown, phase, alpha, operator)
        same(learnt(one), learnt(other))


@pytest.mark.parametrize("draws", [False, True])
@everywhere
def test_a_shadow_reaches_its_seed_and_nothing_else(form: str, place: str, draws: bool) -> None:
    """The host's gradient of the same backward has the bits that it has without the shadow."""
    one, other = grown_twins(form, place, draws=draws)
    for grown in (one, other):
        seat(grown, Phase.OFF, 0.0)
    bare = learnt(one)
    assert not any(name.startswith("esper_slots") for name in bare)
    before = digests(one.model.state_dict().items())
    both = []
    for grown in (one, other):
        torch.manual_seed(4)
        loss = value(grown.model(sequences()))
        torch.manual_seed(4)
        found = gradients(grown, loss + grown.shadow_loss("r0c0", lambda call: value(call(sequences()))))
        both.append(found)
        same({name: found[name] for name in bare if name != "loss"}, {n: g for n, g in bare.items() if n != "loss"})
    same(*both)
    assert digests(one.model.state_dict().items()) == before
    same(*(learnt(grown, lambda x, g=grown: g.incubate("r0c0", x)) for grown in (one, other)))


@everywhere
def test_a_seed_that_draws_moves_no_number_of_the_host_at_alpha_0(form: str, place: str) -> None:
    one, other = grown_twins(form, place, draws=True)
    seat(one, Phase.OFF, 0.0)
    bare = learnt(one)
    for phase, alpha in LEVELS:
        for grown in (one, other):
            seat(grown, phase, alpha)
        found = learnt(one)
        same(found, learnt(other))
        if alpha == 0.0:
            same({name: found[name] for name in bare}, bare)


@pytest.mark.parametrize("operator", [Operator.ADD, Operator.CONFIDENCE])
@pytest.mark.parametrize("form", FORMS)
def test_forwards_whose_backward_comes_later_keep_their_own_surroundings(form: str, operator: Operator) -> None:
    """Three forwards under different overrides and logits, a shadow among them, and one backward of their sum."""
    results = []
    for grown in grown_twins(form, "inside", operator):
        seat(grown, Phase.BLEND, 0.5, operator)
        torch.manual_seed(4)
        total = torch.zeros(())
        for alphas, scale in (({}, 1.0), ({"r0c0": 0.25}, 2.0), ({"r0c0": 0.0}, 1.0), ({}, 3.0)):
            logits = scale * torch.randn(4, 3, generator=torch.Generator().manual_seed(int(scale)))
            with grown.override(alphas), grown.logits(logits):
                total = total + scale * value(grown.model(sequences()))
            if scale == 2.0 and operator is Operator.ADD:
                total = total + grown.shadow_loss("r0c0", lambda call: value(call(sequences())))
        with grown.disabled():
            results.append(gradients(grown, total))
        # A block that is called by hand afterwards goes by what is in force now, not by what was recalled.
        block, x = grown.model.eval().blocks[1], torch.ones(4, 3, 8)
        with grown.logits(torch.ones(4, 3)):
            now = block(x)
            grown.slots["r0c0"].uproot()
            assert not bits(now, block(x))
    same(*results)


@everywhere
def test_flops_count_what_is_computed_again(form: str, place: str) -> None:
    """The reentrant form computes three blocks again; the default one stops before the last layer of a segment."""
    one, other = (esper.attach(model, {"r0c0": SITES[place]}, sequences()) for model in twins(form))
    found, plain = host_cost(one, sequences()), host_cost(other, sequences())
    layer = 2 * 8 * 16 * 3
    layers = {"default": 3, "reentrant": 6, "closure": 3, "nested": 6}[form]
    assert found.forward == plain.forward
    assert found.backward == plain.backward + layers * layer
    hidden = form == "reentrant" and place in ("inside", "whole")  # what is above passes a gradient on only from below
    assert found.down_to["r0c0"] >= plain.down_to["r0c0"]
    assert (found.down_to["r0c0"] == found.backward) == hidden
    assert one.parameters_without_gradient(sequences()) == []


@pytest.mark.parametrize("form", FORMS)
def test_what_ranks_compare_is_the_twin_s(form: str) -> None:
    found = []
    for model in twins(form):
        computation = Computation(model, lambda model=model: model(sequences()))
        found.append([digests(computation.run(mode).items()) for mode in ("train", "eval")])
        assert computation.error is None
        assert all(parameter.grad is None for parameter in model.parameters())
    assert found[0] == found[1]
    assert any(name.startswith("gradient of blocks.1") for name in found[0][0])


@pytest.mark.parametrize("form", FORMS[:2])
def test_it_is_exported_to_the_twin_s_bits(form: str) -> None:
    outputs = []
    for grown in grown_twins(form, "inside"):
        seat(grown, Phase.BLEND, 1.0)
        plain = export(grown, fold=False).module
        assert bits(plain.eval()(sequences()), grown.model.eval()(sequences()))
        torch.manual_seed(4)
        outputs.append(plain.train()(sequences()))
        value(outputs[-1]).backward()
        outputs.append(plain.blocks[1].norm.weight.grad)
    assert bits(outputs[:2], outputs[2:])


def test_a_second_backward_through_a_shadow_is_refused_in_plain_words() -> None:
    grown, _ = grown_twins("default", "behind")
    seat(grown, Phase.OFF, 0.0)
    loss = grown.shadow_loss("r0c0", lambda call: value(call(sequences())))
    loss.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="second backward through the loss of a seed that incubates in a shadow"):
        loss.backward()


def test_a_shadow_loss_may_read_what_the_forward_left_in_the_model() -> None:
    """An auxiliary loss in an attribute of a module; and outputs in containers come out as they are."""

    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.site, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            y = checkpoint(self.site, x, use_reentrant=False)
            self.extra = y.square().mean()
            return {"logits": self.head(y), "kept": (y, None, "word")}

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    grown = esper.attach(Leaving(), {"r0c0": "site"}, x)
    set_to_work(grown, "r0c0", born(grown, "r0c0"), 0.0)
    seat(grown, Phase.OFF, 0.0)
    model = grown.model
    found = gradients(
        grown, grown.shadow_loss("r0c0", lambda call: call(x)["logits"].square().mean() + 2.0 * model.extra)
    )
    output = grown.incubate("r0c0", x)
    assert output["kept"][1:] == (None, "word")
    seat(grown, Phase.BLEND, 1.0)
    wanted = gradients(grown, model(x)["logits"].square().mean() + 2.0 * model.extra)
    same(found, {name: wanted[name] for name in found})
    assert len(found) > 1
    assert all(name == "loss" or name.startswith("esper_slots") for name in found)


@pytest.mark.parametrize(
    ("form", "backend"),
    [
        ("default", "eager"),
        pytest.param("default", "aot_eager", marks=pytest.mark.slow),
        pytest.param("reentrant", "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_compiled_regions_are_computed_again_too(form: str, backend: str) -> None:
    results = []
    for grown in grown_twins(form, "whole"):
        holder = grown.slots["r0c0"]
        seed = holder.seed
        holder.uproot()
        compiler = Compiler(grown, backend, train_sizes=(4,), eval_sizes=(4,))
        compiler.host(sequences())
        assert {"blocks.0", "blocks.1", "blocks.2"} == set(compiler.regions)
        holder.plant(seed, compiler.stage("r0c0", seed))
        steps = []
        for phase, alpha in LEVELS[:3]:
            seat(grown, phase, alpha)
            steps.append(learnt(grown))
        seat(grown, Phase.OFF, 0.0)
        steps.append(learnt(grown, lambda x, g=grown: g.incubate("r0c0", x)))
        assert not compiler.take_degraded()
        results.append(steps)
    for one, other in zip(*results, strict=True):
        same(one, other)


def batches(start: int, count: int) -> list[tuple[Tensor, Tensor]]:
    stream = torch.Generator().manual_seed(start)
    labels = [torch.randint(3, (8,), generator=stream) for _ in range(count)]
    return [(torch.randn(8, 3, 5, generator=stream) + y.view(-1, 1, 1) * 0.7, y) for y in labels]


def life(blueprint: str, operator: Operator) -> list[dict[str, Any]]:
    return [
        act(1, "r0c0", "GERMINATE", blueprint=blueprint, ticks=2, operator=operator.name),
        act(3, "r0c0", "ADVANCE"),
        act(5, "r0c0", "ADVANCE"),
        act(8, "r0c0", "ADVANCE"),
        act(9, "r0c0", "FOSSILIZE"),
    ]


def lived(model: nn.Module, place: str, incubation: str, operator: Operator) -> tuple[dict[str, str], list[float], Any]:
    """A user's loop through the life of one seed: weights at the end, losses, the stage reached."""
    torch.manual_seed(6)
    grown = esper.attach(model, {"r0c0": SITES[place]}, sequences())
    session = esper.Session(
        grown,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        controller={"kind": "schedule", "actions": life("mlp_small", operator)},
        loss=ask,
        probe=batches(9, 4),
        every=2,
        gates=GATES,
        slots={"incubation": incubation, "channels": {"r0c0": ",".join(["0.5"] * grown.sites["r0c0"].dim)}},
        class_logits=True,
    )
    losses = []
    for batch in session.epoch(batches(5, 22)):
        loss = session.loss(batch)
        loss.backward()
        session.step()
        losses.append(loss.item())
    stage = session.state.slot("r0c0").stage
    session.close()
    return digests(model.state_dict().items()), losses, stage


@functools.cache
def lived_plainly(place: str, incubation: str, operator: Operator) -> tuple[dict[str, str], list[float], Any]:
    """The life of the twin that keeps all: one for every form."""
    return lived(twins("plain")[1], place, incubation, operator)


@pytest.mark.parametrize(
    ("incubation", "operator"),
    [
        ("shadow", Operator.CONFIDENCE),
        ("immediate", Operator.CONFIDENCE),
        ("ste", Operator.GATE),
        *(pytest.param(i, o, marks=pytest.mark.slow) for i in ("shadow", "immediate", "ste") for o in Operator),
    ],
)
@pytest.mark.parametrize("place", ["inside", "behind"])
@pytest.mark.parametrize("form", FORMS[:2])
def test_a_life_in_a_session_is_the_twin_s(form: str, place: str, incubation: str, operator: Operator) -> None:
    found = lived(twins(form)[0], place, incubation, operator)
    assert found == lived_plainly(place, incubation, operator)
    assert found[2] is Stage.FOSSILIZED


@pytest.mark.parametrize("form", FORMS[:2])
def test_a_run_is_the_twin_s_but_for_its_flops(form: str, tmp_path: Path) -> None:
    found = []
    for each in (form, "plain"):
        host = CustomHostConfig(
            path="tests.support.checkpointed:build", options={"form": each}, sites={"r0c0": SITES["inside"]}
        )
        actions = life("mlp_small", Operator.ADD)
        config = tiny_config("cnn", host=host, trainer__steps=20, controller=schedule(*actions))
        engine = make_engine(config, tmp_path / each)
        engine.begin(None)
        engine.run()
        assert engine.state.slot("r0c0").stage is Stage.FOSSILIZED
        found.append((digests(engine.grown.model.state_dict().items()), engine.state))
    assert found[0][0] == found[1][0]
    assert found[0][1].flops > found[1][1].flops
