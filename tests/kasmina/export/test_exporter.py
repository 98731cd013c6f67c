"""A grown model as a plain one: the same outputs and host keys, no class of ours, the grown model left as it was."""

import copy
import dataclasses
from collections import OrderedDict, namedtuple
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from esper.kasmina import blueprints
from esper.kasmina.attach import attach
from esper.kasmina.blueprints.parts import GroupNorm, LayerScale
from esper.kasmina.compiler import Compiler
from esper.kasmina.export.exporter import export
from esper.kasmina.export.record import Way
from esper.kasmina.hosts import CNNConfig, CustomHostConfig, GPTConfig, ResNet20Config, build_host
from esper.kasmina.slots.gating import BlendGate
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.regions import region_of
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError, ExportError
from esper.leyline.topology import Topology
from tests.kasmina.test_any_model import CASES, EVERY, call, normed, pair, run
from tests.support.bitwise import bits
from tests.support.working_seeds import born, grow_all, set_to_work

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def ours(model: nn.Module) -> list[str]:
    """Everything of esper that hangs in a model: classes of modules and of hooks, attributes."""
    found = []
    for name, part in model.named_modules():
        hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        values = [value for key, value in vars(part).items() if not key.startswith("_")]
        for thing in (part, *hooks, *values, *(getattr(value, "func", None) for value in values)):
            if f"{type(thing).__module__} {getattr(thing, '__module__', '')}".find("esper") >= 0:
                found.append(f"{name}: {thing!r}")
        if isinstance(part, fx.GraphModule):
            found += [f"{name}: {node}" for node in part.graph.nodes if "esper" in f"{node.target!r} {node.meta}"]
    return found


def plainly(model: nn.Module, example: Any) -> Any:
    """Output in eval(), fused encoder layers off as in the grown model."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return run(model, example, False, False)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# any model -----------------------------------------------------------------------------------------------------------


@EVERY
def test_an_exported_model_computes_the_same_bits_under_the_hosts_own_keys(case):
    grown, host = pair(case)
    grow_all(grown)
    grown.model.train()
    before, stream = copy.deepcopy(grown.model.state_dict()), torch.get_rng_state()
    hooks = [len(module._forward_hooks) for module in grown.model.modules()]
    exported = export(grown, fold=False)
    assert exported.exact
    assert torch.equal(stream, torch.get_rng_state())
    assert all(module.training for module in grown.model.modules())
    assert [len(module._forward_hooks) for module in grown.model.modules()] == hooks
    assert bits(list(grown.model.state_dict().values()), list(before.values()))
    plain = exported.module
    assert ours(plain) == []
    assert ours(grown.model) != []
    assert type(plain) is type(host)
    assert bits(plainly(plain, case.example), run(grown.model, case.example, False, False))
    state = plain.state_dict()
    assert set(host.state_dict()) <= set(state)
    assert all(bits(state[key], grown.model.state_dict()[key]) for key in host.state_dict())
    assert {key for key, now in exported.keys.items() if now == key} == set(host.state_dict())
    assert set(exported.keys.values()) == set(state)


@EVERY
def test_as_it_is_called_every_day_it_stays_within_rounding_folded_too(case):
    """With fused encoder layers, and in train() where the draws of dropout are the same."""
    grown, _ = pair(case)
    grow_all(grown)
    plain = grown.export()
    expected, got = (run(model, case.example, False, False) for model in (grown.model, plain))
    for x, y in zip(*(out if isinstance(out, tuple) else (out,) for out in (expected, got))):
        assert torch.allclose(x, y, atol=1e-5)
    twin = copy.deepcopy(grown.model)
    expected, got = (run(model, case.example, True, False) for model in (twin, plain))
    for x, y in zip(*(out if isinstance(out, tuple) else (out,) for out in (expected, got))):
        assert torch.allclose(x, y, atol=1e-4)


@EVERY
def test_the_key_map_carries_the_weights_over(case):
    grown, _ = pair(case)
    grow_all(grown)
    exported = export(grown, fold=False)
    with torch.no_grad():
        for parameter in grown.model.parameters():
            parameter.mul_(1.1)
    moved = {exported.keys[key]: value for key, value in grown.model.state_dict().items()}
    exported.module.load_state_dict(moved, strict=True)
    assert bits(plainly(exported.module, case.example), run(grown.model, case.example, False, False))


def test_an_exported_model_learns_moves_is_copied_and_grows_again():
    grown, _ = pair(CASES["sequential with BatchNorm and dropout"])
    grow_all(grown)
    x = CASES["sequential with BatchNorm and dropout"].example
    plain = grown.export()
    plain(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in plain.parameters())
    wide = copy.deepcopy(plain).double()
    assert torch.allclose(wide(x.double()).float(), plain(x), atol=1e-5)
    again = attach(plain, {"r0c0": "4", "r0c1": "6"}, x)
    grow_all(again)
    twice = export(again, fold=False)
    assert [slot.where for slot in twice.slots] == ["grown_2.r0c0", "grown_2.r0c1"]
    assert bits(twice.module(x), again.model.eval()(x))


# containers ----------------------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["feature", "rest"])


@dataclasses.dataclass(frozen=True)
class Record:
    feature: Tensor
    rest: int


PACKS = {
    "tuple": (lambda x: (x, 1), lambda out: out[0]),
    "namedtuple": (lambda x: Pair(x, 1), lambda out: out.feature),
    "list": (lambda x: [1, x], lambda out: out[1]),
    "dict": (lambda x: {"a": 1, "b": x}, lambda out: out["b"]),
    "OrderedDict": (lambda x: OrderedDict(a=1, b=x), lambda out: out["b"]),
    "dataclass": (lambda x: Record(x, 1), lambda out: out.feature),
}


class Packing(nn.Module):
    def __init__(self, pack: Any, unpack: Any) -> None:
        super().__init__()
        self.site, self.last, self.unpack = nn.Module(), nn.Linear(4, 2), unpack
        self.site.linear = nn.Linear(4, 4)
        self.site.forward = lambda x: pack(self.site.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.unpack(self.site(x)))


@pytest.mark.parametrize("name", PACKS)
def test_a_feature_goes_back_into_whatever_container_it_came_in(name):
    grown = grow_all(attach(Packing(*PACKS[name]), {"r0c0": "site"}, normal(3, 4)))
    exported = export(grown, fold=False)
    assert bits(exported.module(normal(3, 4)), grown.model.eval()(normal(3, 4)))
    given = grown.model.get_submodule(CONTAINER)["r0c0"]
    given.override(0.0)
    assert not bits(exported.module(normal(3, 4)), grown.model(normal(3, 4)))


# our own hosts -------------------------------------------------------------------------------------------------------

IMAGES = normal(3, 3, 8, 8)
TOKENS = torch.arange(24).view(3, 8)
HOSTS = {
    "cnn": (CNNConfig(widths=[4, 8]), IMAGES),
    "resnet20": (ResNet20Config(width=4), IMAGES),
    "gpt": (GPTConfig(layers=2, heads=2, dim=16, block=12, sites=["block", "attention", "mlp"]), TOKENS),
}


def hosted(name: str, dtype: torch.dtype = torch.float32) -> tuple[Grown, Tensor]:
    config, example = HOSTS[name]
    torch.manual_seed(2)
    host = build_host(config, tuple(example.shape[1:]), 24).to(dtype)
    example = example.to(dtype) if example.is_floating_point() else example
    return attach(host, {point.slot: point.module for point in host.injection_points()}, example), example


SLOW = pytest.mark.slow
FORMATS = [torch.bfloat16, pytest.param(torch.float32, marks=SLOW), pytest.param(torch.float64, marks=SLOW)]


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=SLOW)])
def test_hosts_of_ours_become_graphs_whatever_grew_on_them(name, dtype, rounds):
    """In 20 rounds every blueprint comes to stand in some slot."""
    grown, example = hosted(name, dtype)
    host_keys = set(grown.model.state_dict())
    topology = next(iter(grown.sites.values())).topology
    names = [n for n in blueprints.names(topology) if n != "noop"]
    for first in list(range(0, len(names), len(grown.slots)))[:rounds]:
        for index, slot in enumerate(grown.slots):
            grown.slots[slot].uproot()
            set_to_work(grown, slot, born(grown, slot, names[(first + index) % len(names)], dtype))
        exported = export(grown, fold=False)
        assert isinstance(exported.module, fx.GraphModule)
        assert ours(exported.module) == []
        assert host_keys <= set(exported.module.state_dict())
        assert bits(exported.module(example[:2]), grown.model.eval()(example[:2]))
        folded = export(grown)
        assert not folded.exact


def test_flex_attention_is_exported_as_sdpa(monkeypatch):
    """Its kernel runs where there is a GPU; here it is something that is as near to SDPA."""

    def near(*qkv: Tensor) -> Tensor:
        wide = [tensor.double() for tensor in qkv]
        return scaled_dot_product_attention(*wide, is_causal=True).to(qkv[0].dtype)

    monkeypatch.setattr("esper.kasmina.blueprints.sequence.flex_causal", near)
    grown, example = hosted("gpt")
    seed = born(grown, "r0c0", "flex_attention")
    seed.backend = "flex"
    nn.init.normal_(seed.qkv.weight)
    set_to_work(grown, "r0c0", seed)
    exported = export(grown, fold=False)
    assert not exported.exact
    assert seed.backend == "flex"
    got, expected = exported.module(example), grown.model.eval()(example)
    assert torch.allclose(got, expected, atol=1e-5)
    assert not bits(got, expected)
    assert ours(exported.module) == []


def test_a_graph_keeps_a_bound_of_its_host_as_an_assertion():
    grown, _ = hosted("gpt")
    plain = grow_all(grown).export()
    short = TOKENS[:, :5]
    assert torch.allclose(plain(short), grown.model.eval()(short), atol=1e-5)
    with pytest.raises(AssertionError, match=r"exported with an input where gt\(getitem, 12\) is False"):
        plain(torch.zeros(2, 13, dtype=torch.int64))


class Wearing(nn.Module):
    """A user's model with parts of ours in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 3, 1)
        self.backbone = build_host(CNNConfig(widths=[4, 8]), (3, 8, 8), 6)
        self.norm, self.scale = GroupNorm(3, 3), LayerScale(6, Topology.VECTOR)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.backbone(self.norm(self.stem(x))))


def test_parts_of_ours_inside_of_a_users_model_become_graphs_in_their_places():
    grown = attach(Wearing(), {"r0c0": "stem", "r0c1": "backbone.stages.0", "r1c0": "backbone"}, IMAGES)
    host_keys = set(grown.model.state_dict())
    exported = export(grow_all(grown), fold=False)
    assert [slot.where for slot in exported.slots] == ["grown.r0c0", "backbone.grown.r0c1", "grown.r1c0"]
    assert ours(exported.module) == []
    assert type(exported.module) is Wearing
    assert type(exported.module.norm) is nn.GroupNorm
    assert host_keys <= set(exported.module.state_dict())
    assert bits(exported.module(IMAGES), grown.model.eval()(IMAGES))


def test_a_channels_last_model_stays_one_and_equal():
    host = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    x = normal(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    grown = grow_all(attach(host, {"r0c0": "0", "r1c0": "2"}, x))
    for parameter in grown.model.parameters():
        parameter.requires_grad_(False)
    exported = export(grown, fold=False)
    assert exported.module(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(exported.module(x), grown.model(x), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in exported.module.parameters())


# what takes part -----------------------------------------------------------------------------------------------------


def vectors() -> tuple[Grown, Tensor]:
    torch.manual_seed(4)
    host = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    return attach(host, {"r0c0": "0", "r1c0": "1", "r2c0": "3"}, normal(5, 4)), normal(5, 4)


def test_seeds_that_take_no_part_are_left_out_and_without_any_the_host_remains():
    grown, x = vectors()
    host = copy.deepcopy(grown.model)
    grow_all(grown)
    grown.slots["r0c0"].phase = Phase.OFF
    grown.slots["r1c0"].phase = Phase.STRAIGHT
    exported = export(grown, fold=False)
    assert [(slot.way, slot.where) for slot in exported.slots] == [
        (Way.LEFT_OUT, None),
        (Way.LEFT_OUT, None),
        (Way.MODULE, "grown.r2c0"),
    ]
    assert not [key for key, now in exported.keys.items() if key.startswith(f"{CONTAINER}.r0c0") and now is not None]
    with grown.disabled():
        bare = export(grown)
    assert bare.exact
    assert list(bare.module.state_dict()) == list(host.state_dict())
    assert bits(bare.module(x), host(x))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("operator", list(Operator))
def test_each_operator_is_exported_as_the_slot_computes_it(operator, dtype):
    grown, x = vectors()
    grown.model.to(dtype)
    x = x.to(dtype)
    gated = operator in (Operator.GATE, Operator.CONFIDENCE)
    for slot in grown.slots:
        set_to_work(grown, slot, born(grown, slot, dtype=dtype), 1.0 if gated else 0.3, operator)
        if operator is Operator.GATE:
            grown.slots[slot].gate = BlendGate(6, Topology.VECTOR).to(dtype)
    exported = export(grown, fold=False, partial=True)
    assert exported.exact
    with torch.no_grad(), grown.logits(normal(5, 3)):
        expected = grown.model.eval()(x)
    assert bits(exported.module(x), expected)
    folded = export(grown, partial=True).module(x)
    assert torch.allclose(folded.double(), expected.double(), atol=0.05 if dtype is torch.bfloat16 else 1e-5)


def test_an_override_is_what_the_model_computes_now():
    grown, x = vectors()
    grow_all(grown)
    with grown.override({"r0c0": 0.25, "r1c0": 0.0}):
        exported = export(grown, fold=False, partial=True)
        assert bits(exported.module(x), grown.model.eval()(x))
    assert [slot.alpha for slot in exported.slots] == [0.25, 0.0, 1.0]


# what is refused -----------------------------------------------------------------------------------------------------


def test_seeds_on_the_way_are_refused_by_name():
    grown, _ = vectors()
    grow_all(grown)
    grown.slots["r0c0"].set_alpha(0.5)
    grown.slots["r2c0"].set_alpha(0.25)
    with pytest.raises(ConfigError) as caught:
        grown.export()
    first, second = str(caught.value).splitlines()
    assert first.startswith("the seed in slot r0c0 is at alpha 0.500; wait for the end of its ramp, or export what")
    assert second.startswith("the seed in slot r2c0 is at alpha 0.250")
    grown.slots["r2c0"].operator = Operator.GATE
    grown.slots["r0c0"].fades_from = Operator.MULTIPLY
    grown.slots["r0c0"].set_alpha(0.5, fade=0.5)
    with pytest.raises(ConfigError) as caught:
        grown.export(partial=True)
    first, second = str(caught.value).splitlines()
    assert first == ("the seed in slot r0c0 is in a cross-fade from MULTIPLY to ADD; wait for the end of its ramp")
    assert second == (
        "the seed in slot r2c0 is joined by GATE at alpha 0.250, which a plain model has at alpha 1 only; "
        "wait for the end of its ramp"
    )


class Deciding(nn.Module):
    """Its delta hangs on the values of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 0] = x[:, 0]
        return y


class Counting(nn.Module):
    """Its delta hangs on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("seed", "said"),
    [
        (
            Writing(),
            r"the seed in slot r0c0 cannot be exported: torch.fx cannot trace Writing \(TypeError: .*\); write",
        ),
        (Counting(), "the seed in slot r0c0 cannot be exported: traced, Counting computes something else"),
    ],
)
def test_a_seed_that_cannot_be_traced_is_named(seed, said):
    grown, _ = vectors()
    set_to_work(grown, "r0c0", seed)
    with pytest.raises(ConfigError, match=said) as caught:
        grown.export()
    assert "\n" not in str(caught.value)


def test_a_branch_on_values_is_exported_with_a_guard():
    grown, x = vectors()
    set_to_work(grown, "r0c0", Deciding())
    plain = grown.export()
    far = 100 * x  # so that the bias does not decide
    taken = [sign for sign in (1, -1) if not raises(plain, sign * far)]
    assert len(taken) == 1
    assert torch.allclose(plain(taken[0] * far), grown.model(taken[0] * far))


def raises(model: nn.Module, x: Tensor) -> bool:
    try:
        model(x)
    except AssertionError as error:
        assert "takes another branch" in str(error)  # noqa: PT017
        return True
    return False


def test_without_an_example_or_a_tensor_to_compare_there_is_no_export():
    grown, x = vectors()
    bare = Grown(grown.model, grown.sites)
    with pytest.raises(ConfigError, match="export needs an example of the model's input"):
        export(bare)
    assert bits(export(bare, x).module(x), grown.model.eval()(x))


def test_an_export_that_computes_something_else_is_an_error(monkeypatch):
    grown, _ = vectors()
    grow_all(grown)
    monkeypatch.setattr("esper.kasmina.export.join.MULTIPLY_BOUND", 0.5)
    grown.slots["r0c0"].operator = Operator.MULTIPLY
    with pytest.raises(ExportError, match="output 0 of the exported model has other bits, up to"):
        grown.export(fold=False)
    with pytest.raises(ExportError, match=r"export moved output 0 by .* more than 1e-04 for torch\.float32"):
        grown.export()


def test_the_example_follows_the_model():
    grown, x = vectors()
    grow_all(grown)
    grown.model.double()
    assert bits(grown.export(fold=False)(x.double()), grown.model.eval()(x.double()))


def test_a_call_with_two_outputs_and_keywords():
    grown, _ = pair(CASES["recurrent"])
    grow_all(grown)
    exported = export(grown, {"x": CASES["recurrent"].example}, fold=False)
    assert bits(call(exported.module, {"x": normal(2, 5, 5)}), grown.model.eval()(normal(2, 5, 5)))


def build_own(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, classes))


def test_a_custom_host_loses_what_esper_hung_on_it():
    host = build_host(CustomHostConfig(path=f"{__name__}:build_own", sites={"r0c0": "0"}), (3, 8, 8), 5)
    grown = grow_all(attach(host, {"r0c0": "0"}, IMAGES))
    assert ours(host) != []
    assert ours(grown.export()) == []


class Listener:
    """Something of esper that looks on by a hook, and cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not to be copied")

    def note(self, slot: str, module: nn.Module, args: Any, output: Any) -> None:
        pass


def test_hooks_that_look_on_stay_behind(monkeypatch):
    monkeypatch.setattr(Listener, "__module__", "esper.somewhere")
    grown, x = vectors()
    grow_all(grown)
    grown.model[0].register_forward_hook(partial(Listener().note, "r0c0"))
    exported = export(grown, fold=False)
    assert bits(exported.module(x), grown.model.eval()(x))
    assert ours(exported.module) == []
    assert len(grown.model[0]._forward_hooks) == 2


def test_a_compiled_model_is_exported_without_its_regions():
    grown, example = hosted("cnn")
    compiler = Compiler(grown, "eager", train_sizes=(), eval_sizes=(3,))
    compiler.host(example)
    seed = born(grown, "r0c0")
    grown.slots["r0c0"].plant(seed, compiler.stage("r0c0", seed))
    grown.slots["r0c0"].phase = Phase.BLEND
    grown.slots["r0c0"].set_alpha(1.0)
    graphs = [region.graphs for region in compiler.regions.values()]
    exported = export(grown, fold=False)
    assert ours(exported.module) == []
    assert [region.graphs for region in compiler.regions.values()] == graphs
    assert any(region_of(part) is not None for part in grown.model.modules())
    assert torch.allclose(exported.module(example), grown.model.eval()(example), atol=1e-6)

    user = attach(nn.Sequential(normed()), {"r0c0": "0"}, normal(3, 2, 6, 6))  # its classes stay, and lose the regions
    Compiler(user, "eager", train_sizes=(), eval_sizes=(3,)).host(normal(3, 2, 6, 6))
    assert region_of(user.model[0]) is not None
    assert ours(user.export()) == []


def test_batchnorm_statistics_of_the_grown_model_are_left_alone():
    grown = attach(normed(), "1|4|7", normal(3, 2, 6, 6))
    grow_all(grown)
    grown.model.train()
    before = copy.deepcopy(dict(grown.model.named_buffers()))
    grown.export()
    assert all(bits(buffer, before[name]) for name, buffer in grown.model.named_buffers())
