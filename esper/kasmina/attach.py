"""Slots on a model: one public forward hook per site, all slots in one container at the model's root.

The host's own state-dict keys stay what they were; a planted seed adds ``esper_slots.<slot>.seed.*``. (A wrapper would
rename the host's keys, a class swap breaks fused paths and pickling, a hook that holds an unregistered seed hides its
parameters from the optimizer and from DDP without an error.)
"""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from esper.kasmina.slot import SeedSlot
from esper.leyline.errors import ConfigError
from esper.leyline.slots import parse_slot, sort_slots
from esper.leyline.topology import Topology

CONTAINER = "esper_slots"
HOST = "host"


@dataclass(frozen=True, slots=True)
class Site:
    """Where a slot sits and what flows there.

    Fields:
        slot: slot id. module: dotted name of the host's submodule whose output is the feature.
        topology, dim: axes of the feature and its channel count.
        shape: of one sample's feature in the example, without the batch axis.
    """

    slot: str
    module: str
    topology: Topology
    dim: int
    shape: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Places per sample that a seed is evaluated at (H*W, T, or 1)."""
        return math.prod(self.shape) // self.dim


class Slots(nn.ModuleDict):
    """The container of all slots. Called as a module it hands its input on: an `nn.Sequential` root runs it last."""

    def forward(self, x: Any) -> Any:
        """Returns ``x``."""
        return x


class Grown:
    """A host model with slots. ``model`` is the host itself, changed in place; this handle owns no tensor.

    Fields:
        model: the host, any `nn.Module`.
        sites: `Site` per slot id, row-major.
        slots: `SeedSlot` per slot id, row-major.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]) -> None:
        self.model = model
        self.sites = {slot: sites[slot] for slot in sort_slots(sites)}
        container = model.get_submodule(CONTAINER)
        self.slots: dict[str, SeedSlot] = {slot: container.get_submodule(slot) for slot in self.sites}  # type: ignore[misc]

    @contextlib.contextmanager
    def override(self, alphas: Mapping[str, float]) -> Iterator[None]:
        """Within the block the named slots use these alphas, whatever their stage; nothing else changes."""
        before = {slot: self.slots[slot].overridden for slot in alphas}
        try:
            for slot, value in alphas.items():
                self.slots[slot].override(value)
            yield
        finally:
            for slot, value_before in before.items():
                self.slots[slot].override(value_before)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes what the host alone would, bit for bit."""
        with self.override({slot: 0.0 for slot, holder in self.slots.items() if holder.seed is not None}):
            yield

    def owner_parameters(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Named parameters by owner: ``host`` first, then slots with a seed, row-major. Tied tensors appear once."""
        owners: dict[str, list[tuple[str, nn.Parameter]]] = {HOST: []}
        owners |= {slot: [] for slot, holder in self.slots.items() if holder.seed is not None}
        prefixes = {f"{CONTAINER}.{slot}.": slot for slot in self.slots}
        for name, parameter in self.model.named_parameters():
            owner = next((slot for prefix, slot in prefixes.items() if name.startswith(prefix)), HOST)
            owners[owner].append((name, parameter))
        return owners

    def seed_parameters(self, slot: str) -> int:
        """Parameters of the seed in ``slot``, trainable or not; 0 without one."""
        seed = self.slots[slot].seed
        return 0 if seed is None else sum(parameter.numel() for parameter in seed.parameters())

    def parameters_without_gradient(self, *example: Any) -> list[str]:
        """Names of trainable parameters that the model's output does not depend on; the model is left as it was.

        Args:
            example: one batch of the model's inputs.
        """
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        devices = {p.device for p in named.values() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            output = torch.func.functional_call(self.model, buffers, example)
            leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
            total = sum((leaf.float().sum() for leaf in leaves), torch.zeros(()))
            grads = torch.autograd.grad(total, list(named.values()), allow_unused=True) if leaves else []
        return [name for name, grad in zip(named, grads) if grad is None] if leaves else list(named)

    def incubate(self, slot: str, *args: Any) -> Any:
        """The shadow forward of a TRAINING seed: the model's output with this seed at alpha 1 and all else frozen.

        The host's and the other seeds' parameters are detached and their buffers cloned, so that a loss on the result
        reaches this seed alone and leaves no trace in the host. Other TRAINING seeds do not take part. The caller
        replays the random number stream of the host's own forward.

        Args:
            slot: the slot whose seed learns.
            args: the model's inputs.
        """
        own = f"{CONTAINER}.{slot}."
        frozen: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if not name.startswith(own):
                frozen[name] = parameter.detach()
        for name, buffer in self.model.named_buffers():
            if not name.startswith(own):
                frozen[name] = buffer.clone()
        with self.override({slot: 1.0}):
            return torch.func.functional_call(self.model, frozen, args)


def _modules_state(model: nn.Module) -> tuple[dict[str, bool], dict[str, Tensor]]:
    flags = {name: module.training for name, module in model.named_modules()}
    return flags, {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def _restore(model: nn.Module, flags: Mapping[str, bool], buffers: Mapping[str, Tensor]) -> None:
    for name, module in model.named_modules():
        module.training = flags[name]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def _dry_run(model: nn.Module, modules: Mapping[str, str], example: tuple[Any, ...]) -> dict[str, Tensor]:
    """One forward in train() and one in eval(): every site must fire exactly once in each, and return a tensor."""
    flags, buffers = _modules_state(model)
    devices = {tensor.device for tensor in (*model.parameters(), *buffers.values()) if tensor.device.type == "cuda"}
    features: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(sorted(devices, key=str)))
        stack.callback(_restore, model, flags, buffers)
        for mode in (True, False):
            fired: dict[str, list[Any]] = {slot: [] for slot in modules}
            handles = [
                model.get_submodule(name).register_forward_hook(
                    lambda _module, _args, output, _slot=slot, _fired=fired: _fired[_slot].append(output)
                )
                for slot, name in modules.items()
            ]
            try:
                model.train(mode)
                with torch.no_grad():
                    model(*example)
            finally:
                for handle in handles:
                    handle.remove()
            for slot, outputs in fired.items():
                where = f"site {modules[slot]!r} of slot {slot}"
                if len(outputs) != 1:
                    state = "train" if mode else "eval"
                    raise ConfigError(f"{where} fired {len(outputs)} times in one {state}() forward, need exactly once")
                if not isinstance(outputs[0], Tensor):
                    raise ConfigError(f"{where} returns {type(outputs[0]).__name__}, need a tensor")
                features[slot] = outputs[0]
    return features


def _site(slot: str, module: str, feature: Tensor) -> Site:
    topology = {t.ndim: t for t in Topology}.get(feature.ndim)
    if topology is None or not feature.is_floating_point():
        shape = f"{feature.dtype} {tuple(feature.shape)}"
        raise ConfigError(f"site {module!r} of slot {slot} returns {shape}, need float BCHW, BTC or BC")
    dim = feature.shape[topology.channel_axis]
    return Site(slot, module, topology, dim, tuple(feature.shape[1:]))


def attach(model: nn.Module, sites: Mapping[str, str], example: Any) -> Grown:
    """Puts empty slots on a model, in place. Attach before compile and before DDP.

    Args:
        model: any `nn.Module`.
        sites: slot id -> dotted name of the submodule whose output is the feature there.
        example: one batch of the model's input (or a tuple of inputs); shapes and topology are read off it.

    Returns:
        The handle to the model and its slots.

    Raises:
        ConfigError: unknown site, a site that does not fire exactly once, no tensor, or an order mistake.
    """
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    if isinstance(model, nn.parallel.DistributedDataParallel) or compiled:
        raise ConfigError("attach comes before torch.compile and before DistributedDataParallel: pass the bare model")
    if hasattr(model, CONTAINER):
        raise ConfigError("this model already has slots; attach once, with all sites")
    plain = type(model).forward is nn.Sequential.forward
    if isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict) and not plain:
        kind = type(model).__name__
        raise ConfigError(
            f"the root {kind} is itself a container: make it a child of a module of your own, attach there"
        )
    order = sort_slots(sites)
    known = dict(model.named_modules())
    for slot in order:
        parse_slot(slot)
        if sites[slot] not in known:
            near = [name for name in known if name.rsplit(".", 1)[-1] == sites[slot].rsplit(".", 1)[-1]]
            hint = f"; did you mean {', '.join(near[:5])}" if near else f"; it has {', '.join(list(known)[1:9])}, ..."
            raise ConfigError(f"slot {slot}: the model has no module {sites[slot]!r}{hint}")
    if len(set(sites.values())) != len(sites):
        raise ConfigError("two slots name the same module; each site takes one slot")
    example = example if isinstance(example, tuple) else (example,)
    features = _dry_run(model, {slot: sites[slot] for slot in order}, copy.deepcopy(example))
    described = {slot: _site(slot, sites[slot], features[slot]) for slot in order}
    container = Slots({slot: SeedSlot(slot) for slot in order})
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.add_module(CONTAINER, container.to(device))
    for slot in order:
        holder = container[slot]
        assert isinstance(holder, SeedSlot)
        known[sites[slot]].register_forward_hook(holder.hook)
    return Grown(model, described)
