"""Seeds that are copies of the host's own blocks, on models of transformers and on a plain residual stack."""

import copy

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import Attached, attach
from esper.kasmina.axes.block import OwnBlock
from esper.kasmina.births.own import copy_block, find_fits, set_weights
from esper.kasmina.births.projections import last_projections
from esper.kasmina.flops import copy_cost, host_cost
from esper.kasmina.slots.slot import Phase
from esper.leyline.errors import ConfigError
from tests.support.bitwise import bits
from tests.support.block_hosts import BlockHost, block_host

KINDS = ["stack", "gpt2", "llama", "vit", "resnet"]


def plant(grown: Attached, slot: str, *, alpha: float, identity: bool = False) -> OwnBlock:
    seed = copy_block(grown, slot)
    source = grown.model.get_submodule(grown.sites[slot].module)
    set_weights(seed, source, last_projections(source, ()) if identity else ())
    holder = grown.slots[slot]
    holder.plant(seed)
    holder.phase = Phase.BLEND
    holder.set_alpha(alpha)
    return seed


def grown_host(kind: str) -> tuple[BlockHost, Attached, str]:
    host = block_host(kind)
    plain = copy.deepcopy(host.model)
    grown = attach(host.model, host.sites, host.example)
    return BlockHost(plain, host.blocks, host.example, host.sites), grown, list(grown.slots)[-1]


def deeper(host: BlockHost, grown: Attached, slot: str) -> nn.Module:
    """The host with a copy of its block behind it, made by hand."""
    model = copy.deepcopy(host.model)
    blocks = model.get_submodule(host.blocks)
    index = int(grown.sites[slot].module.rsplit(".", 1)[1])
    twin = copy.deepcopy(blocks[index])
    for module in twin.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = len(blocks)
    blocks.insert(index + 1, twin)
    if hasattr(model, "config") and hasattr(model.config, "num_hidden_layers"):
        model.config.num_hidden_layers = len(blocks)
    return model


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    weights = torch.linspace(1, 2, output.numel(), dtype=output.dtype).view_as(output)
    model.zero_grad(set_to_none=True)
    (output * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("kind", "training"), [("stack", False), ("gpt2", True), ("resnet", True)])
def test_at_alpha_0_the_host_is_as_without_the_seed(kind: str, training: bool) -> None:
    host, grown, slot = grown_host(kind)
    seed = plant(grown, slot, alpha=0.0)
    with torch.no_grad():
        next(seed.parameters()).fill_(float("inf"))
    outputs, found = [], []
    for model in (host.model, grown.model):
        torch.manual_seed(5)
        output = host.output(model.train(training))
        outputs.append(output)
        found.append(gradients(model, output))
    assert bits(outputs[0], outputs[1])
    assert all(bits(grad, found[1][name]) for name, grad in found[0].items())
    own = [name for name in found[1] if name.startswith("esper_slots")]
    assert len(own) == len(list(seed.parameters())), "they are in the gradient reduction all the same"


@pytest.mark.parametrize("kind", KINDS)
def test_at_alpha_1_the_network_is_the_deeper_one(kind: str) -> None:
    host, grown, slot = grown_host(kind)
    plant(grown, slot, alpha=1.0)
    by_hand = deeper(host, grown, slot)
    ours, theirs = host.output(grown.model.eval()), host.output(by_hand.eval())
    assert bits(ours, theirs)
    mine, wanted = gradients(grown.model, ours), gradients(by_hand, theirs)
    site = grown.sites[slot].module
    index = int(site.rsplit(".", 1)[1])
    for name, grad in wanted.items():
        copied = f"{host.blocks}.{index + 1}."
        own = f"esper_slots.{slot}.seed.block.{name.removeprefix(copied)}" if name.startswith(copied) else name
        assert bits(grad, mine[own]), name
    assert len(mine) == len(wanted)


@pytest.mark.parametrize("kind", ["stack", "llama"])
def test_between_the_output_moves_from_one_to_the_other(kind: str) -> None:
    host, grown, slot = grown_host(kind)
    plant(grown, slot, alpha=0.5)
    site = grown.model.get_submodule(grown.sites[slot].module)
    seen: list[Tensor] = []
    handle = site.register_forward_hook(lambda m, a, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        for alpha in (0.0, 0.25, 1.0):
            grown.slots[slot].set_alpha(alpha)
            host.output(grown.model.eval())
    handle.remove()
    torch.testing.assert_close(seen[1], seen[0] + 0.25 * (seen[2] - seen[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_identity_copy_changes_nothing_and_its_gradient_is_alive(kind: str) -> None:
    host, grown, slot = grown_host(kind)
    fits, reasons = find_fits(grown, host.example, identity=True, patterns=())
    assert slot in fits, reasons
    seed = plant(grown, slot, alpha=1.0, identity=True)
    output = host.output(grown.model.eval())
    assert torch.equal(output, host.output(host.model.eval()))
    found = gradients(grown.model, output)
    zeroed = [f"esper_slots.{slot}.seed.block.{name}.weight" for name in fits[slot].zeroed]
    assert zeroed
    assert all(found[name].any() for name in zeroed)
    assert fits[slot].parameters == sum(p.numel() for p in seed.parameters())


@pytest.mark.parametrize("kind", ["stack", "resnet"])
def test_the_host_below_keeps_a_gradient_at_full_alpha(kind: str) -> None:
    host, grown, slot = grown_host(kind)
    seed = plant(grown, slot, alpha=1.0)
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.zero_()
    first = next(name for name, _ in host.model.named_parameters())
    assert gradients(grown.model, host.output(grown.model.eval()))[first].any()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_it_generates_with_a_cache_what_it_generates_without(kind: str) -> None:
    host, grown, _ = grown_host(kind)
    for each in grown.slots:
        plant(grown, each, alpha=1.0)
    prompt, grown.model = host.example["input_ids"][:, :5], grown.model.eval()
    said = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with_cache = grown.model.generate(prompt, use_cache=True, **said)
    assert with_cache.shape == (2, 13)
    assert torch.equal(with_cache, grown.model.generate(prompt, use_cache=False, **said))
    beams = grown.model.generate(prompt, num_beams=3, use_cache=True, **said)
    assert torch.equal(beams, grown.model.generate(prompt, num_beams=3, use_cache=False, **said))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["stack", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_compiled_it_computes_the_same(kind: str, alpha: float) -> None:
    host, grown, slot = grown_host(kind)
    seed = plant(grown, slot, alpha=alpha)
    if alpha == 0.0:
        with torch.no_grad():
            next(seed.parameters()).fill_(float("nan"))
    example = host.example if kind == "stack" else {**host.example, "use_cache": False}
    host = BlockHost(host.model, host.blocks, example, host.sites)
    eager = host.output(grown.model.eval())
    wanted = gradients(grown.model, eager)
    torch._dynamo.reset()
    compiled = host.output(torch.compile(grown.model, backend="aot_eager"))
    found = gradients(grown.model, compiled)
    assert bits(eager, compiled) if alpha in (0.0, 1.0) else torch.allclose(eager, compiled)
    exact = alpha in (0.0, 1.0) and kind == "stack"
    for name, grad in wanted.items():
        if alpha > 0.0 or not name.startswith("esper_slots"):
            assert bits(grad, found[name]) if exact else torch.allclose(grad, found[name], atol=1e-6), name


def test_alphas_per_sample_are_those_of_runs_apart() -> None:
    host, grown, slot = grown_host("stack")
    plant(grown, slot, alpha=1.0)
    alphas = torch.tensor([0.0, 0.25, 1.0, 0.0])
    with torch.no_grad(), grown.override({slot: alphas}):
        together = host.output(grown.model.eval())
    for row, alpha in enumerate(alphas.tolist()):
        with torch.no_grad(), grown.override({slot: alpha}):
            assert torch.allclose(together[row], host.output(grown.model)[row], rtol=0, atol=1e-14)
    with torch.no_grad(), grown.disabled():
        assert bits(together[0], host.output(grown.model)[0])


def test_activation_checkpointing_computes_the_same() -> None:
    found = []
    for checkpointed in (False, True):
        host, grown, slot = grown_host("gpt2")
        plant(grown, slot, alpha=0.5)
        if checkpointed:
            grown.model.activation_checkpointing_enable()
        torch.manual_seed(2)
        found.append(gradients(grown.model, host.output(grown.model.train())))
    assert found[0].keys() == found[1].keys()
    assert all(bits(grad, found[1][name]) for name, grad in found[0].items())


def test_a_deep_copy_mid_life_has_a_block_of_its_own() -> None:
    host, grown, slot = grown_host("stack")
    plant(grown, slot, alpha=0.5)
    twin = copy.deepcopy(grown.model)
    assert bits(host.output(twin), host.output(grown.model))
    with torch.no_grad():
        next(twin.esper_slots[slot].seed.parameters()).zero_()
    assert not torch.equal(host.output(twin), host.output(grown.model))


def test_pruned_it_leaves_no_trace() -> None:
    host, grown, slot = grown_host("gpt2")
    before = dict.fromkeys(grown.model.state_dict())
    plant(grown, slot, alpha=1.0)
    grown.slots[slot].uproot()
    assert dict.fromkeys(grown.model.state_dict()) == before
    assert bits(host.output(grown.model.eval()), host.output(host.model.eval()))


@pytest.mark.parametrize("kind", ["stack", "gpt2", pytest.param("resnet", marks=pytest.mark.slow)])
def test_its_cost_is_that_of_the_block_in_the_host(kind: str) -> None:
    host, grown, slot = grown_host(kind)
    fits, _ = find_fits(grown, host.example, identity=False, patterns=())
    cost = copy_cost(grown, slot, fits[slot])
    by_hand = attach(deeper(host, grown, slot), host.sites, host.example)
    longer, shorter = host_cost(by_hand, host.example), host_cost(grown, host.example)
    assert cost.forward == longer.forward - shorter.forward > 0
    assert cost.full == longer.backward - shorter.backward > 0


# refusals -----------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A model with one block of some kind."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.head = block, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


class NoSkip(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


class Widening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc2 = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(x)[:, :8] + x


class Scaled(Widening):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(x) + 2 * x


class Unnamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Memory(Unnamed):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(8))


def hooked() -> nn.Module:
    block = Unnamed()
    block.register_forward_hook(lambda m, a, out: None)
    return block


@pytest.mark.parametrize(
    ("block", "identity", "why"),
    [
        (NoSkip(), False, "has no skip"),
        (Scaled(), True, "is not the identity with fc2 at zero"),
        (Unnamed(), True, "no last projection of a known name; name them by slots.copy_zero"),
        (nn.LayerNorm(8), True, "has no skip"),
        (nn.Tanh(), False, "has no parameters"),
        (Memory(), False, "keeps the float buffer queue"),
        (hooked(), False, "has a hook of its own"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_block_that_cannot_be_copied_says_why(block: nn.Module, identity: bool, why: str) -> None:
    grown = attach(Odd(block), {"r0c0": "block"}, torch.randn(3, 8))
    fits, reasons = find_fits(grown, grown.example, identity=identity, patterns=())
    assert not fits
    assert why in reasons["r0c0"]
    assert "'block'" in reasons["r0c0"]


def test_projections_are_named_by_the_user() -> None:
    grown = attach(Odd(Unnamed()), {"r0c0": "block"}, torch.randn(3, 8))
    fits, _ = find_fits(grown, grown.example, identity=True, patterns=["inner"])
    assert fits["r0c0"].zeroed == ("inner",)


def test_a_block_with_another_site_in_it_and_one_that_is_shared_say_so() -> None:
    host = block_host("stack")
    host.model.blocks[1].up.weight = host.model.blocks[0].up.weight
    sites = {"r0c0": "blocks.0", "r1c0": "blocks.1", "r1c1": "blocks.1.fc2"}
    grown = attach(host.model, sites, host.example)
    _, reasons = find_fits(grown, host.example, identity=False, patterns=())
    assert "shares parameters with the rest of the model (blocks.1.up.weight)" in reasons["r0c0"]
    assert "holds the site of slot r1c1" in reasons["r1c0"]


def test_without_an_example_it_is_refused() -> None:
    grown = attach(Odd(Unnamed()), {"r0c0": "block"}, torch.randn(3, 8))
    with pytest.raises(ConfigError, match="needs an example"):
        find_fits(grown, None, identity=False, patterns=())
