"""Kinds of hosts that real models are of, as small as they can be, each with batches and a loss per sample."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import checkpointed, in_place

B, C, T, CLASSES, WORDS = 8, 8, 5, 3, 29


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Recurrent(nn.Module):
    """nn.LSTM as torch builds it: features [T, B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.site, self.head = nn.Linear(4, 4), nn.LSTM(4, C), nn.Linear(C, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.site(torch.tanh(self.stem(x)).transpose(0, 1))
        return self.head(x.mean(0))


class Encoder(nn.Module):
    """nn.TransformerEncoder as torch builds it: features [T, B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, C)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 2, 16, 0.1), 2, enable_nested_tensor=False)
        self.head = nn.Linear(C, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x).transpose(0, 1)).mean(0))


class Waves(nn.Module):
    """A stack of 1-D convolutions on raw signals: features [B, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.site = nn.Conv1d(1, C, 3, padding=1), nn.Conv1d(C, C, 3, stride=2, padding=1)
        self.last, self.head = nn.Conv1d(C, C, 3, padding=1), nn.Linear(C, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.last(F.gelu(self.site(F.gelu(self.stem(x)))))).mean(2))


class Residual(nn.Module):
    """Two residual blocks with BatchNorm; the site is the first."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Conv2d(C, C, 3, padding=1, bias=False) for _ in range(2))
            self.norm, self.last = nn.BatchNorm2d(C), nn.BatchNorm2d(C)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.last(self.two(self.relu(self.norm(self.one(x)))))
            y += x
            return self.relu(y)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.site, self.rest, self.head = self.Block(), self.Block(), nn.Linear(C, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rest(self.site(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


class Dropping(nn.Module):
    """An encoder whose layers are left out at random in train(); ``site`` is what always runs between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.site, self.head = nn.Linear(4, C), nn.LayerNorm(C), nn.Linear(C, CLASSES)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(C, 2, 16, 0.0, batch_first=True) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, layer in enumerate(self.layers):
            if index == 2:
                x = self.site(x)
            if not self.training or float(torch.rand(())) > 0.3:
                x = layer(x)
        return self.head(x.mean(1))


class ClassToken(nn.Module):
    """A ViT: patches, a learnt token in front that classifies, blocks that see both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, C, 2, stride=2)
        self.token, self.place = nn.Parameter(torch.zeros(1, 1, C)), nn.Parameter(0.02 * torch.randn(1, 10, C))
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(C, 2, 16, 0.0, batch_first=True) for _ in range(2))
        self.head = nn.Linear(C, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


class Tied(nn.Module):
    """A language model: embedding and output are one tensor, the layer between is normalised (weight_norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(WORDS, C), nn.Linear(C, WORDS, bias=False)
        self.out.weight = self.embed.weight
        self.site = nn.utils.parametrizations.weight_norm(nn.Linear(C, C))
        self.mix = nn.GRU(C, C, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.site(self.mix(self.embed(tokens))[0])))


class Adapted(nn.Module):
    """A network whose layers are frozen, each with a trainable product of two thin matrices beside it, as peft builds.

    The adapter's second matrix begins with zeros.
    """

    class Linear(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.base_layer = nn.Linear(inputs, outputs).requires_grad_(False)
            self.lora_A, self.lora_B = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
            nn.init.zeros_(self.lora_B.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + 2.0 * self.lora_B(self.lora_A(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.site, self.head = self.Linear(6, C), self.Linear(C, C), self.Linear(C, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.site(torch.tanh(self.stem(x)))))


def llama() -> nn.Module:
    """Llama of transformers with random weights; it generates."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=C,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def peft() -> nn.Module:
    """The same by the peft library, around a plain network."""
    from peft import LoraConfig, get_peft_model

    layers = OrderedDict(stem=nn.Linear(6, C), low=nn.Tanh(), site=nn.Linear(C, C), high=nn.Tanh())
    model = nn.Sequential(OrderedDict(**layers, head=nn.Linear(C, CLASSES)))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["stem", "site", "head"]))


@dataclass(frozen=True)
class Kind:
    """A kind of host.

    Fields:
        build: builds it; weights come from the global random stream.
        site: module with the slot.
        below: prefix of parameters below the site, which must keep a gradient.
        shape: of the inputs, without the batch axis; None for tokens.
        blueprint: of the seed.
        language: its targets are the next tokens.
        generates: it has ``generate()``.
        needs: library that must be installed.
        may_skip: train() may leave the site out.
    """

    build: Callable[[], nn.Module]
    site: str
    below: str
    shape: tuple[int, ...] | None
    blueprint: str
    language: bool = False
    generates: bool = False
    needs: str | None = None
    may_skip: bool = False

    def make(self, dtype: torch.dtype) -> nn.Module:
        """The same host at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return self.build().to(dtype)

    def batch(self, number: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Inputs and targets; they have to do with each other."""
        y = torch.randint(CLASSES, (B,), generator=torch.Generator().manual_seed(1000 + number))
        if self.shape is None:
            tokens = torch.randint(WORDS, (B, T + 1), generator=torch.Generator().manual_seed(number + 5000))
            return tokens[:, :-1], (tokens[:, :-1] * 3 + 1) % WORDS if self.language else y
        x = _normal(B, *self.shape, seed=number + 5000) + 0.7 * y.view(-1, *[1] * len(self.shape))
        return x.to(dtype), y


def logits_of(output: Any) -> Tensor:
    """The logits, whatever holds them."""
    return output if isinstance(output, Tensor) else output.logits


def ask(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and correctness of each sample; a sequence is one."""
    logits = logits_of(model(batch[0])).float()
    loss = F.cross_entropy(logits.movedim(-1, 1), batch[1], reduction="none")
    right = (logits.argmax(-1) == batch[1]).double()
    return (loss, right) if loss.ndim == 1 else (loss.mean(1), right.mean(1))


def _stack(form: str) -> Callable[[], nn.Module]:
    return lambda: checkpointed.Stack(form, drop=0.1)


KINDS: dict[str, Kind] = {
    "in place": Kind(lambda: in_place.Host("add"), "site", "stem", (1, 6, 6), "conv_light"),
    "checkpointed": Kind(_stack("default"), "blocks.1", "stem", (3, 5), "mlp_small"),
    "checkpointed reentrant": Kind(_stack("reentrant"), "blocks.1", "stem", (3, 5), "mlp_small"),
    "LSTM TBC": Kind(Recurrent, "site", "stem", (T, 4), "mlp_small"),
    "encoder TBC": Kind(Encoder, "encoder.layers.0", "stem", (T, 4), "attention"),
    "Conv1d": Kind(Waves, "site", "stem", (1, 12), "conv_light"),
    "BatchNorm ResNet": Kind(Residual, "site", "stem", (1, 6, 6), "conv_light"),
    "Llama": Kind(
        llama,
        "model.layers.0",
        "model.embed_tokens",
        None,
        "attention",
        language=True,
        generates=True,
        needs="transformers",
    ),
    "LayerDrop": Kind(Dropping, "layers.1", "stem", (T, 4), "attention", may_skip=True),
    "LayerDrop, between": Kind(Dropping, "site", "stem", (T, 4), "mlp_small"),
    "ViT": Kind(ClassToken, "blocks.0", "patch", (1, 6, 6), "attention"),
    "tied, normalised": Kind(Tied, "site", "embed", None, "lora", language=True),
    "low-rank adapted": Kind(Adapted, "site", "stem.lora", (6,), "mlp"),
    "peft": Kind(peft, "base_model.model.site", "base_model.model.stem.lora", (6,), "mlp", needs="peft"),
}
