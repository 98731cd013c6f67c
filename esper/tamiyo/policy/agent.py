"""An agent: a recurrent actor-critic over observations that are dicts of tensors. PPO drives any agent.

A subclass says how an observation becomes a vector (``encode``), and which heads it picks from (``choose``). The
recurrent core between them is the base class's: an LSTM whose state is zeroed where an episode starts, or none at all.
Masks travel inside the observation, so what was legal while acting is what is legal while learning.

Shapes: N environments, T ticks, D features of the core's input, H width of the core.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.tamiyo.policy.heads import Batch, Chooser, Greedy, Recorded, Sampled


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What an agent decided for each environment.

    Fields:
        actions: option per head, int64 [N].
        log_prob: joint log-probability, [N].
        value: expected return from here on, [N].
        state: state of the core after this observation, [N, 2H].
        log_probs: log-probability per head, [N]; 0 where a head does not matter.
    """

    actions: Batch
    log_prob: Tensor
    value: Tensor
    state: Tensor
    log_probs: Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What an agent says of decisions that were taken before; see `Decision`. All [T, N], with gradients.

    Fields:
        log_prob: joint log-probability.
        entropy: sum over heads, nats.
        value: expected return.
        entropies: entropy per head.
        matters: per head, where it matters.
    """

    log_prob: Tensor
    entropy: Tensor
    value: Tensor
    entropies: Batch
    matters: Batch


class Agent(nn.Module, ABC):
    """Base of agents.

    Args:
        inputs: D, width of what ``encode`` returns.
        hidden: H, width of the core; 0 is an agent without memory, whose heads get the D features themselves.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.core = nn.LSTM(inputs, hidden) if hidden else None
        if self.core is not None:
            for name, parameter in self.core.named_parameters():
                nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)

    @abstractmethod
    def encode(self, observation: Batch) -> tuple[Tensor, Any]:
        """Returns features [..., D] of an observation with rows [...], and what ``choose`` needs besides."""

    @abstractmethod
    def choose(self, x: Tensor, context: Any, observation: Batch, chooser: Chooser) -> None:
        """Picks from each head in order, given the core's output [..., H] and what ``encode`` returned."""

    @abstractmethod
    def evaluate(self, x: Tensor, context: Any, observation: Batch) -> Tensor:
        """Returns the expected return [...], float32, in units of the returns that it was trained on."""

    def begin(self, envs: int) -> Tensor:
        """Returns the state of the core at the start of an episode: zeros [N, 2H]."""
        return next(self.parameters()).new_zeros(envs, 2 * self.hidden)

    @torch.no_grad()
    def act(self, observation: Batch, state: Tensor, *, generators: list[torch.Generator] | None = None) -> Decision:
        """Decides for each environment.

        Args:
            observation: rows [N].
            state: of the core, [N, 2H]; zeros where an episode starts.
            generators: one per environment, for draws; None takes the likeliest options.
        """
        chooser = Greedy() if generators is None else Sampled(generators)
        features, context = self.encode(observation)
        x, state = self._step(features, state)
        self.choose(x, context, observation, chooser)
        value = self.evaluate(x, context, observation)
        return Decision(
            actions=chooser.actions, log_prob=chooser.log_prob, value=value, state=state, log_probs=chooser.log_probs
        )

    @torch.no_grad()
    def value(self, observation: Batch, state: Tensor) -> Tensor:
        """Returns the expected return [N] at an observation, given the state of the core before it; for bootstraps."""
        features, context = self.encode(observation)
        return self.evaluate(self._step(features, state)[0], context, observation)

    def forward(
        self,
        observation: Batch,
        state: Tensor,
        starts: Tensor,
        actions: Mapping[str, Tensor],
        smoothing: float = 0.0,
    ) -> Judged:
        """Judges recorded decisions, from the state of the core at the beginning of the record on.

        Args:
            observation: rows [T, N].
            state: of the core before the first row, [N, 2H].
            starts: bool [T, N]: rows that are the first of an episode, before which the core's state is zeroed.
            actions: the recorded options per head, [T, N].
            smoothing: share of each head's weight that goes to all legal options alike, see `Recorded`.
        """
        chooser = Recorded(actions, smoothing)
        features, context = self.encode(observation)
        x = self._unroll(features, state, starts)
        self.choose(x, context, observation, chooser)
        return Judged(
            log_prob=chooser.log_prob,
            entropy=chooser.entropy,
            value=self.evaluate(x, context, observation),
            entropies=chooser.entropies,
            matters=chooser.matters,
        )

    def _step(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if self.core is None:
            return features, state
        h, c = (part[None].contiguous() for part in state.chunk(2, -1))
        out, (h, c) = self.core(features[None], (h, c))
        return out[0], torch.cat([h[0], c[0]], -1)

    def _unroll(self, features: Tensor, state: Tensor, starts: Tensor) -> Tensor:
        """Runs the core over [T, N, D] in stretches between rows at which some environment starts."""
        if self.core is None:
            return features
        ticks = len(features)
        cuts = [0, *(t for t in starts.any(1).nonzero().flatten().tolist() if t > 0), ticks]
        h, c = (part[None].contiguous() for part in state.chunk(2, -1))
        outputs = []
        for first, last in itertools.pairwise(cuts):
            kept = (~starts[first]).to(h.dtype)[None, :, None]
            out, (h, c) = self.core(features[first:last], (h * kept, c * kept))
            outputs.append(out)
        return torch.cat(outputs)
