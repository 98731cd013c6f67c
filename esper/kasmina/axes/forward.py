"""One forward of a host on a varied example, with what its sites and its other modules return."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.axes.example import Example
from esper.kasmina.axes.feature import place_of, take, tensors_in
from esper.leyline.errors import one_line

Forward = Callable[[Example], Any]
"""Runs the host in eval() on a copy of the inputs, from the same random streams and buffers each time."""

OUTPUT = "output"


def feature_of(output: Any) -> Tensor | None:
    """The feature in a module's output; None if it has none."""
    try:
        feature = take(output, place_of(output))
    except ValueError:
        return None
    return feature if isinstance(feature, Tensor) and not feature.is_nested else None


@dataclass(slots=True)
class Seen:
    """What one forward showed.

    Fields:
        sites: the feature of each watched module, by name; the tensors of the model's own output beside them.
        modules: what `Watch.note` made of each module's feature, by name.
    """

    sites: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)


class Watch:
    """Runs forwards of a host and looks at the features.

    Args:
        model: the host.
        names: modules whose features are kept whole.
        forward: runs it.
    """

    def __init__(self, model: nn.Module, names: list[str], forward: Forward) -> None:
        self.model, self.names, self._forward = model, set(names), forward
        self.why = ""  # the error of the last run that failed

    def run(self, example: Example, note: Callable[[str, nn.Module, Tensor], Any] | None = None) -> Seen | None:
        """Runs once; None if the host refused the inputs, with the reason in `why`.

        Args:
            example: the inputs.
            note: what to keep of the feature of every module, beside the watched ones; None keeps nothing.
        """
        seen, handles = Seen(), []
        for name, module in self.model.named_modules():
            if name in self.names or (note is not None and not isinstance(module, torch.jit.ScriptModule)):
                handles.append(module.register_forward_hook(self._hook(name, seen, note)))
        try:
            output = self._forward(example)
        except Exception as error:  # a host may refuse another size in any way
            self.why = one_line(error, 160)
            return None
        finally:
            for handle in handles:
                handle.remove()
        seen.sites |= {f"{OUTPUT}.{i}": t.detach() for i, t in enumerate(tensors_in(output)) if not t.is_nested}
        return seen

    def _hook(self, name: str, seen: Seen, note: Callable[..., Any] | None) -> Callable[..., None]:
        def hook(module: nn.Module, _args: Any, output: Any) -> None:
            feature = feature_of(output)
            if feature is None:
                return
            if name in self.names:
                seen.sites[name] = feature.detach().clone()
            if note is not None and (kept := note(name, module, feature.detach())) is not None:
                seen.modules.pop(name, None)
                seen.modules[name] = kept  # in the order of execution

        return hook


def moved_axes(before: Tensor, after: Tensor | None) -> tuple[int, ...]:
    """The axes whose size differs; none if the tensors have not the same number of axes."""
    if after is None or before.ndim != after.ndim:
        return ()
    return tuple(i for i, (a, b) in enumerate(zip(before.shape, after.shape, strict=True)) if a != b)


def differs(before: Tensor, after: Tensor, axis: int) -> list[bool]:
    """By index along an axis, whether two tensors of one shape hold different values there, beyond rounding."""
    one, two = (t.movedim(axis, 0).flatten(1).double() for t in (before, after))
    same = (one == two) | (one.isnan() & two.isnan())
    apart = torch.where(same, 0.0, (one - two).abs().nan_to_num(nan=torch.inf))
    apart = apart.amax(1) if one.shape[1] else one.new_zeros(len(one))
    scale = one.abs().nan_to_num(nan=0.0, posinf=0.0).amax()
    different: list[bool] = (apart > 1e-6 * scale).tolist()
    return different
