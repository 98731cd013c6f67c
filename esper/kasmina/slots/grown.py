"""The handle to a model with slots: overrides, owners of parameters, the shadow forward. It owns no tensor itself."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.axes.feature import copy_inputs, tensors_in
from esper.kasmina.axes.site import Site
from esper.kasmina.lending import call_with, hush, stand_ins
from esper.kasmina.slots.shadow import come_out, freeze
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import SeedSlot
from esper.kasmina.streams import cuda_devices, read_streams, set_streams, undisturbed
from esper.leyline.observation import BlueprintInfo
from esper.leyline.slots import sort_slots

HOST = "host"
Owners = dict[str, list[tuple[str, nn.Parameter]]]


class Slots(nn.ModuleDict):
    """The container of all slots. Its forward returns its input, since an `nn.Sequential` root runs it last."""

    def forward(self, x: Any) -> Any:
        """Returns ``x``."""
        return x


class Grown:
    """A host model with slots. ``model`` is the host itself, changed in place; this handle owns no tensor.

    Fields:
        model: the host, any `nn.Module`.
        sites: `Site` per slot id, row-major.
        slots: `SeedSlot` per slot id, row-major.
        beat: the state that the slots share.
        example: the batch of inputs given to `attach`; None for a handle made without one.
        copies: by slot, what a copy of the block there would add; None until somebody has looked.
        heard: plain data of what was counted of memory in a forward of the host; None where nobody counted.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], example: Any = None) -> None:
        self.model, self.example = model, example
        self.copies: Mapping[str, BlueprintInfo] | None = None
        self.heard: dict[str, Any] | None = None
        self.sites = {slot: sites[slot] for slot in sort_slots(sites)}
        container = model.get_submodule(CONTAINER)
        self.slots: dict[str, SeedSlot] = {slot: container.get_submodule(slot) for slot in self.sites}  # type: ignore[misc]
        beats = {id(holder.beat): holder.beat for holder in self.slots.values() if holder.beat is not None}
        assert len(beats) == 1, "the slots of one model share one beat"
        (self.beat,) = beats.values()
        self._owners: tuple[int, Owners] | None = None

    @contextlib.contextmanager
    def override(self, alphas: Mapping[str, float | Tensor]) -> Iterator[None]:
        """Within the block the named slots use these alphas, whatever their stage; nothing else changes.

        Args:
            alphas: in [0, 1], for all samples alike; or a tensor with one per sample (see `esper.kasmina.slots.rows`).
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
        """Within the block CONFIDENCE reads these class logits, [B, K >= 2], one row per sample; None gives it none.

        `esper.kasmina.slots.confidence.confident` makes them where a slot asks for them.
        """
        before, self.beat.logits = self.beat.logits, logits
        try:
            yield
        finally:
            self.beat.logits = before

    @contextlib.contextmanager
    def tallied(self, weights: Tensor) -> Iterator[None]:
        """Within the block the slots tally g_eff of GATE and CONFIDENCE; for a training forward.

        Args:
            weights: [B], 1 for a sample, 0 for a stand-in that does not count; 0-D: the same for all.
        """
        before, self.beat.weights = self.beat.weights, weights
        try:
            yield
        finally:
            self.beat.weights = before

    def owner_parameters(self) -> Owners:
        """Named parameters by owner: ``host`` first, then slots with a seed, row-major. Tied tensors appear once."""
        owners: Owners = {HOST: []}
        owners |= {slot: [] for slot, holder in self.slots.items() if holder.seed is not None}
        prefix = f"{CONTAINER}."
        for name, parameter in self.model.named_parameters():
            own = name.startswith(prefix) and name.split(".", 2)[1] in owners
            owners[name.split(".", 2)[1] if own else HOST].append((name, parameter))
        return owners

    def owner_map(self) -> Owners:
        """`owner_parameters`, kept from call to call until a seed or a gate comes or goes; not to be changed.

        A host whose own parameters are exchanged in between goes unseen here, and is named at the next wrap.
        """
        if self._owners is None or self._owners[0] != self.beat.changes:
            self._owners = self.beat.changes, self.owner_parameters()
        return self._owners[1]

    def drop_owner_map(self) -> None:
        """Lets go of the parameters in `owner_map`, before a seed is uprooted."""
        self._owners = None

    def seed_parameters(self, slot: str) -> int:
        """Counts the parameters of the seed in ``slot``, trainable or not; 0 without a seed."""
        seed = self.slots[slot].seed
        return 0 if seed is None else sum(parameter.numel() for parameter in seed.parameters())

    def parameters_without_gradient(self, *args: Any, **kwargs: Any) -> list[str]:
        """Names of trainable parameters that the model's output does not depend on; the model is left as it was.

        Args:
            args: positional inputs of the model, one batch.
            kwargs: keyword inputs of the model, one batch.
        """
        learning = stand_ins(self.model)
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

        def run() -> None:
            output = self.model(*copy_args, **copy_kwargs)
            leaves = [leaf for leaf in tensors_in(output) if leaf.requires_grad]
            if leaves:
                sum((leaf.float().sum() for leaf in leaves), torch.zeros(())).backward()

        with undisturbed(self.model), torch.enable_grad():
            copy_args, copy_kwargs = copy_inputs((args, kwargs))
            call_with(self.model, learning | buffers, run)
        return [name for name, leaf in learning.items() if leaf.grad is None]

    def incubate(self, slot: str, /, *args: Any, **kwargs: Any) -> Any:
        """Runs the shadow forward of a TRAINING seed: the output with this seed at alpha 1 and everything else frozen.

        A loss on the result reaches this seed alone and leaves no trace in the host. The caller replays the random
        number stream of the host's own forward. A loss that reads more than the output (what a forward leaves in an
        attribute of a module) goes into `shadow_loss`.

        Args:
            slot: the slot whose seed learns.
            args: positional inputs of the model.
            kwargs: keyword inputs of the model.
        """
        return self.shadow_loss(slot, lambda call: call(*args, **kwargs))

    def shadow_loss(self, slot: str, loss: Callable[[Callable[..., Any]], Any]) -> Any:
        """Computes a loss of a TRAINING seed at alpha 1, everything else frozen (`esper.kasmina.slots.shadow`).

        The host's and the other seeds' parameters are detached and their buffers cloned, so that backward reaches this
        seed alone and leaves no trace in the host. Other TRAINING seeds do not take part. It may be called once.

        Args:
            slot: the slot whose seed learns.
            loss: computes it, given what stands for the model: a call that takes the model's inputs, which stay as they
                are, and returns its output.

        Returns:
            What ``loss`` returns: a tensor, or containers of them.
        """
        hush()
        holder, streams = self.slots[slot], None
        if holder.hidden is None and torch.is_grad_enabled():
            devices = cuda_devices(self.model)
            streams = read_streams(devices)
        result = self._shadow(slot, loss, tracked=bool(holder.hidden))
        if streams is None or not holder.hidden:
            return result
        set_streams(streams, devices)
        return self._shadow(slot, loss, tracked=True)

    def _shadow(self, slot: str, loss: Callable[[Callable[..., Any]], Any], *, tracked: bool) -> Any:
        tensors, learning = freeze(self.model, f"{CONTAINER}.{slot}.", tracked=tracked)

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = copy_inputs((args, kwargs))
            return self.model(*args, **kwargs)

        def run(act: Callable[[], Any]) -> Any:
            recalled = self.beat.recalled
            try:
                with self.override({slot: 1.0}):
                    return call_with(self.model, tensors, act)
            finally:
                self.beat.recalled = recalled  # this backward is run within that of the host's own forward

        return come_out(run(lambda: loss(call)), run, learning)
