"""Masked choices of an autoregressive policy: a head at a time, drawn, taken greedily, or judged again afterwards.

An agent calls ``pick`` once per head, in a fixed order; later heads may depend on what earlier ones picked. The same
code runs while acting and while learning: only the chooser differs. The log-probability of a whole decision is the sum
over the heads that matter in its row. A head that does not matter has exactly one option: its log-probability, its
entropy and its gradient are exactly zero.

Logits and log-probabilities are float32, under autocast too. Shapes: [...] are rows, [N] of environments or [T, N].
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from esper.leyline.errors import EsperError

Batch = dict[str, Tensor]


class Chooser(Protocol):
    """Chooses an option per row and head."""

    def pick(self, head: str, logits: Tensor, mask: Tensor, matters: Tensor | None = None) -> Tensor:
        """Returns the chosen options.

        Args:
            head: name of the head, unique within a decision.
            logits: [..., K].
            mask: [..., K], bool; true is legal.
            matters: [...], bool: rows in which this head matters; None is all of them. In the others it is option 0.

        Returns:
            Options, int64 [...].

        Raises:
            EsperError: a row in which the head matters has no legal option.
        """


def log_probabilities(head: str, logits: Tensor, mask: Tensor, matters: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns masked log-probabilities, float32 [..., K] with the lowest float32 where illegal, and the mask in force.

    Raises:
        EsperError: a row in which the head matters has no legal option.
    """
    if matters is not None:
        first = torch.zeros_like(mask)
        first[..., 0] = True
        mask = torch.where(matters[..., None], mask, first)
    legal = mask.any(-1)
    if not bool(legal.all()):
        row = tuple((~legal).nonzero()[0].tolist())
        raise EsperError(f"policy head {head!r}: no legal option in row {row}; masks must allow at least one")
    with torch.autocast(logits.device.type, enabled=False):
        lowest = torch.finfo(torch.float32).min
        filled = torch.where(mask, logits.float(), torch.full((), lowest, device=logits.device))
        return torch.where(mask, filled.log_softmax(-1), torch.full((), lowest, device=logits.device)), mask


class _Tally:
    """Sums log-probability and entropy over heads; keeps both per head too."""

    def __init__(self) -> None:
        self.actions: Batch = {}
        self.entropies: Batch = {}
        self.matters: Batch = {}
        self.log_probs: Batch = {}

    @property
    def log_prob(self) -> Tensor:
        """Joint log-probability of the decision, [...]."""
        return torch.stack(list(self.log_probs.values())).sum(0)

    @property
    def entropy(self) -> Tensor:
        """Sum of the heads' entropies in the rows in which they matter, [...], nats."""
        return torch.stack(list(self.entropies.values())).sum(0)

    def _note(self, head: str, logs: Tensor, mask: Tensor, option: Tensor, matters: Tensor | None) -> Tensor:
        if head in self.actions:
            raise EsperError(f"policy head {head!r}: picked twice in one decision")
        self.actions[head] = option
        self.log_probs[head] = logs.gather(-1, option[..., None]).squeeze(-1)
        self.entropies[head] = -torch.where(mask, logs.exp() * logs, torch.zeros_like(logs)).sum(-1)
        self.matters[head] = torch.ones_like(option, dtype=torch.bool) if matters is None else matters
        return option


class Sampled(_Tally):
    """Draws each option from its head.

    Args:
        generator: stream of the draws; a generator per environment keeps them independent of each other (see
            `uniform`), so that it does not matter which environments share a process.
    """

    def __init__(self, generators: list[torch.Generator]) -> None:
        super().__init__()
        self._generators = generators

    def pick(self, head: str, logits: Tensor, mask: Tensor, matters: Tensor | None = None) -> Tensor:
        """Draws by inversion: the first option whose cumulative probability exceeds a uniform draw; rows are [N]."""
        logs, mask = log_probabilities(head, logits, mask, matters)
        draws = torch.stack(
            [torch.rand((), generator=g, dtype=torch.float64, device=g.device) for g in self._generators]
        )
        chances = torch.where(mask, logs.double().exp(), torch.zeros((), dtype=torch.float64, device=logs.device))
        ladder = chances.cumsum(-1)
        over = (ladder > draws.to(logs.device)[:, None] * ladder[:, -1:]) & mask
        return self._note(head, logs, mask, over.to(torch.int64).argmax(-1), matters)


class Greedy(_Tally):
    """Takes the likeliest legal option of each head, the first of equals."""

    def pick(self, head: str, logits: Tensor, mask: Tensor, matters: Tensor | None = None) -> Tensor:
        """Takes the likeliest legal option."""
        logs, mask = log_probabilities(head, logits, mask, matters)
        return self._note(head, logs, mask, logs.argmax(-1), matters)


class Recorded(_Tally):
    """Judges a decision that was taken before; rows are [...] as recorded.

    Args:
        actions: the recorded options per head.
        smoothing: share of each head's weight that goes to all its legal options alike (label smoothing, Szegedy et
            al. 2016, arXiv 1512.00567): log-probabilities are then means over what might have been recorded.

    Raises:
        EsperError: a recorded option is illegal under the mask given now, so the mask is another than it was.
    """

    def __init__(self, actions: Mapping[str, Tensor], smoothing: float = 0.0) -> None:
        super().__init__()
        self._recorded, self._smoothing = actions, smoothing

    def pick(self, head: str, logits: Tensor, mask: Tensor, matters: Tensor | None = None) -> Tensor:
        """Takes the recorded option."""
        logs, mask = log_probabilities(head, logits, mask, matters)
        option = self._recorded[head]
        if not bool(mask.gather(-1, option[..., None]).all()):
            raise EsperError(f"policy head {head!r}: a recorded option is illegal under the mask given now")
        self._note(head, logs, mask, option, matters)
        if self._smoothing:
            alike = torch.where(mask, logs, torch.zeros_like(logs)).sum(-1) / mask.sum(-1)
            self.log_probs[head] = (1 - self._smoothing) * self.log_probs[head] + self._smoothing * alike
        return option
