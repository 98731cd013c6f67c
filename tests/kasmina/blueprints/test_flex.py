"""FlexAttention equals SDPA wherever it runs; elsewhere the fallback is chosen when the seed is built, and said."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from esper.kasmina import blueprints
from esper.kasmina.births.build import build_seed
from esper.kasmina.blueprints import blueprint, flex, registry
from esper.kasmina.blueprints.entry import Backend
from esper.kasmina.blueprints.flex import FLEX, SDPA, BlockMasks, attention_backend
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology

SEQ = Topology.SEQUENCE
CPU = torch.device("cpu")
GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # when inductor is imported
uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def born(name: str, dim: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    return build_seed(name, dim=dim, topology=SEQ, key=3, dtype=dtype, device=device)


def features(dim: int, length: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, length, dim, generator=torch.Generator().manual_seed(length)).to(device, dtype)


def as_flex(dim: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A seed that attends by FlexAttention whatever this device was found to be able to."""
    seed = blueprints.get(SEQ, "flex_attention").build(dim, FLEX).to(dtype)
    seed.load_state_dict(born("attention", dim, dtype=dtype).state_dict())
    return seed


@pytest.mark.parametrize("device", DEVICES)
def test_the_choice_is_what_really_runs_here(device: str) -> None:
    inputs = [torch.randn(1, 2, 8, 16, device=device, requires_grad=True) for _ in range(3)]
    try:
        # As shipped. Without fullgraph a failure here would leave dynamo unable to compile the function later.
        torch.compile(flex_attention, fullgraph=True)(*inputs).sum().backward()
        ran = True
    except Exception:
        ran = False
    chosen = attention_backend(torch.device(device), torch.float32)
    assert (chosen.name == FLEX) == ran
    assert (chosen.why == "") == ran, "a fallback has a reason, and nothing else has"
    assert born("flex_attention", 8, device).backend == chosen.name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dim", "length"), [(8, 5), (12, 130), (64, 64)])
def test_it_equals_the_sdpa_path_forward_and_backward(device: str, dim: int, length: int) -> None:
    seeds = [born(name, dim, device) for name in ("attention", "flex_attention")]
    assert {key: t.tolist() for key, t in seeds[0].state_dict().items()} == {
        key: t.tolist() for key, t in seeds[1].state_dict().items()
    }, "one key, the same weights under the same names"
    results = []
    for seed in seeds:
        x = features(dim, length, device).requires_grad_()
        delta = seed(x)
        (delta * features(dim, length + 1, device)[:, 1:]).sum().backward()
        results.append([delta, x.grad, *(p.grad for p in seed.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)  # TF32, where the device has it


@uncompiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("dim", "length"), [(3, 1), (12, 5), (8, 130), (40, 7)])
def test_its_forward_equals_sdpa_on_a_cpu_too(
    monkeypatch: pytest.MonkeyPatch, dim: int, length: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(flex, "_kernel", lambda: flex_attention)  # compiling takes 20 s: below
    x = features(dim, length, dtype=dtype)
    with torch.no_grad():
        ours, theirs = as_flex(dim, dtype)(x), born("attention", dim, dtype=dtype)(x)
    exact = 1e-12 if dtype is torch.float64 else 1e-6
    torch.testing.assert_close(ours, theirs, rtol=exact, atol=exact)


@pytest.mark.slow
def test_the_compiled_kernel_equals_sdpa() -> None:
    x = features(12, 130)
    with torch.no_grad():
        torch.testing.assert_close(as_flex(12)(x), born("attention", 12)(x), rtol=1e-6, atol=1e-6)


def test_inside_a_compiled_region_the_mask_is_part_of_the_graph() -> None:
    seed, x, built = as_flex(8), features(8, 9), flex.MASKS.built
    with torch.no_grad():
        whole = torch.compile(seed.forward, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(whole, born("attention", 8)(x), rtol=1e-6, atol=1e-6)
    assert flex.MASKS.built == built


@pytest.mark.skipif(attention_backend(CPU, torch.float32).name == FLEX, reason="this torch trains with it on a CPU")
def test_a_seed_never_falls_back_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_kernel", lambda: flex_attention)
    with pytest.raises(NotImplementedError, match="backward"):
        as_flex(8)(features(8, 5))


def test_masks_are_kept_within_a_bound_and_the_longest_unused_goes() -> None:
    masks = BlockMasks(limit=3)
    first = [masks.get(length, CPU) for length in (1, 2, 3)]
    assert masks.built == 3
    assert [masks.get(length, CPU) for length in (1, 2, 3)] == first, "each built once"
    assert masks.built == 3
    masks.get(1, CPU)
    masks.get(4, CPU)  # 2 was unused for longest
    assert (len(masks), masks.built) == (3, 4)
    for length in (1, 3, 4):
        masks.get(length, CPU)
    assert masks.built == 4
    masks.get(2, CPU)
    assert (len(masks), masks.built) == (3, 5)
    for length in range(100):
        assert masks.get(length + 1, CPU).shape[-2:] == (length + 1, length + 1)
    assert len(masks) == 3


def test_the_chosen_implementation_is_in_the_words_that_ranks_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    def words(chooser: Callable[[torch.device, torch.dtype], Backend]) -> set[str]:
        entry = blueprints.get(SEQ, "flex_attention")
        changed = type(entry)(**{name: getattr(entry, name) for name in type(entry).__slots__} | {"backend": chooser})
        monkeypatch.setitem(registry._REGISTRY, (SEQ, "flex_attention"), changed)
        return set(registry.describe_registry(CPU, torch.float32).split())

    has, lacks = words(lambda device, dtype: Backend(FLEX)), words(lambda device, dtype: Backend(SDPA, "no kernel"))
    (ours,), (theirs,) = has - lacks, lacks - has
    assert ours.startswith("BTC/flex_attention.v1@flex:")
    assert theirs == ours.replace("@flex", "@sdpa"), "the network is the same"
    words(lambda device, dtype: Backend(FLEX if dtype is torch.float32 else SDPA))
    assert born("flex_attention", 8).backend == FLEX
    assert born("flex_attention", 8, dtype=torch.float64).backend == SDPA


def test_a_choice_needs_an_argument_to_be_given_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    class Plain(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    with pytest.raises(ConfigError, match="no argument backend"):
        blueprint(
            "plain", topology=SEQ, parameters=lambda dim: 0, flops=lambda dim, positions: 0, backend=attention_backend
        )(Plain)


@pytest.mark.parametrize("topology", [SEQ, Topology.VECTOR])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_mlp_gives_the_same_bits_and_keeps_less(
    topology: Topology, reentrant: bool
) -> None:
    seed = build_seed("mlp", dim=16, topology=topology, key=5, dtype=torch.float32, device="cpu")
    kept: dict[str, int] = {}
    gradients: dict[str, list[bytes]] = {}

    def noted(way: str) -> Callable[[Tensor], Tensor]:
        def note(tensor: Tensor) -> Tensor:
            if not any(tensor.data_ptr() == p.data_ptr() for p in seed.parameters()):
                kept[way] = kept.get(way, 0) + tensor.numel()
            return tensor

        return note

    for way in ("plain", "checkpointed"):
        seed.zero_grad()
        x = features(16, 5).requires_grad_() if topology is SEQ else features(16, 5)[0].clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(noted(way), lambda tensor: tensor):
            y = seed(x) if way == "plain" else checkpoint(seed, x, use_reentrant=reentrant)
        y.square().sum().backward()
        gradients[way] = [t.grad.numpy().tobytes() for t in (x, *seed.parameters())]
    assert gradients["plain"] == gradients["checkpointed"]
    assert kept.get("checkpointed", 0) < kept["plain"] / 4
