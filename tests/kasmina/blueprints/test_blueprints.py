"""Blueprints: exact formulas, near identity at birth, alive in every tensor, and able to learn; and their registry."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina import blueprints
from esper.kasmina.axes.positions import CAUSAL, FREE, Mixing, Positions
from esper.kasmina.births.build import build_seed
from esper.kasmina.blueprints import blueprint, registry
from esper.kasmina.blueprints.parts import GroupNorm, LayerScale, groups_for
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology

MAP, SEQ, SIG, VEC = Topology.FEATURE_MAP, Topology.SEQUENCE, Topology.SIGNAL, Topology.VECTOR
EVERY = [(topology, name) for topology in Topology for name in blueprints.names(topology)]
LEARNING = [(topology, name) for topology, name in EVERY if name != "noop"]
every = pytest.mark.parametrize(("topology", "name"), EVERY)
learning = pytest.mark.parametrize(("topology", "name"), LEARNING)


def born(topology: Topology, name: str, key: int = 0, dim: int = 8, dtype: torch.dtype = torch.float32) -> nn.Module:
    return build_seed(name, dim=dim, topology=topology, key=key, dtype=dtype, device="cpu")


def normal(topology: Topology, samples: int, seed: int, dim: int = 8, size: int = 5) -> Tensor:
    """Normalised features [samples, dim, size, size], [samples, size, dim], [samples, dim, size] or [samples, dim]."""
    sizes = {"B": samples, "C": dim, "T": size, "H": size, "W": size}
    return torch.randn([sizes[axis] for axis in topology.value], generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A copy of the registry that a test may write to."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    return


# What a blueprint is


def test_the_catalogue_is_what_the_design_names() -> None:
    maps = ("attention", "block", "bottleneck", "conv_heavy", "conv_light", "conv_small", "depthwise", "noop", "norm")
    assert blueprints.names(MAP) == maps
    sequences = ("attention", "block", "flex_attention", "lora", "lora_large", "mlp", "mlp_small", "noop", "norm")
    assert blueprints.names(SEQ) == sequences
    assert blueprints.names(SIG) == tuple(name for name in maps if name not in ("attention", "block"))
    assert blueprints.names(VEC) == ("lora", "mlp", "noop", "norm")


@pytest.mark.parametrize("topology", [SEQ, MAP])
def test_a_whole_block_is_offered_where_it_is_asked_for(topology: Topology) -> None:
    usual = {info.name for info in blueprints.catalogue(topology, 16, 16)}
    asked = {info.name for info in blueprints.catalogue(topology, 16, 16, asked=["block", "copy"])}
    assert asked - usual == {"block"}
    with pytest.raises(ConfigError, match="this name is for copies of the host's own blocks"):
        blueprints.blueprint("copy", topology=topology, parameters=lambda dim: 0, flops=lambda dim, positions: 0)(
            type("Mine", (nn.Module,), {"forward": lambda self, x: x})
        )


@every
@pytest.mark.parametrize("dim", [1, 2, 5, 7, 16, 30])
def test_formulas_count_what_is_built(topology: Topology, name: str, dim: int) -> None:
    entry = blueprints.get(topology, name)
    if dim < entry.min_dim:
        with pytest.raises(ValueError, match=f"blueprint {name} .* cannot serve dim = {dim}"):
            born(topology, name, dim=dim)
        return
    seed = born(topology, name, dim=dim)
    x = normal(topology, 1, 0, dim=dim, size=6)
    info = blueprints.info(topology, name, dim, {MAP: 36, SEQ: 6, SIG: 6, VEC: 1}[topology])
    assert info.parameters == sum(tensor.numel() for tensor in seed.parameters())
    assert not list(seed.buffers()), "nothing that could drift between ranks"
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        entry.build(dim)(x.to("meta"))
    assert info.flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("mlp", {"expansion": 3}), ("lora", {"rank": 7}), ("lora", {"rank": 1}), ("lora_large", {"rank": 9})],
)
def test_formulas_follow_the_arguments(scratch: None, name: str, arguments: dict[str, int]) -> None:
    entry = blueprints.get(SEQ, name)
    blueprint("other", topology=SEQ, parameters=entry.parameters, flops=entry.flops, min_dim=2, arguments=arguments)(
        entry.factory
    )
    built = sum(tensor.numel() for tensor in born(SEQ, "other", dim=12).parameters())
    assert blueprints.info(SEQ, "other", 12, 4).parameters == built
    assert built != blueprints.info(SEQ, name, 12, 4).parameters


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_delta_has_the_shape_dtype_and_layout_of_its_input(topology: Topology, name: str, dtype: torch.dtype) -> None:
    seed = born(topology, name, dtype=dtype)
    for size in (1, 4, 7):
        x = normal(topology, 2, 0, size=size).to(dtype)
        layouts = [x, x.to(memory_format=torch.channels_last)] if topology is MAP and size > 1 else [x]
        deltas = [seed(layout) for layout in layouts]
        for layout, delta in zip(layouts, deltas, strict=True):
            assert delta.shape == x.shape
            assert delta.dtype == dtype
            assert delta.stride() == layout.stride()
        exact = 2e-2 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(deltas[-1], deltas[0], rtol=exact, atol=exact)


@pytest.mark.parametrize("topology", list(Topology))
def test_noop_gives_zeros_even_of_a_broken_input(topology: Topology) -> None:
    x = torch.full_like(normal(topology, 2, 0), torch.nan)
    assert torch.equal(born(topology, "noop")(x), torch.zeros_like(x))


@pytest.mark.parametrize("topology", list(Topology))
def test_whatever_fits_a_slot_sees_its_features_down_to_the_smallest(topology: Topology) -> None:
    for dim in (1, 2, 3, 5):
        for size in (1, 2) if topology.ndim > 2 else (1,):
            x = normal(topology, 6, 0, dim=dim, size=size)
            for entry in blueprints.catalogue(topology, dim, x[0].numel() // dim):
                delta = born(topology, entry.name, dim=dim)(x)
                seen = (delta.flatten(1).diff(dim=0).abs().amax(1) > 1e-6).all()
                assert seen or entry.name == "noop", (entry.name, dim, size)
    served = {info.name for info in blueprints.catalogue(MAP, 1, 1)}
    assert served == {"noop", "attention"}, "a norm of one value leaves nothing"


@learning
@pytest.mark.parametrize("dim", [3, 8, 24])
def test_near_identity_at_birth_yet_not_zero(topology: Topology, name: str, dim: int) -> None:
    for key in range(5):
        seed, x = born(topology, name, key, dim=dim), normal(topology, 32, key, dim=dim)
        ratio = (seed(x).norm() / x.norm()).item()
        assert 1e-4 < ratio <= 0.25, f"key {key}: |delta| / |x| = {ratio:.4g}"
        assert isinstance(list(seed.modules())[-1], LayerScale)


@learning
@pytest.mark.parametrize("dim", [3, 4, 8])
def test_every_tensor_has_a_live_gradient_within_a_few_steps(topology: Topology, name: str, dim: int) -> None:
    seed, x = born(topology, name, dim=dim).double(), normal(topology, 16, 1, dim=dim).double()
    target = normal(topology, 16, 2, dim=dim).double()
    start = {key: tensor.detach().clone() for key, tensor in seed.named_parameters()}
    optimizer = torch.optim.SGD(seed.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.zero_grad()
        (x + seed(x) - target).square().mean().backward()
        optimizer.step()
    for key, tensor in seed.named_parameters():
        assert tensor.grad is not None, key
        assert tensor.grad.norm() > 1e-7, f"{key}: |gradient| = {tensor.grad.norm():.3g}"
        assert not torch.equal(tensor, start[key]), key


def paired_gain(topology: Topology, name: str, run: int, steps: int = 80) -> tuple[float, float]:
    """Held-out loss at alpha 1 minus alpha 0 and its standard error, of a seed trained on frozen features and head.

    Labels come from a teacher: the same head on features that another birth of this blueprint, made strong, corrects.
    So the host is wrong in a way that this class of seed can put right, and only a seed can: all else is frozen.
    """
    generator = torch.Generator().manual_seed(run)
    head_KC = torch.randn(5, 8, generator=generator)
    teacher, seed = born(topology, name, 1000 + run), born(topology, name, run)
    with torch.no_grad():
        for tensor in teacher.parameters():
            tensor.mul_(2).add_(0.5 * torch.randn(tensor.shape, generator=generator) * (tensor.ndim == 1))
        if isinstance(scale := getattr(teacher, "scale", None), LayerScale):
            scale.gamma.copy_(2 * torch.randn(8, generator=generator).sign())

    def features(samples: int) -> Tensor:
        shapes = {MAP: (samples, 8, 4, 4), SEQ: (samples, 6, 8), SIG: (samples, 8, 6)}
        shapes[VEC] = (6 * samples, 8)  # positions as SEQ's, all alone
        h = torch.randn(shapes[topology], generator=generator)
        return h + 0.5 * torch.randn(samples, 8, 1, 1, generator=generator) if topology is MAP else h

    def logits(h: Tensor) -> Tensor:
        pooled = 2 * h.mean(dim=(2, 3)) if topology is MAP else h.mT if topology is SIG else h
        return pooled @ head_KC.T

    def losses(h: Tensor, alpha: float) -> Tensor:
        with torch.no_grad():
            labels = logits(h + teacher(h)).argmax(-1)
        each = cross_entropy(logits(h + alpha * seed(h)).movedim(-1, 1), labels, reduction="none")
        return each.reshape(len(h), -1).mean(1)

    optimizer = torch.optim.Adam(seed.parameters(), lr=0.03) if list(seed.parameters()) else None
    for _ in range(steps if optimizer else 0):
        optimizer.zero_grad()
        losses(features(64), 1.0).mean().backward()
        optimizer.step()
    with torch.no_grad():
        held_out = features(512)
        difference = losses(held_out, 1.0) - losses(held_out, 0.0)
    return difference.mean().item(), (difference.std() / len(difference) ** 0.5).item()


@learning
@pytest.mark.parametrize("run", [0, *(pytest.param(run, marks=pytest.mark.slow) for run in (1, 2))])
def test_it_learns_what_the_host_alone_cannot(topology: Topology, name: str, run: int) -> None:
    gain, error = paired_gain(topology, name, run)
    assert gain < -5 * error < 0, f"loss at alpha 1 minus alpha 0 is {gain:.4g} +- {error:.2g}"


@pytest.mark.parametrize("topology", list(Topology))
def test_the_learning_measure_is_exactly_zero_for_noop(topology: Topology) -> None:
    assert paired_gain(topology, "noop", 0) == (0.0, 0.0)


@pytest.mark.parametrize(("topology", "name"), [pair for pair in EVERY if pair[0].has_length])
def test_seeds_look_ahead_in_hosts_that_are_not_causal_alone(topology: Topology, name: str) -> None:
    seed, x = born(topology, name, dtype=torch.float64), normal(topology, 2, 0, size=9).double()
    axis, changed = topology.value.index("T"), x.clone()
    changed.select(axis, 4).copy_(normal(topology, 2, 1, size=9).select(axis, 4))

    def reached(*told: Positions) -> list[bool]:
        return ((seed(x, *told) - seed(changed, *told)).abs().movedim(axis, 0).flatten(1).amax(1) > 0).tolist()

    if not isinstance(seed, Mixing):
        assert reached() == [at == 4 and name != "noop" for at in range(9)]
        return
    reach = 8 if topology is SEQ else 2 if name == "conv_heavy" else 1
    causal = [4 <= at <= 4 + 2 * min(reach, 4) for at in range(9)]
    assert reached(CAUSAL) == reached() == causal
    assert reached(FREE) == [abs(at - 4) <= reach for at in range(9)]


@pytest.mark.parametrize(
    ("argument", "values"), [("expansion", {"mlp": 4, "mlp_small": 1}), ("rank", {"lora": 4, "lora_large": 32})]
)
def test_one_argument_distinguishes_names_of_one_class(argument: str, values: dict[str, int]) -> None:
    assert len({blueprints.get(SEQ, name).factory for name in values}) == 1
    for name, value in values.items():
        assert dict(blueprints.get(SEQ, name).arguments) == {argument: value}
        widths = [layer.out_features for layer in born(SEQ, name, dim=40).modules() if isinstance(layer, nn.Linear)]
        assert widths == [value if argument == "rank" else 40 * value, 40]


@pytest.mark.parametrize("name", blueprints.names(VEC))
def test_a_vector_seed_is_the_sequence_seed_at_one_position(name: str) -> None:
    x = normal(VEC, 6, 0)
    assert torch.equal(born(VEC, name)(x), born(SEQ, name)(x[:, None])[:, 0])


# GroupNorm


@pytest.mark.parametrize("dim", range(1, 70))
def test_groups_are_equal_and_never_of_one_channel_where_that_can_be_helped(dim: int) -> None:
    groups = groups_for(dim)
    assert dim % groups == 0
    assert 1 <= groups <= 8
    assert dim == 1 or dim // groups >= 2


@pytest.mark.parametrize("shape", [(3, 8, 5, 4), (2, 8, 1, 1), (1, 6, 1, 7), (2, 3, 4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_group_norm_of_a_channels_last_input_without_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Where torch's own backward crashes the process; compared with torch's on a contiguous copy that needs one."""
    norm = GroupNorm(groups_for(shape[1]), shape[1])
    with torch.no_grad():
        for tensor in norm.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    norm = norm.to(dtype)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for given in (x.to(memory_format=torch.channels_last), x.clone().requires_grad_()):
        norm.zero_grad()
        y = norm(given)
        for layout in (torch.channels_last, torch.contiguous_format):
            assert y.is_contiguous(memory_format=layout) >= given.is_contiguous(memory_format=layout)
        (y * weight).sum().backward()
        results.append((y.detach(), norm.weight.grad.clone(), norm.bias.grad.clone()))
    exact = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact)


# The registry


class Shift(nn.Module):
    def __init__(self, dim: int, *, gain: float = 0.5) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((dim,), gain))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand_as(x)


def register(name: str = "shift", topology: Topology = VEC, factory: type = Shift, **changes: object) -> None:
    formulas = {"parameters": lambda dim, **kw: dim, "flops": lambda dim, positions, **kw: 0}
    blueprint(name, topology=topology, **{**formulas, **changes})(factory)


def test_a_registered_blueprint_is_served_everywhere(scratch: None) -> None:
    before = blueprints.registry_digest()
    register()
    assert set(blueprints.names(VEC)) - {name for topology, name in EVERY if topology is VEC} == {"shift"}
    assert blueprints.info(VEC, "shift", 6, 1).parameters == 6
    assert "shift" in blueprints.all_names()
    assert blueprints.registry_digest() != before
    assert torch.equal(born(VEC, "shift", dim=3).bias, torch.full((3,), 0.5))


def test_names_are_unique_within_a_topology_only(scratch: None) -> None:
    register("bottleneck")
    with pytest.raises(ConfigError, match=r"'bottleneck' \(BC\): this name is taken; taken are bottleneck, lora"):
        register("bottleneck")


class Untyped(Shift):
    def __init__(self, dim: int, *, gain=0.5) -> None:  # type: ignore[no-untyped-def]
        super().__init__(dim)


class NoDefault(Shift):
    def __init__(self, dim: int, *, gain: float) -> None:
        super().__init__(dim)


class Anything(Shift):
    def __init__(self, dim: int, **settings: float) -> None:
        super().__init__(dim)


class NoDim(Shift):
    def __init__(self, width: int) -> None:
        super().__init__(width)


class NoForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()


class Drifting(Shift):
    def __init__(self, dim: int, *, gain: float = 0.5) -> None:
        super().__init__(dim, gain=gain)
        self.register_buffer("mean", torch.zeros(dim))


class Stack(nn.Sequential):
    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, dim))


class Impure(Shift):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, gain=float(np.random.rand()))


class EvenOnly(Shift):
    def __init__(self, dim: int) -> None:
        if dim % 2:
            raise ValueError("needs an even dim")
        super().__init__(dim)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"factory": Untyped}, "argument gain needs a type"),
        ({"factory": NoDefault}, "argument gain needs a default"),
        ({"factory": Anything}, "hides the argument names"),
        ({"factory": NoDim}, "first argument of NoDim must be dim"),
        ({"factory": NoForward}, "NoForward has no forward"),
        ({"factory": Stack}, "class with a forward of its own"),
        ({"factory": Drifting}, r"has running statistics \(mean\); use GroupNorm or LayerNorm"),
        ({"factory": Impure}, "draws from random or numpy.random"),
        ({"factory": EvenOnly}, "fails at dim = 1: .*needs an even dim"),
        ({"arguments": {"gain": "much"}}, "argument gain is 'much', its type is float"),
        ({"arguments": {"gian": 1.0}}, "no argument gian; it takes gain"),
        ({"name": "Shift!"}, "lower-case"),
        ({"parameters": lambda dim, gain: dim + 1}, "has 1 parameters at dim = 1, its formula says 2"),
        ({"parameters": lambda dim: dim}, "fails at dim = 1: TypeError.*gain"),
    ],
)
def test_registration_refuses(scratch: None, changes: dict[str, object], said: str) -> None:
    before = dict(registry._REGISTRY)
    with pytest.raises(ConfigError, match=said):
        register(**changes)
    assert before == registry._REGISTRY, "nothing half registered"


def test_dims_that_formula_and_constructor_refuse_alike_are_left_out_of_the_catalogue(scratch: None) -> None:
    def parameters(dim: int) -> int:
        if dim % 2:
            raise ValueError("needs an even dim")
        return dim

    register(factory=EvenOnly, parameters=parameters)
    served = {dim: {info.name for info in blueprints.catalogue(VEC, dim, 1)} for dim in (4, 5)}
    assert served[4] - served[5] == {"shift"}
    with pytest.raises(ValueError, match=r"blueprint shift \(BC\) cannot serve dim = 5: needs an even dim"):
        blueprints.catalogue(VEC, 5, 1, names=["shift"])
    with pytest.raises(ValueError, match=r"blueprint shift \(BC\) cannot serve dim = 5: needs an even dim"):
        born(VEC, "shift", dim=5)


def test_catalogue_is_sorted_and_takes_a_choice_of_names() -> None:
    whole = blueprints.catalogue(SEQ, 16, 10)
    offered = [name for name in blueprints.names(SEQ) if not blueprints.get(SEQ, name).on_request]
    assert [info.name for info in whole] == offered
    asked = blueprints.catalogue(SEQ, 16, 10, asked=["block"])
    assert [info.name for info in asked] == sorted([*offered, "block"])
    assert [info.name for info in blueprints.catalogue(SEQ, 16, 10, names=["norm", "lora"])] == ["lora", "norm"]
    assert [info.name for info in blueprints.catalogue(SEQ, 1, 10)] == ["lora", "lora_large", "noop"]
    with pytest.raises(ConfigError, match="'conv_heavy': not registered for BTC features; registered are attention"):
        blueprints.catalogue(SEQ, 16, 10, names=["conv_heavy"])


@every
@pytest.mark.parametrize("dim", [0, -1, 2.0, True])
def test_a_dim_that_is_no_count_of_channels_is_refused(topology: Topology, name: str, dim: int) -> None:
    with pytest.raises(ValueError, match=f"blueprint {name} .* cannot serve dim = {dim}"):
        blueprints.info(topology, name, dim, 4)


def test_names_and_wire_indices_are_a_bijection() -> None:
    known = blueprints.all_names()
    assert known == tuple(sorted({name for topology in Topology for name in blueprints.names(topology)}))
    assert [blueprints.name_at(blueprints.index_of(name)) for name in known] == list(known)
    with pytest.raises(ConfigError, match="'convheavy': not registered"):
        blueprints.index_of("convheavy")
    for index in (-1, len(known)):
        with pytest.raises(ConfigError, match=f"index {index}"):
            blueprints.name_at(index)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"min_dim": 2},
        {"arguments": {"gain": 0.25}},
        {"flops": lambda dim, positions, gain: dim},
        {"topology": MAP},
        {"name": "shift2"},
    ],
)
def test_digest_tells_entries_apart(monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]) -> None:
    digests = []
    for change in ({}, {}, changes):
        with monkeypatch.context() as patch:
            patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
            register(**change)
            digests.append(blueprints.registry_digest())
    assert digests[0] == digests[1] != digests[2]
    assert all(0 <= digest < 2**62 for digest in digests)


def test_digest_does_not_depend_on_the_order_of_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    before = blueprints.registry_digest()
    monkeypatch.setattr(registry, "_REGISTRY", dict(reversed(registry._REGISTRY.items())))
    assert blueprints.registry_digest() == before


PLUGIN = """
import torch
from torch import nn
from esper.kasmina.blueprints import blueprint
from esper.leyline.topology import Topology

@blueprint("{name}", topology=Topology.VECTOR, parameters=lambda dim: dim, flops=lambda dim, positions: 0)
class Shift(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return self.bias.expand_as(x)
"""


def install(folder: Path, module: str, source: str) -> None:
    """A package as pip would leave it: a module and the metadata that names its entry point."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[esper.blueprints]\n{module} = {module}\n")


def test_plugins_register_through_their_entry_point(
    scratch: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "esper_test_plugin", PLUGIN.format(name="theirs"))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert "BC/theirs" in blueprints.load_plugins()
        assert blueprints.info(VEC, "theirs", 4, 1).parameters == 4
        assert blueprints.load_plugins() == ()
    finally:
        sys.modules.pop("esper_test_plugin", None)


def test_broken_plugins_are_one_error_that_names_each(
    scratch: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "esper_test_broken", "import no_such_module_of_ours")
    install(tmp_path, "esper_test_clash", PLUGIN.format(name="norm").replace("VECTOR", "SEQUENCE"))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as caught:
        blueprints.load_plugins()
    assert len(caught.value.problems) == 2
    assert "esper_test_broken" in caught.value.problems[0]
    assert "no_such_module_of_ours" in caught.value.problems[0]
    assert "this name is taken" in caught.value.problems[1]
