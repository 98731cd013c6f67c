"""What a user's loop holds of a growing model: one object for life, and a loss that reads as the host's."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.slots.confidence import confident
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import ConfigError, LoopError
from esper.session.batches import tensors_of
from esper.tolaria.growth.growth import Growth

# loss(model, batch) -> loss [B], or (loss [B], correct [B]); one number per sample
UserLoss = Callable[[Any, Any], Any]


class StandIn:
    """Stands for the model in a user's loss: its call is ``call``, every other attribute the model's.

    Slots that ask for class logits have them, each forward its own.
    """

    def __init__(self, grown: Grown, call: Callable[..., Any]) -> None:
        self._grown, self._call = grown, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of ``call``."""
        with confident(self._grown, *args, **kwargs):
            return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # of this object, and not there yet: it is being copied
            raise AttributeError(name)
        return getattr(self._grown.model, name)


class LiveModel(StandIn):
    """The grown model for life: calls whatever wraps it at present.

    In a training pass that is the data parallel wrapper; without gradients, or in eval(), the bare model, so that a
    rank may evaluate by itself.

    Fields:
        passing: a loss of training is being computed, whatever the model's mode.
    """

    def __init__(self, growth: Growth) -> None:
        super().__init__(growth.grown, self._present)
        self._growth, self._closed, self.passing = growth, False, False

    def _present(self, *args: Any, **kwargs: Any) -> Any:
        if self._closed:
            raise LoopError("session.model was called after session.close(); the grown model is still in grown.model")
        training = torch.is_grad_enabled() and (self.passing or self._grown.model.training)
        if not training:
            return self._grown.model(*args, **kwargs)
        sizes = [tensor.shape[0] for tensor in tensors_of((args, kwargs))]
        if not sizes:
            return self._growth.call(*args, **kwargs)
        with self._grown.tallied(torch.ones(sizes[0], device=self._growth.world.device)):
            return self._growth.call(*args, **kwargs)

    def close(self) -> None:
        """No more calls."""
        self._closed = True


def evaluate_loss(loss: UserLoss, model: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
    """A user's loss on a batch, checked: loss [B], and correct [B] or None, never below float32.

    Raises:
        ConfigError: it returned something else than one number per sample.
    """
    found = loss(model, batch)
    value, correct = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    sizes = {len(tensor) for tensor in tensors_of(batch)}
    right = isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point() and len(value) > 0
    if right and len(sizes) == 1:
        right = len(value) in sizes
    if right and correct is not None:
        right = isinstance(correct, Tensor) and correct.shape == value.shape
    if not right:
        expected = f"[{sizes.pop()}]" if len(sizes) == 1 else "[B]"
        raise ConfigError(
            f"loss(model, batch) returned {_describe(found)}, expected one value per sample, {expected}, or (loss, "
            "correct) of that shape; for example cross_entropy(..., reduction='none'), or a sequence's mean over tokens"
        )
    return value.to(torch.promote_types(value.dtype, torch.float32)), correct


def _describe(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
    if isinstance(found, tuple):
        return f"({', '.join(_describe(item) for item in found)})"
    return type(found).__name__


class _Carried(torch.autograd.Function):
    """Forward: the first argument. Backward: the gradient of the second, times the scale."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, total: Tensor, scale: Tensor | None) -> Tensor:
        ctx.scale = scale
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = grads
        return None, grad if ctx.scale is None else grad * ctx.scale.to(grad.dtype), None


def carry_loss(value: Tensor, total: Tensor, scale: Tensor | None) -> Tensor:
    """0-D: reads as ``value``, the host's loss; its backward is that of ``total``, scaled against underflow."""
    return _Carried.apply(value.detach(), total, scale)
