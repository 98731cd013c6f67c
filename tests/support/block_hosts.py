"""Trained-looking hosts whose blocks can be copied: of transformers, and a plain residual stack."""

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

TOKENS = {"input_ids": torch.arange(14).view(2, 7) % 29}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        added = self.fc2(torch.tanh(self.up(self.norm(x))))
        return x + (added if mask is None else added * mask)


class Stack(nn.Module):
    """A plain residual stack of one's own; every block is called with a mask beside the features."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Residual() for _ in range(2)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = (x[:, :1] > 0).to(x.dtype)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(x)


@dataclass(frozen=True)
class BlockHost:
    """A host, the list that holds its blocks, an example, and a pattern of sites."""

    model: nn.Module
    blocks: str
    example: Any
    sites: str

    def output(self, model: nn.Module) -> Tensor:
        out = model(**self.example) if isinstance(self.example, dict) else model(self.example)
        return out if isinstance(out, Tensor) else out.logits


def block_host(kind: str) -> BlockHost:
    torch.manual_seed(3)
    if kind == "stack":
        return BlockHost(Stack().double(), "blocks", ROWS.double(), r"blocks\.\d+")
    pytest.importorskip("transformers", reason="transformers is not installed")
    transformers = importlib.import_module("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=29, n_positions=32, n_embd=16, n_layer=2, n_head=2)
        return BlockHost(transformers.GPT2LMHeadModel(config), "transformer.h", TOKENS, r"transformer\.h\.\d+")
    if kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=29,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
        return BlockHost(transformers.LlamaForCausalLM(config), "model.layers", TOKENS, r"model\.layers\.\d+")
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
            num_labels=3,
        )
        model = transformers.ViTForImageClassification(config)
        blocks = next(name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
        return BlockHost(model, blocks, PIXELS, rf"{blocks}\.\d+".replace("vit.", r"vit\."))
    assert kind == "resnet"
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    return BlockHost(model, "resnet.encoder.stages.1.layers", PIXELS, r"resnet\.encoder\.stages\.1\.layers\.1")
