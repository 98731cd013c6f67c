"""The growing model in a user's loop: one object for the whole session, and a loss that reads as the host's."""

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
    """Stands for the model in a user's loss: calling it is ``call``, every other attribute is the model's.

    Slots that ask for class logits get them, computed anew for each call.
    """

    def __init__(self, grown: Grown, call: Callable[..., Any]) -> None:
        self._grown, self._call = grown, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of ``call``."""
        with confident(self._grown, *args, **kwargs):
            return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # this object's own, which is missing while it is being copied
            raise AttributeError(name)
        return getattr(self._grown.model, name)


class LiveModel(StandIn):
    """The grown model during the whole session: it calls the present wrapper of the model.

    In a training pass that is the data parallel wrapper. Without gradients, or in eval(), it is the bare model, so that
    a rank may evaluate by itself.

    Fields:
        passing: a training loss is being computed, whatever the model's mode.
    """

    def __init__(self, growth: Growth) -> None:
        super().__init__(growth.grown, self.call_present)
        self._growth, self._closed, self.passing = growth, False, False

    def call_present(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the present wrapper, or the bare model where no gradient is wanted."""
        if self._closed:
            raise LoopError("session.model was called after session.close(); the grown model is still in grown.model")
        training = torch.is_grad_enabled() and (self.passing or self._grown.model.training)
        if not training:
            return self._grown.model(*args, **kwargs)
        with self._grown.tallied(torch.ones((), device=self._growth.world.device)):
            return self._growth.call(*args, **kwargs)

    def close(self) -> None:
        """Refuses every later call."""
        self._closed = True


def evaluate_loss(loss: UserLoss, model: Any, batch: Any) -> tuple[Tensor, Tensor | None]:
    """Calls a user's loss and checks what it returns: loss [B] in float32 or float64, and correct [B] or None.

    Raises:
        ConfigError: it returned something else than one number per sample.
    """
    result = loss(model, batch)
    value, correct = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    sizes = {len(tensor) for tensor in tensors_of(batch)}
    right = isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point() and len(value) > 0
    if right and len(sizes) == 1:
        right = len(value) in sizes
    if right and correct is not None:
        right = isinstance(correct, Tensor) and correct.shape == value.shape
    if not right:
        expected = f"[{sizes.pop()}]" if len(sizes) == 1 else "[B]"
        raise ConfigError(
            f"loss(model, batch) returned {_describe(result)}, expected one value per sample, {expected}, or (loss, "
            "correct) of that shape; for example cross_entropy(..., reduction='none'), or a sequence's mean over tokens"
        )
    return value.to(torch.promote_types(value.dtype, torch.float32)), correct


def _describe(value: Any) -> str:
    """Type and shape of a value, for an error text."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, tuple):
        return f"({', '.join(_describe(item) for item in value)})"
    return type(value).__name__


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
    """Returns a 0-D tensor with the value of ``value`` (the host's loss) and the gradient of ``total``, scaled."""
    return _Carried.apply(value.detach(), total, scale)
