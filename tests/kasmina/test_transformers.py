"""Models of the transformers library, with random weights from tiny configurations."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.export.exporter import export
from esper.kasmina.export.writing import save_exported
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import Phase
from esper.leyline.topology import Topology
from tests.support.bitwise import bits
from tests.support.working_seeds import without_esper

transformers = pytest.importorskip("transformers", reason="transformers is not among the project's dependencies")

TOKENS = {"input_ids": torch.arange(14).view(2, 7) % 29}
BOTH = {**TOKENS, "decoder_input_ids": (torch.arange(10).view(2, 5) * 3) % 29}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=29, n_positions=16, n_embd=16, n_layer=3, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config)


def convnext() -> nn.Module:
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, num_labels=3)
    return transformers.ConvNextForImageClassification(config)


def t5() -> nn.Module:
    """An encoder and a decoder over one embedding."""
    config = transformers.T5Config(
        vocab_size=29, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = [
    pytest.param(gpt2, r"transformer\.h\.\d+", TOKENS, Topology.SEQUENCE, 3, id="gpt2"),
    pytest.param(gpt2, r"transformer\.h\.\d+\.attn", TOKENS, Topology.SEQUENCE, 3, id="gpt2 attention"),
    pytest.param(gpt2, "transformer", TOKENS, Topology.SEQUENCE, 1, id="gpt2 body"),
    pytest.param(resnet, r"resnet\.encoder\.stages\.\d+", PIXELS, Topology.FEATURE_MAP, 2, id="resnet"),
    pytest.param(resnet, r"resnet\.embedder", PIXELS, Topology.FEATURE_MAP, 1, id="resnet stem"),
    pytest.param(vit, r"vit\.(layers|encoder\.layer)\.\d+", PIXELS, Topology.SEQUENCE, 2, id="vit"),
    pytest.param(convnext, r"convnext\.encoder\.stages\.\d+", PIXELS, Topology.FEATURE_MAP, 2, id="convnext"),
    pytest.param(t5, r"(encoder|decoder)\.block\.\d+", BOTH, Topology.SEQUENCE, 4, id="t5"),
    pytest.param(t5, r"(encoder|decoder)", BOTH, Topology.SEQUENCE, 2, id="t5 halves", marks=pytest.mark.slow),
]


def run(model: nn.Module, example: dict[str, Tensor], training: bool = False) -> Any:
    torch.manual_seed(9)
    return model.train(training)(**example)


def grow(grown: Grown) -> None:
    for slot, site in grown.sites.items():
        name = "conv_light" if site.topology is Topology.FEATURE_MAP else "mlp_small"
        key = birth_key(1, slot, 1)
        seed = build_seed(name, dim=site.dim, topology=site.topology, key=key, dtype=torch.float32, device="cpu")
        grown.slots[slot].plant(seed)
        grown.slots[slot].phase = Phase.BLEND
        grown.slots[slot].set_alpha(0.5)


@pytest.mark.parametrize(("build", "pattern", "example", "topology", "count"), MODELS)
def test_a_model_from_transformers_grows(build, pattern, example, topology, count):
    torch.manual_seed(1)
    host = build()
    model = copy.deepcopy(host)
    grown = attach(model, pattern, example)
    assert [site.topology for site in grown.sites.values()] == [topology] * count
    assert list(model.state_dict()) == list(host.state_dict())
    assert bits(run(model, example), run(host, example))
    assert bits(run(model, example, training=True), run(host, example, training=True))
    assert grown.parameters_without_gradient(**example) == []
    grow(grown)
    with grown.disabled():
        assert bits(run(model, example).logits, run(host, example).logits)
    out = run(model, example)
    assert type(out) is type(run(host, example))
    assert not bits(out.logits, run(host, example).logits)
    (out.logits * torch.randn(out.logits.shape)).sum().backward()
    seeds = {name: p.grad for name, p in model.named_parameters() if name.startswith(CONTAINER)}
    assert all(grad is not None and grad.abs().sum() > 0 for grad in seeds.values())
    assert bits(run(copy.deepcopy(model), example).logits, run(model, example).logits)


@pytest.mark.parametrize(("build", "pattern", "example", "topology", "count"), MODELS)
def test_it_is_exported_to_the_same_bits_under_its_own_keys_and_class(build, pattern, example, topology, count):
    torch.manual_seed(1)
    host = build()
    grown = attach(copy.deepcopy(host), pattern, example)
    grow(grown)
    exported = export(grown, fold=False, partial=True)
    assert type(exported.module) is type(host)
    assert set(host.state_dict()) <= set(exported.module.state_dict())
    assert not [part for part in exported.module.modules() if type(part).__module__.startswith("esper")]
    got, expected = run(exported.module, example), run(grown.model, example)
    assert type(got) is type(expected)
    assert bits(got.logits, expected.logits)


def test_an_exported_gpt2_generates_and_an_exported_t5_too():
    """The cache of keys and values goes through the hooks."""
    for build, pattern, prompt in (
        (gpt2, r"transformer\.h\.\d+", TOKENS),
        (t5, r"(encoder|decoder)\.block\.\d+", BOTH),
    ):
        torch.manual_seed(1)
        grown = attach(build(), pattern, prompt)
        grow(grown)
        words = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        tokens = prompt["input_ids"]
        given = {"attention_mask": torch.ones_like(tokens), **words}
        expected = grown.model.eval().generate(tokens, **given)
        assert torch.equal(grown.export(partial=True).generate(tokens, **given), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "pattern", "example"),
    [
        (gpt2, r"transformer\.h\.\d+\.attn", TOKENS),
        (resnet, r"resnet\.encoder\.stages\.\d+", PIXELS),
        (t5, r"(encoder|decoder)\.block\.\d+", BOTH),
    ],
    ids=["gpt2", "resnet", "t5"],
)
def test_a_written_model_runs_where_there_is_neither_esper_nor_transformers(build, pattern, example, tmp_path):
    torch.manual_seed(1)
    grown = attach(build(), pattern, example)
    grow(grown)
    save_exported(export(grown, partial=True), tmp_path / "out")
    torch.save(example, tmp_path / "inputs.pt")
    script = (
        "sys.modules['transformers'] = None; import torch\n"
        "model = torch.export.load('out/program.pt2').module()\n"
        "torch.save(model(**torch.load('inputs.pt'))['logits'].detach(), 'outputs.pt')\n"
    )
    without_esper(script, tmp_path)
    got = torch.load(tmp_path / "outputs.pt")
    assert torch.allclose(got, run(grown.model, example).logits, atol=1e-4)


def test_incubation_of_gpt2_reaches_the_seed_alone_in_spite_of_tied_weights():
    grown = attach(gpt2(), r"transformer\.h\.\d+", TOKENS)
    grow(grown)
    grown.incubate("r1c0", **TOKENS, labels=TOKENS["input_ids"]).loss.backward()
    reached = [name for name, p in grown.model.named_parameters() if p.grad is not None]
    assert reached == [name for name, _ in grown.owner_parameters()["r1c0"]]


def test_gpt2_generates_with_active_slots():
    """A cache of keys and values: the sequence length changes from call to call."""
    grown = attach(gpt2(), r"transformer\.h\.\d+", TOKENS)
    grow(grown)
    prompt = TOKENS["input_ids"]
    out = grown.model.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert out.shape == (2, 11)
