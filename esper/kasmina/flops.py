"""What forwards and backwards cost, in FLOPs per sample: multiply-adds times two of convolutions and matrix products.

Costs are counted once, where they belong, and then only added up by formula (see `esper.accord.account`):

    host     one forward and one backward on a sample; and per slot, when it is first asked for, the backward of the
             activations alone from the output down to that slot: what a shadow forward pays to reach its seed
    seed     from a build on the meta device: forward, and the backward with or without a gradient of input and weights

Counted by torch.utils.flop_counter; attention runs on its plain matrix products meanwhile, since a fused kernel may
be none that the counter knows. Normalisation, activations and pooling are not counted, by anybody.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.blueprints import registry
from esper.kasmina.hosts.resume import resumable
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.feature import put, take, tensors_in
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import CONTAINER, Site, arguments
from esper.kasmina.streams import undisturbed
from esper.leyline.costs import HostCost, SeedCost
from esper.leyline.topology import Topology


def _counted(work: Callable[[], Any]) -> tuple[int, Any]:
    with sdpa_kernel([SDPBackend.MATH]), FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


@functools.cache
def seed_cost(topology: Topology, blueprint: str, dim: int, shape: tuple[int, ...]) -> SeedCost:
    """Cost of a blueprint at a site; shapes decide, no memory is allocated.

    Args:
        shape: of one sample's feature, without the batch axis.
    """
    with torch.device("meta"), torch.enable_grad():
        seed = registry.get(topology, blueprint).build(dim)
        weights = list(seed.parameters())
        found = []
        for needs_input, needs_weights in ((True, True), (False, True), (True, False)):
            for parameter in weights:
                parameter.requires_grad_(needs_weights)
            x = torch.empty(1, *shape, requires_grad=needs_input)
            forward, delta = _counted(lambda x=x: seed(x))  # type: ignore[misc]
            wanted = [*([x] if needs_input else []), *(weights if needs_weights else [])]
            backward = 0
            if delta.requires_grad:
                backward, _ = _counted(
                    lambda d=delta, w=wanted: torch.autograd.grad(d.sum(), w, allow_unused=True)  # type: ignore[misc]
                )
            found.append(backward)
    return SeedCost(forward, *found)


def _output_sum(output: Any) -> Tensor:
    leaves = [leaf for leaf in tensors_in(output) if leaf.requires_grad]
    return sum((leaf.float().sum() for leaf in leaves), torch.zeros(()))


def _down_to(grown: Grown, site: Site, example: Any, buffers: dict[str, Tensor]) -> int:
    frozen = {name: p.detach() for name, p in grown.model.named_parameters()} | buffers
    leaf: list[Tensor] = []

    def begin_here(_module: nn.Module, _args: Any, output: Any) -> Any:
        leaf.append(take(output, site.place).detach().requires_grad_())
        return put(output, site.place, leaf[0])

    handle = grown.model.get_submodule(site.module).register_forward_hook(begin_here)
    args, kwargs = arguments(example)
    try:
        output = torch.func.functional_call(grown.model, frozen, args, kwargs)
    finally:
        handle.remove()
    total = _output_sum(output)
    if not total.requires_grad:
        return 0
    flops, _ = _counted(lambda: torch.autograd.grad(total, leaf, allow_unused=True))
    return flops


def _shared(grown: Grown, example: Any) -> dict[str, int] | None:
    host = resumable(grown)
    if host is None:
        return None
    (x,), _ = arguments(example)
    with evaluating(grown.model):
        return {slot: _counted(lambda slot=slot: host.forward_to(x, slot))[0] for slot in grown.sites}  # type: ignore[misc]


@contextlib.contextmanager
def _order(grown: Grown) -> Iterator[list[str]]:
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
        grown: a model whose slots are empty. example: a batch of its inputs, as for `attach`; the batch axis is the
            first of the first tensor in it.
    """
    args, kwargs = arguments(example)
    batch = next(tensors_in((*args, kwargs))).shape[0]
    weights = [p for name, p in grown.model.named_parameters() if p.requires_grad and not name.startswith(CONTAINER)]

    def buffers() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in grown.model.named_buffers()}

    with undisturbed(grown.model), torch.enable_grad():
        call = functools.partial(torch.func.functional_call, grown.model, buffers(), args, kwargs)
        with _order(grown) as order:
            forward, output = _counted(call)
        total = _output_sum(output)
        backward, _ = _counted(lambda: torch.autograd.grad(total, weights, allow_unused=True))
        down_to = {slot: _down_to(grown, site, example, buffers()) for slot, site in grown.sites.items()}
        shared = _shared(grown, example)
    per_slot = {slot: flops // batch for slot, flops in down_to.items()}
    if shared is not None:
        shared = {slot: flops // batch for slot, flops in shared.items()}
    return HostCost(forward // batch, backward // batch, per_slot, shared, tuple(order))
