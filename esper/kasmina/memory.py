"""The memory that a seed takes on a rank while it learns, forecast from shapes alone: before anything is built.

    weights and gradient    parameters x bytes of a number, each; once more with several ranks, whose reducer has a copy
                            of the gradient; and as often as the optimizer keeps moments
    activations             what the seed's backward keeps of a forward, counted at one and at two samples (see
                            `esper.kasmina.blueprints.counting`), and taken to the samples of a batch; the feature that
                            the join makes anew, and the gradient of the largest of all these, while the backward
                            passes it

    shadow                  with ``slots.incubation=shadow`` a seed in TRAINING has a forward of its own: the feature
                            that it is given, what the backward keeps from its site on, three times the output
                            (itself, a loss of it, its gradient), and the seed's gradient, which comes out of it

All of that is equal on every rank, since it follows from settings and shapes. What a device has left is not, so it
never enters a forecast.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from esper.kasmina.axes.block import Call
from esper.kasmina.axes.feature import copy_inputs, put, take, tensors_in
from esper.kasmina.births.own import Fit, copy_block, left_as_it_was
from esper.kasmina.blueprints import registry
from esper.kasmina.blueprints.counting import place_to_count
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import arguments
from esper.kasmina.streams import undisturbed
from esper.leyline.topology import Topology


@dataclass(frozen=True, slots=True)
class SeedMemory:
    """What one seed needs.

    Fields:
        parameters: number of its parameters.
        fixed: bytes of activations that do not grow with the batch.
        sample: bytes of activations for each sample.
    """

    parameters: int
    fixed: int
    sample: int

    def forecast(self, batch: int, *, number: int, moments: int, ranks: int) -> int:
        """Returns the bytes at the peak of a step.

        Args:
            batch: samples of one forward on a rank.
            number: bytes of a parameter.
            moments: numbers that the optimizer keeps for each parameter.
            ranks: ranks of the run.
        """
        copies = 2 + moments + (ranks > 1)
        return self.parameters * number * copies + self.fixed + batch * self.sample


def _bytes_kept(seed: nn.Module, x: Tensor, *more: Any) -> int:
    """Bytes that the backward of a forward keeps beside weights and input, and those of the join."""
    kept: dict[int, Tensor] = {}
    known = {tensor.untyped_storage()._cdata for tensor in (x, *seed.parameters(), *seed.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage gets its address
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        seed(x, *more)
    sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known]
    feature = x.untyped_storage().nbytes()
    return sum(sizes) + feature + max([feature, *sizes])


@functools.cache
def seed_memory(topology: Topology, blueprint: str, dim: int, shape: tuple[int, ...], dtype: torch.dtype) -> SeedMemory:
    """Counts what a blueprint needs at a site; but for small ones no memory is allocated.

    Args:
        topology: what the axes of the feature mean.
        blueprint: registered name.
        dim: channels C of the feature.
        shape: shape of one sample's feature, without the batch axis.
        dtype: number format of the seed.
    """
    entry = registry.get(topology, blueprint)
    place = place_to_count(entry, dim, shape) if dtype is torch.float32 else torch.device("meta")
    with undisturbed(), place, torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]):
        seed = entry.build(dim).to(dtype)
        one, two = (_bytes_kept(seed, torch.zeros(n, *shape, dtype=dtype, requires_grad=True)) for n in (1, 2))
    parameters = sum(parameter.numel() for parameter in seed.parameters())
    return SeedMemory(parameters, max(0, 2 * one - two), two - one)


@dataclass(frozen=True, slots=True)
class HeardMemory:
    """What was counted in a forward of the host, by slot.

    Fields:
        copies: what a copy of the block at a site needs.
        shadows: bytes for each sample that a shadow forward keeps beside its seed's; empty: there is no shadow forward.
            A site that the example does not reach has none.
    """

    copies: dict[str, SeedMemory] = field(default_factory=dict)
    shadows: dict[str, int] = field(default_factory=dict)


def shadow_memory(grown: Grown, example: Any) -> dict[str, int]:
    """Counts what the backward of a shadow forward keeps from each site on, in bytes a sample.

    The host runs once with frozen weights, so that as in a shadow only a gradient to the feature is prepared; what is
    kept after a site's module has run is that site's.

    Args:
        grown: the model, without seeds.
        example: one batch of inputs, as for `esper.kasmina.attach.attach`.
    """
    kept: dict[int, Tensor] = {}
    before: dict[str, tuple[int, int]] = {}  # bytes kept until its site, and samples, by slot
    tensors = [*grown.model.parameters(), *grown.model.buffers()]
    known = {tensor.untyped_storage()._cdata for tensor in tensors}
    learning = [parameter for parameter in grown.model.parameters() if parameter.requires_grad]
    joined: list[Tensor] = []  # counted as the features that they are copies of

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage gets its address
        return tensor

    def total() -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    def note(slot: str, output: Any) -> Any:
        site = grown.sites[slot]
        feature = take(output, site.place)
        if slot in before or not isinstance(feature, Tensor):
            return None
        kept[feature.untyped_storage()._cdata] = feature  # for the sites before; for its own the join makes another
        before[slot] = total() - feature.nbytes, feature.shape[site.layout.index("B")]
        if feature.requires_grad:
            return None
        heard = feature.detach().requires_grad_().clone()  # no leaf, since a host may work in place behind its site
        joined.append(heard)
        known.add(heard.untyped_storage()._cdata)
        return put(output, site.place, heard)

    def hook_of(slot: str) -> Any:
        return lambda _module, _args, output: note(slot, output)

    modules = {slot: grown.model.get_submodule(site.module) for slot, site in grown.sites.items()}
    handles = [module.register_forward_hook(hook_of(slot)) for slot, module in modules.items()]
    args, kwargs = arguments(copy_inputs(example))
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        with (
            left_as_it_was(grown),
            torch.enable_grad(),
            grown.disabled(),
            sdpa_kernel([SDPBackend.MATH]),
            saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            output = grown.model.train()(*args, **kwargs)
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    out = sum(tensor.nbytes for tensor in tensors_in(output) if tensor.is_floating_point())
    return {slot: -(-(total() - bytes_before + 3 * out) // samples) for slot, (bytes_before, samples) in before.items()}


def copy_memory(grown: Grown, slot: str, fit: Fit) -> SeedMemory:
    """Counts what a copy of the block at a site needs, on the example that the site was heard on.

    Args:
        grown: the model.
        slot: of the site.
        fit: from `esper.kasmina.births.own.find_fits`.
    """
    site, seed = grown.sites[slot], copy_block(grown, slot).eval()
    h = site.turned(fit.feature).detach()
    with torch.enable_grad(), undisturbed(h):
        kept = _bytes_kept(seed, h.clone().requires_grad_(), Call(*copy_inputs(tuple(fit.call))))
    return SeedMemory(fit.parameters, 0, -(-kept // fit.feature.shape[site.layout.index("B")]))
