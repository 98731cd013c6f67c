"""An agent for observations that are a vector: encoder, core, heads that may wait for an option of another, critic."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.tamiyo.policy.agent import Agent
from esper.tamiyo.policy.heads import Batch, Chooser


@dataclass(frozen=True, slots=True)
class Head:
    """A head of a `FlatAgent`.

    Fields:
        name: whose mask is ``mask_<name>`` in the observation, if there is one.
        options: how many.
        needs: head and option without which this one does not matter; None: it always matters.
    """

    name: str
    options: int
    needs: tuple[str, int] | None = None


def _linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class FlatAgent(Agent):
    """Encodes ``x`` by a layer of tanh units; a later head sees which options the earlier ones took.

    Args:
        inputs: width of ``x``.
        heads: in the order in which they are picked.
        width: units of the encoder.
        hidden: width of the core; 0: a second layer in its place, and no memory.
    """

    def __init__(self, inputs: int, heads: Sequence[Head], *, width: int = 64, hidden: int = 0) -> None:
        super().__init__(width, hidden)
        self.heads = tuple(heads)
        self.encoder = nn.Sequential(_linear(inputs, width, 2**0.5), nn.Tanh())
        if not hidden:
            self.encoder.extend([_linear(width, width, 2**0.5), nn.Tanh()])
        known, before = hidden or width, 0
        self.logits = nn.ModuleDict()
        for head in self.heads:
            self.logits[head.name] = _linear(known + before, head.options, 0.01)
            before += head.options
        self.critic = _linear(known, 1, 1.0)

    def encode(self, observation: Batch) -> tuple[Tensor, None]:
        """Returns features [..., width]."""
        return self.encoder(observation["x"]), None

    def choose(self, x: Tensor, context: None, observation: Batch, chooser: Chooser) -> None:
        """Picks head by head."""
        taken: Batch = {}
        for head in self.heads:
            logits = self.logits[head.name](x)
            mask = observation.get(f"mask_{head.name}")
            if mask is None:
                mask = torch.ones_like(logits, dtype=torch.bool)
            matters = None if head.needs is None else taken[head.needs[0]] == head.needs[1]
            taken[head.name] = chooser.pick(head.name, logits, mask, matters)
            x = torch.cat([x, nn.functional.one_hot(taken[head.name], head.options).to(x.dtype)], -1)

    def evaluate(self, x: Tensor, context: None, observation: Batch) -> Tensor:
        """Returns the expected return [...]."""
        return self.critic(x).squeeze(-1).float()
