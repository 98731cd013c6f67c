"""Models of the transformers library in a user's own loop: whole lives, and a fresh process that goes on to the bit."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.leyline.stages import Stage
from tests.support.dist import ROOT
from tests.support.patience import run_patiently
from tests.support.sessions import EVERY, GATES, LIFE, LIFE_STEPS, STAGES, replica, stages
from tests.support.tiny import act

transformers = pytest.importorskip("transformers", reason="transformers is not among the project's dependencies")


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return build().train()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=29, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    return seeded(lambda: transformers.GPT2LMHeadModel(config))


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return seeded(lambda: transformers.ResNetForImageClassification(config))


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return seeded(lambda: transformers.ViTForImageClassification(config))


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=29, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return seeded(lambda: transformers.T5ForConditionalGeneration(config))


def text(step: int, size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step + 50)
    first = torch.randint(29, (size, 1), generator=generator)
    return {"input_ids": (first + 3 * torch.arange(7)) % 29}


def pixels(step: int, size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step + 50)
    labels = torch.randint(3, (size,), generator=generator)
    images = torch.randn(size, 3, 16, 16, generator=generator) + labels.view(-1, 1, 1, 1)
    return {"pixel_values": images, "labels": labels}


def pairs(step: int, size: int = 8) -> dict[str, Tensor]:
    source = text(step, size)["input_ids"]
    return {"input_ids": source, "labels": source.flip(1)}


def tokens_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    targets = batch.get("labels", batch["input_ids"])
    logits = model(**batch).logits
    if "labels" not in batch:
        logits, targets = logits[:, :-1], targets[:, 1:]
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def image_loss(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logits = model(pixel_values=batch["pixel_values"]).logits
    right = (logits.argmax(1) == batch["labels"]).float()
    return F.cross_entropy(logits, batch["labels"], reduction="none"), right


MODELS: dict[str, tuple[Any, ...]] = {
    "gpt2": (gpt2, r"transformer\.h\.\d+", text, tokens_loss, ("mlp_small", "lora")),
    "resnet": (resnet, r"resnet\.encoder\.stages\.\d+", pixels, image_loss, ("conv_light", "norm")),
    "vit": (vit, r"vit\.(encoder\.layer|layers)\.\d+", pixels, image_loss, ("mlp_small", "lora")),
    "t5": (t5, {"r0c0": "encoder.block.1", "r1c0": "decoder.block.0"}, pairs, tokens_loss, ("mlp_small", "lora")),
}


def settings(name: str) -> dict[str, Any]:
    _, _, data, loss, _ = MODELS[name]
    return {"loss": loss, "probe": [data(-1 - i) for i in range(6)]}


def make(name: str) -> esper.Session:
    build, sites, data, _, blueprints = MODELS[name]
    model = build()
    example = {key: value for key, value in data(0, 2).items() if not (data is pixels and key == "labels")}
    grown = esper.attach(model, sites, example)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    names = dict(zip(grown.slots, blueprints, strict=True))
    actions = [act(e["tick"], e["slot"], e["op"], **_more(e, names)) for e in LIFE]
    return esper.Session(
        grown,
        optimizer,
        controller={"kind": "schedule", "actions": actions},
        gates=GATES,
        every=EVERY,
        slots={"incubation": "shadow", "max_live": None, "embargo_ticks": 1},
        **settings(name),
    )


def _more(entry: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    more = {key: value for key, value in entry.items() if key not in ("tick", "slot", "op")}
    return more | ({"blueprint": names[entry["slot"]]} if "blueprint" in more else {})


def train(session: esper.Session, name: str, steps: range) -> list[float]:
    data, losses = MODELS[name][2], []
    for step in steps:
        value = session.loss(data(step))
        value.backward()
        session.step()
        losses.append(value.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_a_model_from_transformers_lives_in_a_users_loop(name):
    torch.manual_seed(1)
    session = make(name)
    losses = train(session, name, range(LIFE_STEPS))
    assert stages(session) == STAGES
    assert sum(losses[-4:]) < sum(losses[:4])
    assert session.state.slot("r0c0").stage is Stage.FOSSILIZED
    if name == "gpt2":
        out = session.model.generate(text(0)["input_ids"][:2, :3], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert out.shape == (2, 6)


FRESH = """
import sys, torch, esper
from tests.session import test_transformers as mine
found = {}
for name in sys.argv[2:]:
    path = f"{sys.argv[1]}/{name}.pt"
    payload = torch.load(path, weights_only=True)
    assert any(key.startswith("esper_slots.r0c0.seed") for key in payload["model"]), name
    session = esper.Session.restore(path, mine.MODELS[name][0], **mine.settings(name))
    losses = mine.train(session, name, range(session.steps, mine.LIFE_STEPS))
    found[name] = (losses, mine.replica(session))
torch.save(found, f"{sys.argv[1]}/found.pt")
"""


def test_a_fresh_process_rebuilds_grown_models_and_goes_on_to_the_bit(tmp_path):
    wanted = {}
    for name in ("gpt2", "resnet"):
        torch.manual_seed(1)
        session = make(name)
        train(session, name, range(11))
        assert session.state.slot("r0c0").stage is Stage.BLENDING
        session.save(tmp_path / f"{name}.pt")
        wanted[name] = (train(session, name, range(11, LIFE_STEPS)), replica(session))
    command = [sys.executable, "-c", FRESH, str(tmp_path), *wanted]
    done = run_patiently(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(tmp_path / "found.pt", weights_only=True) == wanted
