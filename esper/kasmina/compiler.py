"""Compiles a grown model region by region, before it is needed, so that no step of training waits for a compiler.

    start         runs the host once to see which modules fire in which order, then chooses its regions and *rehearses*
                  them: runs them forward and backward in every way in which training will call them
    staging       rehearses a seed's `join` with its slot, beside the model; if that fails, the birth fails
    new variant   a ramp with another operator, or a gate that comes or goes, rehearses that one slot again
    alpha         needs no rehearsal: alpha is a tensor
    plant, prune  need none: no region holds another's module

A rehearsal leaves the random streams, the statistics and the gradients as they were.

    compiler = Compiler(grown, "inductor", train_sizes=(32,), eval_sizes=(256, 7))
    compiler.host(example)
    grown.slots["r0c0"].plant(seed, compiler.stage("r0c0", seed))
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from esper.kasmina.axes.feature import copy_inputs, take
from esper.kasmina.kernels.rehearsing import Ahead, Compiled, Stopwatch, backward, resize_batch
from esper.kasmina.lending import call_with, hush, stand_ins
from esper.kasmina.slots.beat import Beat
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.regions import Backend, Region, choose_regions, compile_failures, reason
from esper.kasmina.slots.sites import CONTAINER, arguments
from esper.kasmina.slots.slot import SeedSlot
from esper.kasmina.streams import undisturbed
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError
from esper.leyline.stages import Incubation


class Compiler:
    """Owns the regions of one grown model.

    Args:
        grown: the model, its slots empty or not.
        backend: backend of torch.compile, by name or as a function.
        train_sizes: batch sizes that training will see; each is rehearsed, in this order. A graph of a dynamic batch is
            made for the first of them.
        eval_sizes: the same for evaluation.
        incubation: how a TRAINING seed learns: STE has a graph of its own; SHADOW runs the host frozen.
        autocast: makes the context that a forward runs under.

    Attributes:
        regions: the host's regions by the name of their module.
        features: an example feature of each slot, once `watch` has run.
        reports: what each rehearsal took; who tells of them empties it.
        ahead: compiles beside training; None if nobody does.
    """

    def __init__(
        self,
        grown: Grown,
        backend: Backend = "inductor",
        *,
        train_sizes: Collection[int],
        eval_sizes: Collection[int],
        incubation: Incubation = Incubation.SHADOW,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.grown, self.backend, self.incubation, self.autocast = grown, backend, incubation, autocast
        self.train_sizes, self.eval_sizes = list(dict.fromkeys(train_sizes)), list(dict.fromkeys(eval_sizes))
        self.regions: dict[str, Region] = {}
        self.reports: list[Compiled] = []
        self.ahead: Ahead | None = None
        self.features: dict[str, Tensor] = {}
        self._rehearsed: dict[str, tuple[Any, ...]] = {}
        self._reported: set[str] = set()
        # Inside DDP's forward, dynamo would cut graphs at DDP's buckets; regions are smaller than buckets.
        torch._dynamo.config.optimize_ddp = False

    # the host -----------------------------------------------------------------------------------------------------

    def host(self, example: Any) -> None:
        """Puts regions on the host and rehearses them.

        Args:
            example: one batch of the model's input, as at attach.

        Raises:
            ConfigError: a region cannot be compiled; the text says why.
        """
        sites = {site.module for site in self.grown.sites.values()}
        watch, order = Stopwatch(), self.watch(example)
        fired = [name for name in order if not name.startswith(CONTAINER)]
        below = {name for name, module in self.grown.model.named_modules() if name.startswith(CONTAINER)}
        chosen = choose_regions(self.grown.model, sites, set(fired) - below)
        first = min(order.index(f"{name}>") for name in sites)
        behind = [name for name in chosen if order.index(name) > first]
        for name, module in chosen.items():
            self.regions[name] = module.__dict__["forward"] = Region(module, "forward", self.backend)
        try:
            with self._strict(self.regions.values()), undisturbed(self.grown.model):
                for size in self.train_sizes:
                    self._forward(resize_batch(example, size), stand_ins(self.grown.model), [])
                    with torch.no_grad():
                        self._forward(resize_batch(example, size))
                    if self.incubation == Incubation.SHADOW:
                        self._run_frozen(resize_batch(example, size), behind)
                with evaluating(self.grown.model):
                    for size in self.eval_sizes:
                        self._forward(resize_batch(example, size))
        except compile_failures() as error:
            raise ConfigError(
                f"trainer.compile = true: the host cannot be compiled: {reason(error)}; set trainer.compile=false"
            ) from error
        self.reports.append(watch.stop("host"))

    def watch(self, example: Any) -> list[str]:
        """Returns the names of modules in the order in which they begin, ``name>`` where they end.

        Keeps one example feature per slot.
        """
        order: list[str] = []
        places = {site.module: (slot, site.place) for slot, site in self.grown.sites.items()}

        def note_end(name: str, output: Any) -> None:
            order.append(f"{name}>")
            if name in places:
                slot, place = places[name]
                self.features[slot] = self.grown.sites[slot].turned(take(output, place).detach())

        with contextlib.ExitStack() as stack:
            for name, module in self.grown.model.named_modules():
                begin = module.register_forward_pre_hook(lambda _m, _a, name=name: order.append(name))
                end = module.register_forward_hook(lambda _m, _a, out, name=name: note_end(name, out), prepend=True)
                stack.callback(begin.remove)
                stack.callback(end.remove)
            with undisturbed(self.grown.model), torch.no_grad():
                self._forward(example)
        return order

    def _forward(
        self, example: Any, tensors: Mapping[str, Tensor] | None = None, outputs: Sequence[Any] | None = None
    ) -> Any:
        """Runs the host on ``tensors`` and copies of its buffers; with ``outputs``, backward from them and its own."""
        args, kwargs = arguments(copy_inputs(example))
        model = self.grown.model
        buffers: dict[str, Tensor] = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def run() -> Any:
            with self.autocast():
                output = model(*args, **kwargs)
            if outputs is not None:
                backward([*outputs, output])
            return output

        with self.grown.disabled():
            return call_with(model, {**buffers, **(tensors or {})}, run)

    def _run_frozen(self, example: Any, behind: list[str]) -> None:
        """Runs forward and backward with the host frozen; regions behind the first site get inputs with a gradient."""
        outputs: list[Any] = []
        hush()

        def enter(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            def leaf(tensor: Tensor) -> Tensor:
                # A region may work in place, which no leaf allows.
                return tensor.detach().requires_grad_().clone() if tensor.is_floating_point() else tensor

            return tree_map_only(Tensor, leaf, (args, kwargs))

        with contextlib.ExitStack() as stack:
            for name in behind:
                module = self.grown.model.get_submodule(name)
                handle = module.register_forward_pre_hook(enter, with_kwargs=True)
                stack.callback(handle.remove)
                handle = module.register_forward_hook(lambda _m, _a, out: outputs.append(out), prepend=True)
                stack.callback(handle.remove)
            parameters = self.grown.model.named_parameters()
            frozen: dict[str, Tensor] = {n: nn.Parameter(p.detach(), requires_grad=False) for n, p in parameters}
            self._forward(example, frozen, outputs)

    # seeds --------------------------------------------------------------------------------------------------------

    def stage(self, slot: str, seed: nn.Module, operator: Operator = Operator.ADD) -> Region:
        """Compiles a seed with its join, beside the model; give both to `SeedSlot.plant`.

        Args:
            slot: where the seed will be planted.
            seed: the seed in train(), its parameters trainable.
            operator: the operator that the seed begins with.

        Raises:
            ConfigError: the seed cannot be compiled; the text says why.
        """
        watch, stand_in = Stopwatch(), self.beside(slot, seed, operator)
        try:
            if operator is not Operator.GATE:  # its gate does not exist yet
                self.rehearse(stand_in)
        except compile_failures() as error:
            raise ConfigError(f"the seed for {slot} cannot be compiled: {reason(error)}") from error
        self._rehearsed[slot] = self._variant(stand_in)
        self.reports.append(watch.stop(slot))
        assert stand_in.region is not None
        return stand_in.region

    def beside(self, slot: str, seed: nn.Module, operator: Operator) -> SeedSlot:
        """Returns a slot like this one, beside the model, with the seed and its region in it."""
        holder = self.grown.slots[slot]
        stand_in = SeedSlot(slot, self.grown.sites[slot], Beat(fired={slot: False})).to(holder.alpha.device)
        stand_in.plant(seed, Region(stand_in, "join", self.backend))
        stand_in.operator, stand_in.channels = operator, holder.channels
        return stand_in

    def follow(self) -> bool:
        """Rehearses slots whose operator or gate changed since the last call. A slot that fails runs uncompiled.

        Returns:
            Whether a slot had changed.
        """
        any_new = False
        for slot, holder in self.grown.slots.items():
            if holder.region is None or self._rehearsed.get(slot) == self._variant(holder):
                continue
            self._rehearsed[slot] = self._variant(holder)
            any_new, watch = True, Stopwatch()
            try:
                self.rehearse(holder)
            except compile_failures() as error:
                holder.region.failure = reason(error)
                holder.degraded = f"not compiled any more: {reason(error)}"
            self.reports.append(watch.stop(slot))
        return any_new

    @staticmethod
    def _variant(holder: SeedSlot) -> tuple[Any, ...]:
        return holder.operator, holder.fades_from, holder.gate is not None

    def rehearse(self, holder: SeedSlot) -> None:
        """Compiles the graphs LEARN, THROUGH and MEASURE of a slot; its phase, alpha, flags and tallies stay."""
        assert holder.region is not None
        feature = self.features[holder.slot]
        flags = [(p, p.requires_grad) for p in holder.parameters()]
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._strict([holder.region]))
            stack.enter_context(undisturbed(self.grown.model))
            stack.enter_context(self.autocast())
            stack.callback(lambda: [p.requires_grad_(flag) for p, flag in flags])
            for learning in (True, False):
                for parameter, _ in flags:
                    parameter.requires_grad_(learning)
                for size in self.train_sizes:
                    x = resize_batch(feature, size).requires_grad_()
                    backward([holder.rehearse(x)], [x])
                    if learning and self.incubation == Incubation.STE:
                        x = resize_batch(feature, size).requires_grad_()
                        backward([holder.rehearse(x, straight=True)], [x])
            with torch.no_grad():
                for size in self.train_sizes:
                    holder.rehearse(resize_batch(feature, size))
            with evaluating(holder):
                for size in self.eval_sizes:
                    holder.rehearse(resize_batch(feature, size))

    # host and seeds ---------------------------------------------------------------------------------------------

    def take_degraded(self) -> dict[str, str]:
        """Returns the regions that have fallen back since the last call, and why.

        Keys are names of modules of the host, and slots.
        """
        reasons = {name: r.failure for name, r in self.regions.items() if r.failure is not None}
        reasons |= {slot: s.degraded for slot, s in self.grown.slots.items() if s.region is not None and s.degraded}
        fresh = {name: why for name, why in reasons.items() if name not in self._reported}
        self._reported = set(reasons)
        return fresh

    def begin(self, record: Any) -> None:
        """Tells who compiles beside training the agreed record with which the run begins, or goes on."""
        if self.ahead is not None:
            self.ahead.begin(record)

    def close(self) -> None:
        """Ends what compiles beside training."""
        if self.ahead is not None:
            self.ahead.close()

    @contextlib.contextmanager
    def _strict(self, regions: Any) -> Iterator[None]:
        for region in regions:
            region.strict = True
        try:
            with contextlib.nullcontext() if self.ahead is None else self.ahead.watched():
                yield
        finally:
            for region in regions:
                region.strict = False
            # The cache keeps every symbolic shape that it ever saw: a megabyte a region.
            torch._subclasses.fake_tensor.FakeTensorMode.cache_clear()
