"""Text generation by grown models of the transformers library: with a cache as without one, grown and exported."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.births.build import birth_key, build_gate, build_seed
from esper.kasmina.blueprints import Mixing, Positions
from esper.kasmina.blueprints.parts import LayerScale
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology

transformers = pytest.importorskip("transformers", reason="transformers is not among the project's dependencies")

TOKENS = torch.arange(14).view(2, 7) % 29
ENDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
WORDS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
LEFT = 4  # positions of padding


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=29, n_positions=32, n_embd=16, n_layer=3, n_head=2, **ENDS)
    return transformers.GPT2LMHeadModel(config)


def llama_like(kind: str = "Llama", **more: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=29,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=64,
        **ENDS,
        **more,
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def windowed() -> nn.Module:
    """Its cache keeps six positions."""
    return llama_like("Mistral", sliding_window=6)


def plant(grown: Grown, name: str = "attention", alpha: float = 1.0) -> None:
    for slot, site in grown.sites.items():
        key, holder = birth_key(1, slot, 1), grown.slots[slot]
        seed = build_seed(name, dim=site.dim, topology=site.topology, key=key, dtype=torch.float32, device="cpu")
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.mul_(3.0)
        holder.plant(seed)
        holder.phase = Phase.BLEND
        holder.set_alpha(alpha)


def grow(build: Callable[[], nn.Module], pattern: str, name: str = "attention", alpha: float = 1.0) -> Grown:
    torch.manual_seed(1)
    grown = attach(build().eval(), pattern, {"input_ids": TOKENS})
    plant(grown, name, alpha)
    return grown


def padded(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens with padding on the left, and their mask."""
    blank = torch.zeros(len(tokens), LEFT, dtype=torch.long)
    return torch.cat([blank, tokens], 1), torch.cat([blank, torch.ones_like(tokens)], 1)


def generate(model: Any, *, cached: bool, left: bool = False, **more: Any) -> Tensor:
    tokens, mask = padded(TOKENS) if left else (TOKENS, torch.ones_like(TOKENS))
    return model.generate(tokens, attention_mask=mask, use_cache=cached, **WORDS, **more)[:, LEFT if left else 0 :]


@pytest.mark.parametrize(
    ("build", "pattern", "name"),
    [
        (gpt2, r"transformer\.h\.\d+", "attention"),
        pytest.param(gpt2, r"transformer\.h\.\d+\.mlp", "flex_attention", marks=pytest.mark.slow),
        pytest.param(llama_like, r"model\.layers\.\d+", "flex_attention", marks=pytest.mark.slow),
        (llama_like, r"model\.layers\.\d+\.(self_attn|mlp)", "attention"),
        pytest.param(windowed, r"model\.layers\.\d+", "attention", marks=pytest.mark.slow),
    ],
)
def test_a_cache_and_padding_on_the_left_change_nothing_grown_and_exported(
    build: Callable[[], nn.Module], pattern: str, name: str
) -> None:
    grown = grow(build, pattern, name)
    plain = grown.export()
    wanted = generate(grown.model, cached=False)
    beams = generate(grown.model, cached=False, num_beams=3)
    with grown.disabled():
        assert not torch.equal(generate(grown.model, cached=True), wanted), "the seeds matter"
    for model in (grown.model, plain, pickle.loads(pickle.dumps(plain)), copy.deepcopy(grown.model)):
        assert torch.equal(generate(model, cached=True), wanted)
        assert torch.equal(generate(model, cached=True, num_beams=3), beams), "beams reorder the seed's keys too"
        assert torch.equal(generate(model, cached=True, left=True), wanted)
    assert torch.equal(generate(grown.model, cached=False, left=True), wanted)
    assert torch.equal(generate(plain, cached=False), wanted)


@pytest.mark.parametrize("cache", ["made by the model", "made by hand"])
@torch.no_grad()
def test_logits_of_a_cached_step_are_those_of_the_whole(cache: str) -> None:
    grown = grow(gpt2, r"transformer\.h\.\d+")
    model: Any = grown.model
    past = transformers.DynamicCache() if cache == "made by hand" else None  # grows a layer at a time
    first = model(input_ids=TOKENS[:, :4], past_key_values=past, use_cache=True)
    second = model(input_ids=TOKENS[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    whole = model(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-4)
    assert len(second.past_key_values.layers) == 6, "three of the host, three of the seeds"


@torch.no_grad()
def test_a_site_below_the_first_layer_needs_the_cache_from_the_beginning() -> None:
    grown = grow(gpt2, r"transformer\.drop")
    model: Any = grown.model
    assert torch.equal(generate(model, cached=True), generate(model, cached=False))
    first = model(input_ids=TOKENS[:, :4], use_cache=True)  # the model makes it behind the site
    with pytest.raises(ConfigError, match=r"slot r0c0: the cache holds 4 positions, of which its seed has seen 0"):
        model(input_ids=TOKENS[:, 4:], past_key_values=first.past_key_values)
    with pytest.raises(AssertionError, match="slot r0c0 is exported without a cache; call with use_cache=False"):
        generate(grown.export(), cached=True)
    assert torch.equal(generate(grown.export(), cached=False), generate(model, cached=False))


class Neighbour(Mixing):
    """Sees the position before, and keeps nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = LayerScale(dim, Topology.SEQUENCE)

    def forward(self, x: Tensor, positions: Positions = Positions()) -> Tensor:
        return self.scale(nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


@torch.no_grad()
def test_what_cannot_follow_a_cache_is_refused_by_name() -> None:
    grown = grow(gpt2, r"transformer\.h\.1")
    model, holder = grown.model, grown.slots["r0c0"]
    first: Any = model(input_ids=TOKENS[:, :4], use_cache=True)

    def step() -> None:
        model(input_ids=TOKENS[:, 4:5], past_key_values=copy.deepcopy(first.past_key_values))

    step()
    seed = holder.seed
    assert seed is not None
    static = transformers.StaticCache(config=model.config, max_cache_len=16)
    with pytest.raises(ConfigError, match=r"slot r0c0: its seed mixes positions and cannot keep .* in a StaticCache;"):
        model(input_ids=TOKENS, past_key_values=static)
    holder.uproot()
    first = model(input_ids=TOKENS[:, :4], use_cache=True)
    plant(grown)
    with pytest.raises(ConfigError, match="holds 5 positions, of which its seed has seen 0; begin with an empty cache"):
        step()
    holder.uproot()
    plant(grown, "mlp_small", 0.5)
    step()
    holder.operator = Operator.GATE
    holder.gate = build_gate(dim=16, topology=Topology.SEQUENCE, key=1, dtype=torch.float32, device="cpu")
    model(input_ids=TOKENS)
    with pytest.raises(ConfigError, match="slot r0c0: GATE pools over all positions and lacks those before this call"):
        step()
    holder.uproot()
    holder.plant(Neighbour(16))
    holder.phase = Phase.BLEND
    holder.set_alpha(1.0)
    model(input_ids=TOKENS)
    with pytest.raises(ConfigError, match="slot r0c0: Neighbour mixes positions and lacks those before this"):
        step()


def test_training_keeps_nothing_in_the_cache_that_the_host_makes() -> None:
    grown = grow(gpt2, r"transformer\.h\.\d+")
    out: Any = grown.model.train()(input_ids=TOKENS, labels=TOKENS)
    assert len(out.past_key_values.layers) == 3
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for _, p in grown.owner_parameters()["r0c0"])
    assert pickle.dumps(grown.model)
