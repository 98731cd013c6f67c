"""The network of a growth policy: one encoder for every slot and every blueprint, so that one set of weights serves any
number of either.

    entries -> MLP -> mean, max -.
    slots ----------------------+-> MLP -> mean, max -.
    run -------------------------------> MLP ----------+-> features -> LSTM -> x
    op         logits(x) + log mean exp over its legal slots of score(op, slot)
    slot       score(op, slot), a pointer
    blueprint  score(x, slot, op, entry), a pointer into the slot's catalogue
    operator, tempo, target, speed, curve   from x, slot, op and the chosen entry

Op and slot together are a softmax over pairs, in which an op with many legal slots is no likelier for their number.
Pooling makes it equivariant to the order of slots, but for their row and column. What is not present is replaced by 0
before anything is computed of it, so not even a NaN there has influence.

Shapes: [...] rows, S slots, B entries, O ops, W width, H of the core.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from esper.leyline.stages import Op
from esper.tamiyo.policy.agent import Agent
from esper.tamiyo.policy.features import LAYOUT, Layout
from esper.tamiyo.policy.heads import Batch, Chooser
from esper.tamiyo.policy.options import OPTIONS, WITH_OPERATOR, WITH_SPEED, Options

FAINT = 0.01  # gain of layers that end in logits: a new policy is close to uniform over what is legal


class Encoded(NamedTuple):
    """What the heads need besides the core's output.

    Fields:
        features: [..., W], of the whole observation.
        slots: [..., S, W].
        entries: [..., S, B, W / 2].
    """

    features: Tensor
    slots: Tensor
    entries: Tensor


def _linear(inputs: int, outputs: int, gain: float = math.sqrt(2.0)) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_linear(inputs, outputs), nn.SiLU(), _linear(outputs, outputs), nn.SiLU())


def _pool(x: Tensor, present: Tensor) -> Tensor:
    """Mean and maximum over the axis before the last, [..., K, W] to [..., 2W], of what is present; 0 of nothing."""
    mask = present[..., None]
    mean = torch.where(mask, x, 0.0).sum(-2) / mask.sum(-2).clamp(min=1)
    most = torch.where(mask, x, torch.finfo(x.dtype).min).amax(-2)
    return torch.cat([mean, torch.where(mask.any(-2), most, 0.0)], -1)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Takes one of axis K from x [..., K, *rest], by index [...]; returns [..., *rest]."""
    rest = x.shape[index.ndim + 1 :]
    where = index.reshape(*index.shape, 1, *[1] * len(rest)).expand(*index.shape, 1, *rest)
    return x.gather(index.ndim, where).squeeze(index.ndim)


class GrowthAgent(Agent):
    """Decides what grows, from the arrays of `esper.tamiyo.policy.arrays`.

    Args:
        layout: features that it reads.
        options: what its heads choose from.
        width: W.
        hidden: H of the core; 0 for none.
    """

    def __init__(
        self, layout: Layout = LAYOUT, options: Options = OPTIONS, *, width: int = 64, hidden: int = 64
    ) -> None:
        super().__init__(width, hidden)
        self.layout, self.options, self.width = layout, options, width
        half, seen = width // 2, (hidden or width) + width
        ops = len(options.ops)
        self.entry_encoder = _mlp(layout.width("entry"), half)
        self.slot_encoder = _mlp(layout.width("slot") + 2 * half, width)
        self.run_encoder = _mlp(layout.width("run"), width)
        self.join = _linear(3 * width, width)
        self.trunk = _linear(seen, width)
        self.op_head = _linear(width, ops, FAINT)
        self.op_query, self.slot_key = _linear(width, ops * half, 0.1), _linear(width, half)
        self.slot_score = _linear(width, ops, FAINT)
        self.op_embedding = nn.Embedding(ops, half)
        self.act_trunk = _linear(2 * width + half, width)
        self.entry_query, self.entry_key = _linear(width, half, 0.1), _linear(half, half)
        self.entry_score = _linear(half, 1, FAINT)
        self.entry_joined = _linear(half, width)
        self.operator_head = _linear(width, len(options.operators), FAINT)
        self.tempo_head = _linear(width, len(options.tempos), FAINT)
        self.target_head = _linear(width, len(options.targets), FAINT)
        self.speed_head = _linear(width, len(options.speeds), FAINT)
        self.curve_head = _linear(width, len(options.curves), FAINT)
        self.critic = nn.Sequential(_linear(seen, width), nn.SiLU(), _linear(width, 1, 1.0))

    def encode(self, observation: Batch) -> tuple[Tensor, Encoded]:
        """Returns features [..., W], and what the heads need of slots and entries."""
        present, offered = observation["present_slots"], observation["present_entries"]
        entries = self.entry_encoder(torch.where(offered[..., None], observation["entries"], 0.0))
        slots = torch.where(present[..., None], observation["slots"], 0.0)
        slots = self.slot_encoder(torch.cat([slots, _pool(entries, offered)], -1))
        parts = [self.run_encoder(observation["run"]), _pool(slots, present)]
        features = silu(self.join(torch.cat(parts, -1)))
        return features, Encoded(features, slots, entries)

    def choose(self, x: Tensor, context: Encoded, observation: Batch, chooser: Chooser) -> None:
        """Picks op, slot, blueprint, operator, tempo, target, speed, curve, in this order."""
        h = silu(self.trunk(torch.cat([x, context.features], -1)))
        legal = observation["mask_slot"]
        scores = self._slot_scores(h, context.slots)
        op = chooser.pick("op", self.op_head(h) + _log_mean_exp(scores, legal), observation["mask_op"])
        slot = chooser.pick("slot", _at(scores, op), _at(legal, op), ~self._is(op, Op.WAIT))

        born, retarget = self._is(op, Op.GERMINATE), self._is(op, Op.SET_ALPHA_TARGET)
        y = silu(self.act_trunk(torch.cat([h, _at(context.slots, slot), self.op_embedding(op)], -1)))
        entries = _at(context.entries, slot)
        query = self.entry_query(y)[..., None]
        logits = (self.entry_key(entries) @ query).squeeze(-1) / math.sqrt(entries.shape[-1])
        logits = logits + self.entry_score(entries).squeeze(-1)
        blueprint = chooser.pick("blueprint", logits, _at(observation["mask_blueprint"], slot), born)
        y = y + torch.where(born[..., None], silu(self.entry_joined(_at(entries, blueprint))), 0.0)

        with_operator = self._is(op, *WITH_OPERATOR)
        operators = _at(_at(observation["mask_operator"], retarget.long()), slot)
        operator = chooser.pick("operator", self.operator_head(y), operators, with_operator)
        tempo = self._pick_free(chooser, "tempo", self.tempo_head(y), born)
        self._pick_free(chooser, "target", self.target_head(y), with_operator)
        row = torch.where(retarget, 1 + operator, 0)  # of a PRUNE, or of a retarget to this operator
        with_speed = self._is(op, *WITH_SPEED)
        speeds = _at(_at(observation["mask_speed"], slot), row)
        speed = chooser.pick("speed", self.speed_head(y), speeds, with_speed)
        slow = born & self._takes_time(self.options.tempos, tempo)
        slow = slow | with_speed & self._takes_time(self.options.speeds, speed)
        self._pick_free(chooser, "curve", self.curve_head(y), slow)

    def evaluate(self, x: Tensor, context: Encoded, observation: Batch) -> Tensor:
        """Returns the expected return [...]."""
        return self.critic(torch.cat([x, context.features], -1)).squeeze(-1).float()

    def _slot_scores(self, h: Tensor, slots: Tensor) -> Tensor:
        """Scores of each op in each slot, [..., O, S]."""
        query = self.op_query(h).unflatten(-1, (len(self.options.ops), -1))
        keyed = query @ self.slot_key(slots).transpose(-1, -2) / math.sqrt(query.shape[-1])
        return keyed + self.slot_score(slots).transpose(-1, -2)

    def _is(self, op: Tensor, *kinds: Op) -> Tensor:
        return torch.stack([op == self.options.ops.index(kind) for kind in kinds if kind in self.options.ops]).any(0)

    def _takes_time(self, ticks: tuple[int, ...], option: Tensor) -> Tensor:
        return torch.tensor([one > 0 for one in ticks], device=option.device)[option]

    def _pick_free(self, chooser: Chooser, head: str, logits: Tensor, matters: Tensor) -> Tensor:
        return chooser.pick(head, logits, torch.ones_like(logits, dtype=torch.bool), matters)


def _log_mean_exp(scores: Tensor, legal: Tensor) -> Tensor:
    """Log of the mean of exp over the legal slots, [..., O, S] to [..., O]; 0 where there is none."""
    lowest = torch.finfo(scores.dtype).min / 4
    total = torch.where(legal, scores, lowest).logsumexp(-1)
    return torch.where(legal.any(-1), total - legal.sum(-1).clamp(min=1).log(), 0.0)
