"""Models that Esper has never seen: slots that change nothing until they are asked to, then compute host plus seed."""

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import Phase
from esper.leyline.topology import Topology
from tests.support.bitwise import bits


class Tied(nn.Module):
    """Embedding and output layer are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.out = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.body(self.embed(tokens)))


class Recurrent(nn.Module):
    """Its site returns (sequence, (hidden, cell))."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, (hidden, _) = self.lstm(x)
        return self.head(x), hidden


class Padded(nn.Module):
    """A Transformer encoder whose batch is padded: in eval() torch turns it into nested tensors and a fused kernel."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(x, src_key_padding_mask=padding))


def normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def _padding() -> Tensor:
    return torch.arange(5) >= torch.tensor([[5], [3]])


@dataclass(frozen=True)
class Case:
    build: Any
    sites: Any
    example: Any
    layout: str | None = None


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


CASES = {
    "tied": Case(Tied, {"r0c0": "embed", "r1c0": "body"}, torch.arange(14).view(2, 7) % 11, "BTC"),
    "sequential with BatchNorm and dropout": Case(normed, "1|4|7", _normal(3, 2, 6, 6)),
    "recurrent": Case(Recurrent, {"r0c0": "lstm"}, _normal(2, 5, 5)),
    "encoder": Case(Padded, r"encoder\.layers\.\d", _normal(2, 5, 8)),
    "encoder, padded": Case(Padded, r"encoder\.layers\.\d", {"x": _normal(2, 5, 8), "padding": _padding()}),
    "inside an encoder": Case(Padded, {"r0c0": "encoder.layers.0.linear1"}, _normal(2, 5, 8)),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")


def call(model: nn.Module, example: Any) -> Any:
    return model(**example) if isinstance(example, dict) else model(example)


def pair(case: Case) -> tuple[Grown, nn.Module]:
    torch.manual_seed(3)
    host = case.build()
    return attach(copy.deepcopy(host), case.sites, case.example, layout=case.layout), host


def plant(grown: Grown, alpha: float) -> None:
    for slot, site in grown.sites.items():
        name = {Topology.FEATURE_MAP: "conv_light", Topology.SEQUENCE: "mlp_small"}.get(site.topology)
        if name is None:
            grown.slots[slot].plant(nn.Linear(site.dim, site.dim))
        else:
            key = birth_key(1, slot, 1)
            seed = build_seed(name, dim=site.dim, topology=site.topology, key=key, dtype=torch.float32, device="cpu")
            grown.slots[slot].plant(seed)
        grown.slots[slot].phase = Phase.BLEND
        grown.slots[slot].set_alpha(alpha)


def modes() -> Iterator[tuple[bool, bool]]:
    for training in (True, False):
        for grad in (True, False):
            yield training, grad


def run(model: nn.Module, example: Any, training: bool, grad: bool) -> Any:
    torch.manual_seed(9)
    with torch.set_grad_enabled(grad):
        return call(model.train(training), example)


@EVERY
def test_an_empty_slot_and_a_disabled_one_are_the_host_bit_for_bit(case):
    grown, host = pair(case)
    for state in ("empty", "disabled", "after"):
        if state == "disabled":
            plant(grown, 1.0)
        for training, grad in modes():
            expected = run(host, case.example, training, grad)
            with grown.disabled():
                assert bits(run(grown.model, case.example, training, grad), expected), (state, training, grad)
            if state == "after":
                assert not bits(run(grown.model, case.example, training, grad), expected), (training, grad)
                for name, buffer in host.named_buffers():  # both statistics took the same batches till here
                    grown.model.get_buffer(name).copy_(buffer)


@EVERY
def test_active_slots_compute_alike_with_and_without_gradients_and_each_seed_tensor_is_reached(case):
    grown, host = pair(case)
    plant(grown, 0.5)
    with_grad = run(grown.model, case.example, False, True)
    without = run(grown.model, case.example, False, False)
    if bits(run(host, case.example, False, True), run(host, case.example, False, False)):
        assert bits(with_grad, without)
    else:  # on some CPUs torch runs an LSTM that needs no gradient by another kernel
        torch.testing.assert_close(without, with_grad)
    first = with_grad[0] if isinstance(with_grad, tuple) else with_grad
    (first * _normal(*first.shape)).sum().backward()
    for name, parameter in grown.model.named_parameters():
        if name.startswith(CONTAINER):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


@EVERY
def test_copies_and_pickles_in_mid_life_compute_the_same_and_stand_alone(case):
    grown, _ = pair(case)
    plant(grown, 0.5)
    expected = run(grown.model, case.example, False, False)
    for twin in (copy.deepcopy(grown.model), pickle.loads(pickle.dumps(grown.model))):
        assert bits(run(twin, case.example, False, False), expected)
        for holder in twin.get_submodule(CONTAINER).values():
            holder.uproot()
        assert not bits(run(twin, case.example, False, False), expected)
    assert bits(run(grown.model, case.example, False, False), expected)


@EVERY
def test_a_model_moves_in_mid_life(case):
    grown, _ = pair(case)
    plant(grown, 0.5)
    before = run(grown.model, case.example, False, True)

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    wide = {k: double(v) for k, v in case.example.items()} if isinstance(case.example, dict) else double(case.example)
    after = run(grown.model.to("cpu").double(), wide, False, True)
    one, two = (x[0] if isinstance(x, tuple) else x for x in (before, after))
    assert two.dtype is torch.float64
    assert torch.allclose(one.double(), two, atol=1e-5)
    assert all(holder.alpha.dtype is torch.float32 for holder in grown.slots.values())
    narrow = run(grown.model.float(), case.example, False, True)
    assert torch.allclose(narrow[0] if isinstance(narrow, tuple) else narrow, one, atol=1e-6)


def refused_by_torch(host: nn.Module, example: Any) -> str:
    """Why the host alone cannot run under autocast here (an LSTM, where the CPU has no bf16); "" where it can."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            run(host, example, False, False)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


@pytest.mark.parametrize("name", [name for name in CASES if name != "encoder, padded"])  # torch cannot, without slots
def test_bf16_autocast_disabled_is_the_host_and_seeds_work(name):
    case = CASES[name]
    grown, host = pair(case)
    if why := refused_by_torch(host, case.example):
        pytest.skip(f"torch cannot run this host without slots under autocast on this CPU: {why}")
    plant(grown, 0.5)
    for training, grad in modes():
        with torch.autocast("cpu", torch.bfloat16):
            expected = run(host, case.example, training, grad)
            with grown.disabled():
                assert bits(run(grown.model, case.example, training, grad), expected)
            for name, buffer in host.named_buffers():
                grown.model.get_buffer(name).copy_(buffer)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(grown.model, case.example, True, True)
    out = out[0] if isinstance(out, tuple) else out
    out.float().square().sum().backward()
    assert all(p.grad is not None for name, p in grown.model.named_parameters() if name.startswith(CONTAINER))


def test_tied_weights_stay_one_tensor_and_incubation_leaves_both_ends_alone():
    grown, host = pair(CASES["tied"])
    plant(grown, 0.0)
    assert grown.model.embed.weight is grown.model.out.weight
    assert [name for name, _ in grown.owner_parameters()["host"]] == [name for name, _ in host.named_parameters()]
    example = CASES["tied"].example
    grown.incubate("r1c0", example).square().sum().backward()
    assert all(p.grad is None for p in host.parameters())
    assert all(p.grad is None for _, p in grown.owner_parameters()["host"])
    assert all(p.grad is not None for _, p in grown.owner_parameters()["r1c0"])


def test_what_stands_beside_the_feature_passes_through():
    grown, host = pair(CASES["recurrent"])
    plant(grown, 1.0)
    x = CASES["recurrent"].example
    sequence, (hidden, cell) = host.lstm(x)
    got, (got_hidden, got_cell) = grown.model.lstm(x)
    assert torch.equal(got, sequence + grown.slots["r0c0"].seed(sequence))
    assert bits((got_hidden, got_cell), (hidden, cell))


@pytest.mark.parametrize("blueprint", ["conv_light", "conv_small", "depthwise", "norm", "attention"])
@pytest.mark.parametrize("grad", [True, False])
def test_channels_last_comes_out_of_an_active_slot_as_it_went_in(blueprint, grad):
    torch.manual_seed(3)
    host = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    host = host.to(memory_format=torch.channels_last)
    x = _normal(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    grown = attach(host, {"r0c0": "0"}, x)
    key = birth_key(1, "r0c0", 1)
    seed = build_seed(blueprint, dim=8, topology=Topology.FEATURE_MAP, key=key, dtype=torch.float32, device="cpu")
    grown.slots["r0c0"].plant(seed)
    grown.slots["r0c0"].phase = Phase.BLEND
    grown.slots["r0c0"].set_alpha(0.5)
    with torch.set_grad_enabled(grad):
        out = host[0](x)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert not out.is_contiguous()
        assert host(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_a_channels_last_model_with_slots_disabled_is_the_host_bit_for_bit(training):
    torch.manual_seed(3)
    host = normed().to(memory_format=torch.channels_last)
    x = _normal(3, 2, 6, 6).contiguous(memory_format=torch.channels_last)
    grown = attach(copy.deepcopy(host), "1|4", x)
    plant(grown, 1.0)
    with grown.disabled():
        assert bits(run(grown.model, x, training, True), run(host, x, training, True))
    assert not bits(run(grown.model, x, training, True), run(host, x, training, True))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("encoder, padded")])
def test_a_model_cast_to_bf16_in_mid_life_goes_on(name):
    case = CASES[name]
    grown, host = pair(case)
    plant(grown, 0.5)
    grown.model.bfloat16()
    host.bfloat16()
    example = case.example.bfloat16() if case.example.is_floating_point() else case.example
    with grown.disabled():
        assert bits(run(grown.model, example, False, True), run(host, example, False, True))
    out = run(grown.model, example, False, True)
    out = out[0] if isinstance(out, tuple) else out
    assert out.dtype is torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad is not None for key, p in grown.model.named_parameters() if key.startswith(CONTAINER))


@pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'> should not be:DeprecationWarning"
)  # dynamo's
@pytest.mark.parametrize("name", ["tied", "sequential with BatchNorm and dropout"])
def test_inside_a_compiler_disabled_is_the_host_and_seeds_work(name):
    case = CASES[name]
    grown, host = pair(case)
    plant(grown, 0.5)
    torch._dynamo.reset()
    compiled = torch.compile(grown.model, backend="eager")
    for training in (True, False):
        expected = run(host, case.example, training, True)
        with grown.disabled():
            assert bits(run(compiled, case.example, training, True), expected)
        for key, buffer in host.named_buffers():
            grown.model.get_buffer(key).copy_(buffer)
    out, plain = run(compiled, case.example, False, True), run(grown.model, case.example, False, True)
    assert torch.allclose(out, plain, atol=1e-6)
    out.square().sum().backward()
    assert all(p.grad is not None for key, p in grown.model.named_parameters() if key.startswith(CONTAINER))


def test_the_fused_path_of_an_encoder_is_taken_while_slots_are_idle_and_left_alone_afterwards(monkeypatch):
    grown, _ = pair(CASES["encoder"])
    calls = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fused(*args))
    example = CASES["encoder"].example
    run(grown.model, example, False, False)
    assert len(calls) == 2
    plant(grown, 0.5)
    run(grown.model, example, False, False)
    assert len(calls) == 2
    assert torch.backends.mha.get_fastpath_enabled()
    with grown.disabled():
        run(grown.model, example, False, False)
    assert len(calls) == 4
    with pytest.raises(AssertionError, match="was expecting embedding dimension of 8"):
        run(grown.model, _normal(2, 5, 4), False, False)
    assert torch.backends.mha.get_fastpath_enabled()
    assert all(len(layer._forward_hooks) == 1 for layer in grown.model.encoder.layers)


@pytest.mark.parametrize("twin", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_hooks_of_the_user_s_keep_their_place_around_a_slot_that_is_lifted(twin):
    """One from before attach sees the site's own output; one from after it, what flows on."""
    host, example = Padded(), CASES["encoder"].example
    first, second = host.encoder.layers
    first.register_forward_hook(partial(Seen.note, name="before"))
    attach(host, CASES["encoder"].sites, example)
    first.register_forward_hook(partial(Seen.note, name="after"))
    second.register_forward_pre_hook(Seen.note_input)
    model = twin(host)
    holder = model.get_submodule(CONTAINER)["r0c0"]
    for _ in range(2):
        run(model, example, False, False)  # idle: lifted
        holder.plant(nn.Linear(8, 8))
        holder.phase = Phase.BLEND
        holder.set_alpha(1.0)
        run(model, example, False, False)
        assert bits(Seen.last["after"], Seen.last["flows on"])
        assert not bits(Seen.last["before"], Seen.last["flows on"])
        holder.uproot()


class Seen:
    """What hooks saw last."""

    last: ClassVar[dict[str, Tensor]] = {}

    @classmethod
    def note(cls, module: nn.Module, args: Any, output: Tensor, *, name: str) -> None:
        cls.last[name] = output

    @classmethod
    def note_input(cls, module: nn.Module, args: Any) -> None:
        cls.last["flows on"] = args[0]


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_lifts_hooks_of_its_own(twin):
    grown, host = pair(CASES["encoder"])
    example = CASES["encoder"].example
    run(grown.model, example, False, False)
    copied = twin(grown.model)
    assert bits(run(copied, example, False, False), run(host, example, False, False))
    plant(grown, 0.5)
    holders = copied.get_submodule(CONTAINER)
    holders["r1c0"].plant(copy.deepcopy(grown.slots["r1c0"].seed))
    holders["r1c0"].phase = Phase.BLEND
    holders["r1c0"].set_alpha(0.5)
    with grown.override({"r0c0": 0.0}):
        assert bits(run(copied, example, False, False), run(grown.model, example, False, False))
    assert [len(layer._forward_hooks) for layer in (*copied.encoder.layers, *grown.model.encoder.layers)] == [1] * 4


def test_a_compiled_encoder_keeps_its_slots():
    """A hook that is lifted while a compiler looks would be gone for good."""
    grown, _ = pair(CASES["encoder"])
    example = CASES["encoder"].example
    torch._dynamo.reset()
    compiled = torch.compile(grown.model.eval(), backend="eager")
    with torch.no_grad():
        idle = compiled(example)
        plant(grown, 0.5)
        assert torch.allclose(compiled(example), grown.model(example), atol=1e-6)
        assert not torch.allclose(compiled(example), idle, atol=1e-3)
