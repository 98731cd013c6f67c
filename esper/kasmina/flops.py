"""The cost of forwards and backwards, in FLOPs per sample: multiply-adds times two of convolutions and matrix products.

Each cost is counted once; from then on costs are only added up by formula (see `esper.accord.account`):

    host     one forward and one backward on a sample; and per slot, the backward of the activations alone from the
             output down to that slot: what a shadow forward pays to reach its seed
    seed     from a build on the meta device: forward, and the backward with or without a gradient of input and weights.
             Small ones are built on the CPU, see `esper.kasmina.blueprints.counting`

torch.utils.flop_counter does the counting, with the formulas of `esper.kasmina.products` where it has none or a wrong
one. Attention runs on its plain matrix products meanwhile, since the counter may not know a fused kernel.
Normalisation, activations and pooling are counted nowhere; an operator that is neither free nor known is named.

No cost depends on `requires_grad`: a frozen host is counted like the same host in training, so that runs with and
without frozen parts compare by what passes through them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.axes.block import Call
from esper.kasmina.axes.feature import copy_inputs, put, take, tensors_in
from esper.kasmina.axes.site import Site
from esper.kasmina.births.own import Fit, copy_block
from esper.kasmina.blueprints import registry
from esper.kasmina.blueprints.counting import place_to_count
from esper.kasmina.blueprints.entry import Blueprint
from esper.kasmina.hosts.resume import resumable
from esper.kasmina.lending import call_with, hush
from esper.kasmina.products import FORMULAS, Uncounted
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import CONTAINER, arguments
from esper.kasmina.streams import undisturbed
from esper.leyline.costs import HostCost, SeedCost
from esper.leyline.topology import Topology


class _Counter:
    """Counts FLOPs, and notes the operators that have no formula."""

    def __init__(self) -> None:
        self.uncounted: set[str] = set()

    def __call__(self, work: Callable[[], Any]) -> tuple[int, Any]:
        """Runs ``work``; returns its FLOPs and its result."""
        counter = FlopCounterMode(display=False, custom_mapping=dict(FORMULAS))
        with sdpa_kernel([SDPBackend.MATH]), Uncounted(counter.flop_registry) as missed, counter:
            result = work()
        self.uncounted |= missed.names
        return counter.get_total_flops(), result


@functools.cache
def seed_cost(topology: Topology, blueprint: str, dim: int, shape: tuple[int, ...]) -> SeedCost:
    """Counts the cost of a blueprint at a site, from shapes alone; but for small ones no memory is allocated.

    Args:
        topology: what the axes of the feature mean.
        blueprint: registered name.
        dim: channels C of the feature.
        shape: shape of one sample's feature, without the batch axis.
    """
    entry = registry.get(topology, blueprint)
    if place_to_count(entry, dim, shape).type == "cpu":
        return _small_seed_cost(entry, dim, shape)
    return _meta_seed_cost(entry, dim, shape)


def _meta_seed_cost(entry: Blueprint, dim: int, shape: tuple[int, ...]) -> SeedCost:
    count = _Counter()
    with torch.device("meta"), torch.enable_grad():
        seed = entry.build(dim)
        weights = list(seed.parameters())
        backwards = []
        for needs_input, needs_weights in ((True, True), (False, True), (True, False)):
            for parameter in weights:
                parameter.requires_grad_(needs_weights)
            x = torch.empty(1, *shape, requires_grad=needs_input)
            forward, delta = count(lambda x=x: seed(x))  # type: ignore[misc]
            wanted = [*([x] if needs_input else []), *(weights if needs_weights else [])]
            backwards.append(_backward(count, delta, wanted))
    full, weights_alone, passing = backwards
    return SeedCost(forward, full, weights_alone, passing, tuple(sorted(count.uncounted)))


def _small_seed_cost(entry: Blueprint, dim: int, shape: tuple[int, ...]) -> SeedCost:
    """One forward serves all three backwards: no function of esper's own computes more than it is asked for."""
    count = _Counter()
    with undisturbed(), torch.device("cpu"), torch.enable_grad():
        seed = entry.build(dim)
        weights = list(seed.parameters())
        x = torch.zeros(1, *shape, requires_grad=True)
        forward, delta = count(lambda: seed(x))
        full = _backward(count, delta, [x, *weights])
        weights_alone, passing = _backward(count, delta, weights), _backward(count, delta, [x])
    return SeedCost(forward, full, weights_alone, passing, tuple(sorted(count.uncounted)))


def _backward(count: _Counter, delta: Tensor, wanted: Sequence[Tensor]) -> int:
    if not delta.requires_grad or not wanted:
        return 0
    flops, _ = count(lambda: torch.autograd.grad(delta.sum(), wanted, allow_unused=True, retain_graph=True))
    return flops


def copy_cost(grown: Grown, slot: str, fit: Fit) -> SeedCost:
    """Counts the cost of a copy of the block at a site, on the example that the site was heard on.

    Args:
        grown: the model.
        slot: of the site.
        fit: from `esper.kasmina.births.own.find_fits`.
    """
    count, site = _Counter(), grown.sites[slot]
    seed = copy_block(grown, slot).eval()
    weights, h = list(seed.parameters()), site.turned(fit.feature).detach()
    backwards = []
    with torch.enable_grad(), undisturbed(h):
        for needs_input, needs_weights in ((True, True), (False, True), (True, False)):
            for parameter in weights:
                parameter.requires_grad_(needs_weights and parameter.is_floating_point())
            x, call = h.clone().requires_grad_(needs_input), Call(*copy_inputs(tuple(fit.call)))
            forward, out = count(lambda x=x, call=call: seed(x, call))  # type: ignore[misc]
            wanted = [*([x] if needs_input else []), *(p for p in weights if p.requires_grad)]
            work = lambda o=out, w=wanted: torch.autograd.grad(o.float().sum(), w, allow_unused=True)  # noqa: E731
            backwards.append(count(work)[0] if out.requires_grad else 0)
    batch = fit.feature.shape[site.layout.index("B")]
    full, weights_alone, passing = (flops // batch for flops in backwards)
    return SeedCost(forward // batch, full, weights_alone, passing, tuple(sorted(count.uncounted)))


def _output_sum(output: Any) -> Tensor:
    leaves = [leaf for leaf in tensors_in(output) if leaf.requires_grad]
    return sum((leaf.float().sum() for leaf in leaves), torch.zeros(()))


def _backward_down_to(
    count: _Counter, grown: Grown, site: Site, example: Any, buffers: dict[str, Tensor]
) -> int | None:
    """FLOPs of the backward of the activations alone, from the output down to a site; None if the site runs without
    gradients, so that a segment which is computed again passes them on only where its inputs need them."""
    frozen = {name: p.detach() for name, p in grown.model.named_parameters()} | buffers
    leaf: list[Tensor] = []
    hidden = False

    def begin_here(_module: nn.Module, _args: Any, output: Any) -> Any:
        nonlocal hidden
        if not leaf:  # it may run again in backward
            hidden = not torch.is_grad_enabled()
            leaf.append(take(output, site.place).detach().requires_grad_())
        return put(output, site.place, leaf[0].clone())  # the host may work in place, on a leaf it must not

    def run() -> int:
        args, kwargs = arguments(copy_inputs(example))
        total = _output_sum(grown.model(*args, **kwargs))
        return count(total.backward)[0] if total.requires_grad else 0

    hush()  # of the frozen part
    handle = grown.model.get_submodule(site.module).register_forward_hook(begin_here)
    try:
        flops = call_with(grown.model, frozen, run)
    finally:
        handle.remove()
    return None if hidden else flops


def _forward_up_to_slots(count: _Counter, grown: Grown, example: Any) -> dict[str, int] | None:
    """FLOPs of the host's forward up to each slot; None where the host cannot stop at a slot."""
    host = resumable(grown)
    if host is None:
        return None
    (x,), _ = arguments(example)
    with evaluating(grown.model):
        return {slot: count(lambda slot=slot: host.forward_to(x.clone(), slot))[0] for slot in grown.sites}  # type: ignore[misc]


@contextlib.contextmanager
def _noting_order(grown: Grown) -> Iterator[list[str]]:
    """Within the block a list fills with slot ids in the order in which their sites run."""
    order: list[str] = []
    handles = [
        grown.model.get_submodule(site.module).register_forward_hook(lambda *_, slot=slot: order.append(slot))
        for slot, site in grown.sites.items()
    ]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def host_cost(grown: Grown, example: Any) -> HostCost:
    """Counts the host's cost; the model, its buffers and the random streams are left as they were.

    Args:
        grown: a model whose slots are empty.
        example: a batch of its inputs, as for `attach`; the batch axis is the first axis of the first tensor in it.
    """
    args, kwargs = arguments(copy_inputs(example))
    batch = next(tensors_in((*args, kwargs))).shape[0]
    weights = {
        name: p.detach().requires_grad_()  # of a frozen host too
        for name, p in grown.model.named_parameters()
        if p.is_floating_point() and not name.startswith(CONTAINER)
    }
    count = _Counter()

    def buffers() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in grown.model.named_buffers()}

    def run() -> tuple[int, int, tuple[str, ...]]:
        with _noting_order(grown) as order:
            forward, output = count(lambda: grown.model(*args, **kwargs))
        total = _output_sum(output)
        # A host that computes no gradient, as under no_grad, has no backward.
        return forward, count(total.backward)[0] if total.requires_grad else 0, tuple(order)

    skips = any(site.may_skip for site in grown.sites.values())
    whole = evaluating(grown.model) if skips else contextlib.nullcontext()  # in train() a site may be left out
    with undisturbed(grown.model), whole, torch.enable_grad():
        forward, backward, order = call_with(grown.model, weights | buffers(), run)
        down_to: dict[str, int] = {}
        for slot, site in grown.sites.items():
            flops = _backward_down_to(count, grown, site, example, buffers())
            down_to[slot] = backward if flops is None else flops
        shared = _forward_up_to_slots(count, grown, example)
    per_slot = {slot: flops // batch for slot, flops in down_to.items()}
    if shared is not None:
        shared = {slot: flops // batch for slot, flops in shared.items()}
    missed = tuple(sorted(count.uncounted))
    return HostCost(forward // batch, backward // batch, per_slot, shared, order, missed)
