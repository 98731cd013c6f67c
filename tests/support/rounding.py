"""How far apart two computations of the same thing may be when numbers are rounded, by propagation of errors."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from esper.kasmina.slots import joint
from esper.kasmina.slots.blend import Strength
from esper.kasmina.slots.gating import BlendGate
from esper.leyline.alpha import Operator
from esper.leyline.evidence import Reading

BETA1, BETA2 = 0.9, 0.999  # of Adam, in all that is compared


def skew_rounding(reading: Reading, eps: float) -> float:
    """How far apart the skewness of the same paired differences may be when their losses are rounded, at the most.

    With n differences d of deviation s and z = (d - mean) / s, the skewness is g = mean z^3, and

        dg / dd_i = 3 (z_i^2 - 1 - g z_i) / (n s)

    so an error of at most e in each d moves g by at most 3 e / s * mean |z^2 - 1 - g z| <= 3 e / s * (2 + |g|), as the
    means of z^2 and of |z| are at most 1. A d is one loss minus another, and both sides have one: four losses, below 4
    nats, which are rounded by half a unit in the last place, eps nats each. So e = 4 eps. Seeds that do next to nothing
    have an s of some 1e-4 nats, where this is 0.03 in float32, and 6e-11 in float64.

    Args:
        reading: whose ``se`` is s / sqrt(n - 1), every sample being a cluster.
        eps: of the precision.
    """
    assert reading.se is not None
    assert reading.skew is not None
    deviation = reading.se * math.sqrt(max(reading.n - 1, 1))
    return 3 * 4 * eps / deviation * (2 + abs(reading.skew)) if deviation else math.inf


def gate_terms(gate: BlendGate, x: Tensor, reach: Tensor) -> dict[str, Tensor]:
    """What the terms of each gradient of a gate add up to without their signs, by parameter.

    With r = dloss / dout, the gradient of a parameter p of the gate is a sum over samples, positions and channels,

        dloss / dp = sum_btc  r_btc * a (1 - a) delta_btc * dg_bt / dp

    Args:
        gate: of GATE.
        x: what it read.
        reach: sum over channels of |r a (1 - a) delta|, of the shape of g.
    """
    with torch.no_grad():
        pooled = gate._pool(x)
        t = torch.tanh(gate.inner(pooled))
        g = torch.sigmoid(gate.outer(t))
        outer = (reach.reshape(g.shape) * g * (1 - g)).flatten(0, -2)
        t, pooled = t.flatten(0, -2), pooled.flatten(0, -2)
        inner = outer * gate.outer.weight.abs() * (1 - t * t)
        return {
            "inner.weight": inner.mT @ pooled.abs(),
            "inner.bias": inner.sum(0),
            "outer.weight": outer.mT @ t.abs(),
            "outer.bias": outer.sum(0),
        }


@contextmanager
def noting_gates() -> Iterator[dict[nn.Module, dict[str, Tensor]]]:
    """Notes `gate_terms` of each gate in every backward by the engine; of several steps the largest."""
    noted: dict[nn.Module, dict[str, Tensor]] = {}
    read: dict[int, tuple[BlendGate, Tensor, Tensor]] = {}  # by the id of g, which is kept, so that no other has it

    def note(module: nn.Module, args: tuple[Any, ...], g: Any) -> None:
        if isinstance(module, BlendGate) and torch.is_grad_enabled():
            read[id(g)] = module, args[0].detach(), g

    def blend(
        host: Tensor,
        delta: Tensor,
        strength: Strength,
        operator: Operator,
        fades_from: Operator | None = None,
        fade: Tensor | None = None,
    ) -> Tensor:
        out = plain(host, delta, strength, operator, fades_from, fade)
        if out.requires_grad and id(strength.gate) in read:
            gate, x, g = read.pop(id(strength.gate))
            share = 1.0 if fade is None or fades_from is None else float(fade)
            a, share = float(strength.alpha), share if operator is Operator.GATE else 1 - share
            size = share * a * (1 - a) * delta.detach().abs()
            out.register_hook(lambda r: keep(gate, gate_terms(gate, x, (r.abs() * size).sum_to_size(g.shape))))
        return out

    def keep(gate: nn.Module, terms: dict[str, Tensor]) -> None:
        before = noted.get(gate, terms)
        noted[gate] = {name: torch.maximum(value, before[name]) for name, value in terms.items()}

    plain, handle = joint.blend, register_module_forward_hook(note)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint, "blend", blend)
        try:
            yield noted
        finally:
            handle.remove()


def gate_rounding(terms: Tensor, eps: float) -> float:
    """How far apart a gradient of a gate may be, in one step, when what it is made of is rounded, at the most.

    Each term of `gate_terms` is a product of r, delta and dg / dp. Each of the three is rounded by half a unit in the
    last place, eps / 2 of itself, by either computation: terms are apart by at most 3 eps of themselves, and their sums
    by 3 eps times what they add up to without signs. The terms of a seed that does little nearly cancel: they add up to
    some 300 times their sum, of which 3 eps are 1e-4 in float32, and 2e-13 in float64.

    Args:
        terms: see `gate_terms`.
        eps: of the precision.
    """
    return 3 * eps * float(terms.max())


def adam_rounding(moments: Mapping[str, Any], off: float, lr: float, steps: int, gate: float = 0.0) -> Tensor | float:
    """How far apart weights may be after some steps of Adam from one start, if gradients are, at the most.

    A step is u = lr m / sqrt(v), corrected for its number, and |m| <= sqrt(v) but for a factor near 1, so an error of e
    in gradients moves u by at most

        lr (e / sqrt(v) + |m| / v * e) <= 2 lr e / sqrt(v)

    which is large where a gradient is close to nothing: Adam takes steps of one size along all of them, rounding too.

    Args:
        moments: of a parameter, after the steps.
        off: e, as a share of the largest of its gradients.
        lr: learning rate.
        steps: since both were the same.
        gate: what is added to e for a gate, see `gate_rounding`.
    """
    if "exp_avg_sq" not in moments or not lr:
        return 0.0
    root = (moments["exp_avg_sq"] / (1 - BETA2 ** float(moments["step"]))).sqrt()
    return steps * lr * (2 * (off * float(root.nan_to_num().max()) + gate) / (root + 1e-30)).clamp(max=2.0)


def moment_rounding(kind: str, largest: float, gate: float, steps: int) -> float:
    """How far apart a moment may be after some steps from one start, if gradients are by ``gate`` in each, at the most.

    A first moment takes 1 - beta1 of each gradient, a buffer all of it. A second one takes 1 - beta2 of its square, and
    g^2 is off by 2 |g| e, where (1 - beta2) g^2 is a part of the moment v itself, so |g| <= sqrt(v / (1 - beta2)).

    Args:
        kind: of the moment, as torch's optimizers name it.
        largest: of its numbers.
        gate: see `gate_rounding`.
        steps: since both were the same.
    """
    of_one = {"exp_avg": 1 - BETA1, "exp_avg_sq": 2 * math.sqrt((1 - BETA2) * largest), "momentum_buffer": 1.0}[kind]
    return steps * of_one * gate
