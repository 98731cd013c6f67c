r"""Slots on a model: one public forward hook per site, all slots in one container at the model's root.

    grown = esper.attach(model, r"blocks\.\d+", example)      # or {"r0c0": "blocks.0"}
    grown.status()

The host's own state-dict keys stay what they were; a planted seed adds ``esper_slots.<slot>.seed.*``. (A wrapper would
rename the host's keys, a class swap breaks fused paths and pickling, a hook that holds an unregistered seed hides its
parameters from the optimizer and from DDP without an error.)
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from esper.kasmina.export import export
from esper.kasmina.feature import tensors_in
from esper.kasmina.pulse import Pulse
from esper.kasmina.sites import CONTAINER, Site, find_sites, is_compiled
from esper.kasmina.slot import SeedSlot
from esper.kasmina.status import status_table
from esper.leyline.errors import ConfigError
from esper.leyline.slots import sort_slots

HOST = "host"


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
        beat: what the slots share.
        example: the batch of inputs that it was attached with; None for a handle that was made without.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], example: Any = None) -> None:
        self.model, self.example = model, example
        self.sites = {slot: sites[slot] for slot in sort_slots(sites)}
        container = model.get_submodule(CONTAINER)
        self.slots: dict[str, SeedSlot] = {slot: container.get_submodule(slot) for slot in self.sites}  # type: ignore[misc]
        beats = {id(holder.beat): holder.beat for holder in self.slots.values() if holder.beat is not None}
        assert len(beats) == 1, "the slots of one model share one beat"
        (self.beat,) = beats.values()

    @contextlib.contextmanager
    def override(self, alphas: Mapping[str, float | Tensor]) -> Iterator[None]:
        """Within the block the named slots use these alphas, whatever their stage; nothing else changes.

        Args:
            alphas: in [0, 1], for all samples alike; or a tensor with one per sample (see `esper.kasmina.rows`).
        """
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

    @contextlib.contextmanager
    def logits(self, logits: Tensor | None) -> Iterator[None]:
        """Within the block CONFIDENCE reads these class logits, [B, K >= 2], one row per sample (None: has none).

        `esper.kasmina.confidence.confident` makes them where a slot asks for them.
        """
        before, self.beat.logits = self.beat.logits, logits
        try:
            yield
        finally:
            self.beat.logits = before

    @contextlib.contextmanager
    def tallied(self, weights: Tensor) -> Iterator[None]:
        """Within the block g_eff of GATE and CONFIDENCE goes into the slots' tallies: a forward of training.

        Args:
            weights: [B], 1 for a sample, 0 for a stand-in that does not count.
        """
        before, self.beat.weights = self.beat.weights, weights
        try:
            yield
        finally:
            self.beat.weights = before

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

    def status(self, console: Console | None = None) -> Table:
        """Prints, and returns, a table of the slots: site, topology, dim, phase, alpha, parameters of the seed.

        Args:
            console: where to print; None: standard output.
        """
        table = status_table(self)
        (console or Console()).print(table)
        return table

    def parameters_without_gradient(self, *args: Any, **kwargs: Any) -> list[str]:
        """Names of trainable parameters that the model's output does not depend on; the model is left as it was.

        Args:
            args, kwargs: one batch of the model's inputs.
        """
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        devices = {p.device for p in named.values() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
            output = torch.func.functional_call(self.model, buffers, args, kwargs)
            leaves = [leaf for leaf in tensors_in(output) if leaf.requires_grad]
            total = sum((leaf.float().sum() for leaf in leaves), torch.zeros(()))
            grads = torch.autograd.grad(total, list(named.values()), allow_unused=True) if leaves else []
        return [name for name, grad in zip(named, grads) if grad is None] if leaves else list(named)

    def export(self, example: Any = None, *, fold: bool = True, partial: bool = False) -> nn.Module:
        """A plain module that computes what this model computes now, without a class of esper; see `kasmina.export`.

        Args:
            example: one batch of inputs to trace and to check with; None: the one given to `attach`.
            fold: make linear seeds and scales part of the weights beside them; False: equal bit for bit.
            partial: also take seeds with an alpha between 0 and 1, as they are now.
        """
        return export(self, example, fold=fold, partial=partial).module

    def incubate(self, slot: str, /, *args: Any, **kwargs: Any) -> Any:
        """The shadow forward of a TRAINING seed: the model's output with this seed at alpha 1 and all else frozen.

        The host's and the other seeds' parameters are detached and their buffers cloned, so that a loss on the result
        reaches this seed alone and leaves no trace in the host. Other TRAINING seeds do not take part. The caller
        replays the random number stream of the host's own forward.

        Args:
            slot: the slot whose seed learns.
            args, kwargs: the model's inputs.
        """
        own = f"{CONTAINER}.{slot}."
        frozen: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if not name.startswith(own):
                frozen[name] = nn.Parameter(parameter.detach(), requires_grad=False)  # a compiler tells types apart
        for name, buffer in self.model.named_buffers():
            if not name.startswith(own):
                frozen[name] = buffer.clone()
        with self.override({slot: 1.0}):
            return torch.func.functional_call(self.model, frozen, args, kwargs)


def _check_root(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach: got {type(model).__name__}, expected a model, an nn.Module")
    if isinstance(model, nn.parallel.DistributedDataParallel) or is_compiled(model):
        raise ConfigError("attach comes before torch.compile and before DistributedDataParallel: pass the bare model")
    if hasattr(model, CONTAINER):
        raise ConfigError("this model already has slots; attach once, with all sites")
    plain = type(model).forward is nn.Sequential.forward
    container = isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict) and not plain
    if container or isinstance(model, nn.TransformerEncoderLayer):
        what = f"{type(model).__name__} is itself a {'container' if container else 'fused layer'}"
        raise ConfigError(f"the root {what}: make it a child of a module of your own, attach there")


def attach_described(model: nn.Module, described: Mapping[str, Site], example: Any = None) -> Grown:
    """Puts empty slots at sites that were described before (a checkpoint's record), without a dry run.

    Raises:
        ConfigError: the model has no such submodule, or an order mistake.
    """
    _check_root(model)
    known = dict(model.named_modules())
    for slot, site in described.items():
        if site.module not in known:
            raise ConfigError(f"slot {slot}: the model has no module {site.module!r}; is it the recorded host?")
    pulse = Pulse()
    container = Slots({slot: SeedSlot(slot, site, pulse.beat) for slot, site in described.items()})
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.add_module(CONTAINER, container.to(device))
    model.register_forward_pre_hook(pulse.begin)
    for slot, site in described.items():
        holder = container[slot]
        assert isinstance(holder, SeedSlot)
        pulse.watch(model, site.module, holder)
    model.register_forward_hook(pulse.end, always_call=True)
    return Grown(model, described, example)


def attach(model: nn.Module, sites: Mapping[str, str] | str, example: Any) -> Grown:
    """Puts empty slots on a model, in place. Attach before compile and before DDP.

    Args:
        model: any `nn.Module`.
        sites: slot id -> dotted name of the submodule whose output holds the feature there; or a regular expression
            that matches the whole names of submodules, which get the ids r0c0, r1c0, ... in the order of execution.
        example: one batch of the model's input: the one input, a tuple of inputs, or a dict of keyword inputs (an
            input that is itself a dict goes into a tuple). Shapes and topology are read off it.

    Returns:
        The handle to the model and its slots.

    Raises:
        ConfigError: unknown site, a pattern without a match, a site that does not fire exactly once, no tensor, or an
            order mistake.
    """
    _check_root(model)
    return attach_described(model, find_sites(model, sites, example), example)
