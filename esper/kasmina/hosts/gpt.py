"""A small GPT: token and learned position embeddings, pre-LN blocks with causal attention, byte-level by default.

After Radford et al. 2019: weights are N(0, 0.02); those that write into the residual stream are narrower by
sqrt(2 * layers).
The head is tied to the token embedding (Press & Wolf 2017): one parameter under two names, ``tokens.weight`` and
``head.weight``; it is owned, counted and optimised once.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from esper.kasmina.hosts.configs import SITES, GPTConfig
from esper.kasmina.hosts.registry import InjectionPoint
from esper.kasmina.hosts.resume import State, join_slots, order_indices
from esper.leyline.errors import ConfigError
from esper.leyline.slots import parse_slot
from esper.leyline.topology import Topology

INIT_STD = 0.02
SITE_ORDER = ("attention", "mlp", "block")


def _slot(row: int, site: str) -> str:
    """Returns the slot id of a site in block ``row``."""
    return f"r{row}c{list(SITES).index(site)}"


def _row_and_site(slot: str) -> tuple[int, str]:
    """Returns the block and the site of a slot id."""
    row, col = parse_slot(slot)
    return row, list(SITES)[col]


class Block(nn.Module):
    """A pre-LN block: x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Returns the same shape; position t sees 0..t."""
        x_BTC = x_BTC + self.project(self.attend(x_BTC))
        return x_BTC + self.down(self.widen(x_BTC))

    def attend(self, x_BTC: Tensor) -> Tensor:
        """Computes the input of the attention's output projection, same shape."""
        qkv = self.qkv(self.norm1(x_BTC)).unflatten(-1, (3, self.heads, -1))
        q_BHTD, k_BHTD, v_BHTD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHTD = scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        return mixed_BHTD.transpose(1, 2).flatten(-2)

    def widen(self, x_BTC: Tensor) -> Tensor:
        """Computes the input of the MLP's second layer, [B, T, 4C]."""
        return gelu(self.up(self.norm2(x_BTC)))


class GPT(nn.Module):
    """Causal language model over ``vocabulary`` tokens.

    Slot map (row = block; each column where ``sites`` names it, only c0 by default):

        slot       feature [B, T, dim]                                               module
        r{l}c0     block: the residual stream after block l                          blocks.{l}
        r{l}c1     attention: what its attention is about to add to that stream      blocks.{l}.project
        r{l}c2     mlp: what its MLP is about to add to that stream                  blocks.{l}.down

    They run in the order c1, c2, c0 (`slot_order`). The keys of the state dict do not depend on ``sites``.

    Args:
        config: see `GPTConfig`.
        vocabulary: tokens V; 256 for bytes.
    """

    def __init__(self, config: GPTConfig, *, vocabulary: int) -> None:
        super().__init__()
        self.block = config.block
        self.sites = tuple(site for site in SITES if site in config.sites)
        self.tokens = nn.Embedding(vocabulary, config.dim)
        self.positions = nn.Embedding(config.block, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, vocabulary, bias=False)
        self._initialise(config.layers)
        if config.tied:
            self.head.weight = self.tokens.weight

    def _initialise(self, layers: int) -> None:
        for name, tensor in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(tensor)
            elif tensor.ndim == 2:
                writes = name.endswith(("project.weight", "down.weight"))
                nn.init.normal_(tensor, std=INIT_STD / math.sqrt(2 * layers) if writes else INIT_STD)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Maps [B, T] int64 to logits [B, T, V] of the next token at each position.

        Raises:
            ValueError: T is larger than ``block``.
        """
        x_BTC = self._embed(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.head(self.norm(x_BTC))

    def _embed(self, tokens_BT: Tensor) -> Tensor:
        length = tokens_BT.shape[1]
        if length > self.block:
            raise ValueError(f"a sequence of {length} tokens: this GPT takes at most host.block = {self.block}")
        return self.tokens(tokens_BT) + self.positions(torch.arange(length, device=tokens_BT.device))

    def slot_order(self) -> tuple[str, ...]:
        """Returns slot ids in the order of execution: block by block, in each c1, c2, c0."""
        return tuple(_slot(row, site) for row in range(len(self.blocks)) for site in SITE_ORDER if site in self.sites)

    def forward_to(self, x: Tensor, slot: str) -> State:
        """See `hosts.resume`. x is [B, T] int64; inside a block state[1] is the stream that state[0] is added to.

        Raises:
            ValueError: T is larger than ``block``.
            ConfigError: no such slot.
        """
        order_indices(self.slot_order(), slot, None)
        return self._run(self._embed(x), 0, slot)

    def forward_from(self, state: State, slot: str, *, until: str | None = None) -> Any:
        """See `hosts.resume`.

        Raises:
            ConfigError: no such slot.
            ValueError: ``until`` does not come after ``slot``.
        """
        order_indices(self.slot_order(), slot, until)
        row, site = _row_and_site(slot)
        feature_BTC = join_slots(self, f"blocks.{row}{SITES[site]}", state[0])
        if site == "block":
            return self._run(feature_BTC, row + 1, until)
        x_BTC, block = state[1] + feature_BTC, self._block(row)
        here = until is not None and _row_and_site(until)[0] == row
        if site == "attention":
            if until == _slot(row, "mlp"):
                return block.down.forward(block.widen(x_BTC)), x_BTC
            x_BTC = x_BTC + block.down(block.widen(x_BTC))
        return (x_BTC,) if here else self._run(join_slots(self, f"blocks.{row}", x_BTC), row + 1, until)

    def _block(self, row: int) -> Block:
        block = self.blocks[row]
        assert isinstance(block, Block)
        return block

    def _run(self, x_BTC: Tensor, row: int, until: str | None) -> Any:
        """Runs from the stream before block ``row`` to a later slot, or to the output."""
        if until is None:
            for block in self.blocks[row:]:
                x_BTC = block(x_BTC)
            return self.head(self.norm(x_BTC))
        last, site = _row_and_site(until)
        for before in self.blocks[row:last]:
            x_BTC = before(x_BTC)
        block = self._block(last)
        if site == "block":
            return (block.forward(x_BTC),)
        if site == "attention":
            return block.project.forward(block.attend(x_BTC)), x_BTC
        x_BTC = x_BTC + block.project(block.attend(x_BTC))
        return block.down.forward(block.widen(x_BTC)), x_BTC

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        """Returns the places for seeds, row-major; see the slot map above."""
        return tuple(
            InjectionPoint(slot=_slot(row, site), module=f"blocks.{row}{SITES[site]}", topology=Topology.SEQUENCE)
            for row in range(len(self.blocks))
            for site in self.sites
        )


def build_gpt(config: GPTConfig, *, input_shape: tuple[int, ...], classes: int) -> GPT:
    """Builds the host for token sequences; ``classes`` is the vocabulary.

    Raises:
        ConfigError: ``input_shape`` is not (T,), or T is larger than ``block``.
    """
    if len(input_shape) != 1:
        raise ConfigError(f"host.kind = 'gpt': needs sequences of shape (T,), the data has {input_shape}")
    if input_shape[0] > config.block:
        raise ConfigError(f"host.block = {config.block}: the data has sequences of {input_shape[0]} tokens")
    return GPT(config, vocabulary=classes)
