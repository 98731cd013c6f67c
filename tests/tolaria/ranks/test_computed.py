"""What a module computes, in one process: which bits count, and that nothing of the module is moved by looking."""

import random
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.tolaria.ranks.computed import MODES, Computation, digest_twice
from tests.support.tiny import bits


class Busy(nn.Module):
    """Moves everything that a forward can move: statistics, a counter, a queue that it replaces, all random streams."""

    def __init__(self, curve: Any = F.relu) -> None:
        super().__init__()
        self.curve = curve
        self.linear, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue", torch.zeros(2, 8))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y = self.drop(self.curve(self.norm(self.linear(x)))) * (1 + random.random() + np.random.rand())
        self.queue = torch.cat([self.queue[1:], y[:1].detach()])
        return y


def busy(**more: Any) -> Busy:
    torch.manual_seed(1)
    return Busy(**more)


X = torch.linspace(-1, 1, 32).view(4, 8)


def digests(module: nn.Module, x: Any = X) -> list[int | None]:
    return [digest_twice(Computation(module, lambda: module(x.clone())), mode) for mode in MODES]


def test_looking_moves_no_buffer_no_gradient_no_flag_and_no_stream() -> None:
    module = busy()
    module.norm.eval()
    module(X).sum().backward()
    gradients = [(name, p.grad) for name, p in module.named_parameters()]
    buffers = dict(module.named_buffers())

    def picture() -> Any:
        return (
            bits(module.named_parameters()),
            bits(module.named_buffers()),
            bits((name, p.grad) for name, p in module.named_parameters()),
            [child.training for child in module.modules()],
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        )

    before = picture()
    assert None not in digests(module)
    assert picture() == before
    assert all(p.grad is grad for (_, p), (_, grad) in zip(module.named_parameters(), gradients, strict=True))
    assert all(buffer is buffers[name] for name, buffer in module.named_buffers())


def test_streams_of_the_ranks_do_not_matter_and_what_is_computed_does() -> None:
    first = digests(busy())
    torch.manual_seed(77)
    random.seed(77)
    np.random.seed(77)
    assert digests(busy()) == first
    other = digests(busy(curve=torch.tanh))
    assert all(one != two for one, two in zip(first, other, strict=True))


class Twisted(torch.autograd.Function):
    """The identity, with another gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 1.5


def test_a_gradient_that_differs_counts_though_the_output_is_equal() -> None:
    def straight(x: Tensor) -> Tensor:
        return F.relu(x)

    def twisted(x: Tensor) -> Tensor:
        return Twisted.apply(F.relu(x))

    assert digests(busy(curve=straight))[0] != digests(busy(curve=twisted))[0]


@dataclass
class Output:
    """As models of some libraries return it."""

    logits: Tensor
    loss: Tensor | None = None


class Odd(nn.Module):
    """A host that returns what it is told to."""

    def __init__(self, wrap: Any, dtype: torch.dtype = torch.float32, *, learns: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(8, 3).to(dtype).requires_grad_(learns)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.linear(x.to(self.linear.weight.dtype)))


WRAPS: dict[str, Any] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, [y.argmax(1)], "cached"),
    "dict": lambda y: OrderedDict(logits=y, hidden=None),
    "dataclass": Output,
    "a loss": lambda y: y.square().mean(),
    "a number": lambda y: float(y.detach().sum()),
    "no float": lambda y: y.argmax(1),
    "an object": lambda y: object(),
    "complex": lambda y: torch.complex(y, y),
    "sparse": lambda y: y.to_sparse(),
}


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_output_and_dtype_is_compared(name: str, dtype: torch.dtype) -> None:
    if name in ("complex", "sparse") and dtype is torch.bfloat16:
        pytest.skip("torch has no such tensors in bfloat16")
    first = digests(Odd(WRAPS[name], dtype))
    assert None not in first
    assert digests(Odd(WRAPS[name], dtype)) == first
    if name not in ("an object", "no float"):
        moved = Odd(WRAPS[name], dtype)
        with torch.no_grad():
            moved.linear.bias[0] += 0.25
        assert digests(moved) != first


def test_a_frozen_host_is_compared_by_its_output() -> None:
    frozen = Odd(WRAPS["tensor"], learns=False)
    first = digests(frozen)
    assert None not in first
    assert digests(Odd(lambda y: y * 2, learns=False)) != first


def test_what_never_equals_itself_cannot_be_compared_and_an_error_is_passed_on() -> None:
    own = torch.Generator().manual_seed(3)
    assert digests(Odd(lambda y: y + torch.rand(y.shape, generator=own))) == [None, None]

    def refuse(y: Tensor) -> Tensor:
        raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        digests(Odd(refuse))
