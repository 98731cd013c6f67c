"""Copies of the host's own blocks: which sites can have one, and how it is made.

Block expansion (Wu et al. 2024, "LLaMA Pro") and stacking (Du et al. 2024, "Stacking your transformers") put copies of
a trained network's blocks behind themselves, between two runs. Here a copy is a seed, born during the run. It is made
when it is staged, and takes its weights when it enters, from the host as all ranks then hold it: so nothing travels and
nothing is saved in between, and a run that is killed or goes back there comes to the same bits.

    identity   the host's weights, the last projections at zero: block(h) = h, and their gradient is alive
    copy       the host's weights as they are; it enters by its ramp alone

What `check_fit` asks of a site: its module maps a feature to one of the same shape, passes it on beside what it adds (a
skip, so that the host keeps a gradient at full alpha), shares no parameter with the rest of the model, holds no other
site, no hook of the user's, and no float buffer that only its own rank knows how to fill.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from esper.kasmina.axes.block import Call, OwnBlock
from esper.kasmina.axes.feature import copy_inputs, take
from esper.kasmina.births.projections import last_projections
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.regions import strip
from esper.kasmina.slots.sites import arguments
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError


def _do_nothing(*args: Any) -> None:
    """Stands for a hook of the site's slots in a copy, until it is taken off."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a site's module was called with in one forward, and what it returned."""

    call: Call
    output: Any


@contextlib.contextmanager
def left_as_it_was(grown: Grown) -> Iterator[None]:
    """Within the block a forward may change buffers and modes of the model and draw numbers; then all is as before."""
    flags = [(module, module.training) for module in grown.model.modules()]
    buffers = {name: buffer.clone() for name, buffer in grown.model.named_buffers()}
    try:
        with undisturbed(grown.model):
            yield
    finally:
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for name, buffer in grown.model.named_buffers():
                buffer.copy_(buffers[name])


def hear_sites(grown: Grown, example: Any) -> dict[str, Heard]:
    """Runs the model once in eval() and notes the call of each site's module; the model is left as it was.

    Args:
        grown: the model.
        example: one batch of inputs, as for `esper.kasmina.attach.attach`.
    """
    heard: dict[str, Heard] = {}
    handles = []
    for slot, site in grown.sites.items():

        def note(_m: nn.Module, args: Any, kwargs: Any, output: Any, slot: str = slot) -> None:
            args, kwargs, output = copy_inputs((args, kwargs, output))
            heard[slot] = Heard(Call(args, kwargs), output)

        handles.append(
            grown.model.get_submodule(site.module).register_forward_hook(note, with_kwargs=True, prepend=True)
        )
    args, kwargs = arguments(copy_inputs(example))
    try:
        with left_as_it_was(grown), torch.no_grad(), grown.disabled():
            grown.model.eval()(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return heard


def copy_block(grown: Grown, slot: str) -> OwnBlock:
    """Returns a copy of the module at a site with its present weights, all of it trainable."""
    source = grown.model.get_submodule(grown.sites[slot].module)
    hooks = [
        hook
        for module in source.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if _is_ours(hook)
    ]
    twin = strip(copy.deepcopy(source, {id(hook): _do_nothing for hook in hooks}))
    for module in twin.modules():
        for kept in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in kept.items() if hook is _do_nothing]:
                del kept[key]
                for known in (module._forward_hooks_with_kwargs, module._forward_pre_hooks_with_kwargs):
                    known.pop(key, None)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return OwnBlock(twin, grown.sites[slot])


def _is_ours(hook: Any) -> bool:
    owner = getattr(hook, "__self__", hook)
    return str(type(owner).__module__).partition(".")[0] == "esper"


def set_weights(seed: OwnBlock, source: nn.Module, zeroed: Sequence[str]) -> None:
    """Gives a copy the present weights and buffers of the module that it is a copy of.

    Args:
        seed: the copy.
        source: the site's module.
        zeroed: names of the modules in the block whose parameters are set to zero.
    """
    tensors = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*seed.block.named_parameters(), *seed.block.named_buffers()):
            tensor.copy_(tensors[name])
        for name in zeroed:
            for parameter in seed.block.get_submodule(name).parameters():
                parameter.zero_()


@dataclass(frozen=True, slots=True)
class Fit:
    """A site whose block can be copied.

    Fields:
        call: of the site's module, on an example, without its cache.
        feature: what it returned, as the host has it.
        zeroed: names of the modules that are zero at birth; empty under ``copy``.
        parameters: of the copy.
    """

    call: Call
    feature: Tensor
    zeroed: tuple[str, ...]
    parameters: int


def find_fits(
    grown: Grown, example: Any, *, identity: bool, patterns: Sequence[str]
) -> tuple[dict[str, Fit], dict[str, str]]:
    """Finds the sites whose blocks can be copied.

    Args:
        grown: the model.
        example: one batch of inputs.
        identity: whether a copy is to be the identity at its birth.
        patterns: as in `esper.kasmina.births.projections.last_projections`.

    Returns:
        By slot what a copy there is like; and by slot why there can be none.
    """
    if example is None:
        raise ConfigError("slots.blocks: copy needs an example of the model's input; attach with one")
    fits, reasons = {}, {}
    for slot, heard in hear_sites(grown, example).items():
        try:
            fits[slot] = check_fit(grown, slot, heard, identity=identity, patterns=patterns)
        except ConfigError as error:
            reasons[slot] = str(error)
    return fits, reasons


def check_fit(grown: Grown, slot: str, heard: Heard, *, identity: bool, patterns: Sequence[str]) -> Fit:
    """Checks that the block at a site can be copied.

    Raises:
        ConfigError: it cannot; the text names the block and says why.
    """
    site = grown.sites[slot]
    source, what = grown.model.get_submodule(site.module), f"the block {site.module!r}"
    _check_parts(grown, slot, source, what)
    feature = take(heard.output, site.place)
    if heard.call.find_feature(feature) is None:
        raise ConfigError(f"{what} takes no tensor of its output's shape {tuple(feature.shape)}")
    if type(heard.call.cache).__name__ == "EncoderDecoderCache":
        raise ConfigError(f"{what} keeps an encoder's and a decoder's cache, where a copy has no layer of its own")
    seed = copy_block(grown, slot)
    seed.eval()
    call = Call(*copy_inputs(tuple(_without_cache(heard.call))))
    h = site.turned(feature).detach().clone()
    if not _passes_on(seed, h, call):
        raise ConfigError(
            f"{what} has no skip: with all of its weights at zero no gradient reaches its input, so at full alpha the "
            "host behind it would live by the copy alone"
        )
    zeroed = tuple(last_projections(source, patterns)) if identity else ()
    if identity:
        if not zeroed:
            raise ConfigError(
                f"{what} has no last projection of a known name; name them by slots.copy_zero, or set "
                "slots.copy_init=copy"
            )
        set_weights(seed, source, zeroed)
        with torch.no_grad():
            same = torch.equal(seed(h.clone(), call), h)
        if not same:
            raise ConfigError(
                f"{what} is not the identity with {', '.join(zeroed)} at zero; name its last projections by "
                "slots.copy_zero, or set slots.copy_init=copy"
            )
    return Fit(call, feature, zeroed, sum(p.numel() for p in seed.parameters()))


def _without_cache(call: Call) -> Call:
    cache = call.cache
    if cache is None:
        return call
    kwargs = {name: None if value is cache else value for name, value in call.kwargs.items()}
    return Call(tuple(None if value is cache else value for value in call.args), kwargs)


def _check_parts(grown: Grown, slot: str, source: nn.Module, what: str) -> None:
    """Refuses a block that holds what a copy cannot have."""
    name = grown.sites[slot].module
    inside = [s for s, site in grown.sites.items() if s != slot and f"{site.module}.".startswith(f"{name}.")]
    if inside:
        raise ConfigError(f"{what} holds the site of slot {inside[0]}; choose sites that do not hold one another")
    if not any(True for _ in source.parameters()):
        raise ConfigError(f"{what} has no parameters")
    own = {id(p) for p in source.parameters()}
    below = f"{name}."
    others = dict(grown.model.named_parameters(remove_duplicate=False))
    shared = [other for other, p in others.items() if id(p) in own and not other.startswith(below)]
    if shared:
        raise ConfigError(f"{what} shares parameters with the rest of the model ({shared[0]})")
    statistics = {
        id(buffer)
        for module in source.modules()
        if isinstance(module, _NormBase)
        for buffer in module._buffers.values()
    }
    saved = set(source.state_dict())
    for key, buffer in source.named_buffers():
        if buffer.is_floating_point() and key in saved and id(buffer) not in statistics:
            raise ConfigError(f"{what} keeps the float buffer {key}, which each rank may fill by itself")
    for key, module in source.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values())
        if any(not _is_ours(hook) for hook in hooks):
            raise ConfigError(f"{what} has a hook of its own ({key or 'on itself'}), which a copy cannot have")


def _passes_on(seed: OwnBlock, h: Tensor, call: Call) -> bool:
    """Whether a gradient reaches the input of a block whose parameters are all zero."""
    with _all_zero(seed), torch.enable_grad():
        x = h.clone().requires_grad_()
        out = seed(x, call)
        weights = torch.linspace(1.0, 2.0, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        if not out.requires_grad:
            return False
        (grad,) = torch.autograd.grad((out * weights).sum(), x, allow_unused=True)
    return grad is not None and bool(grad.count_nonzero())


@contextlib.contextmanager
def _all_zero(seed: nn.Module) -> Iterator[None]:
    before = [(parameter, parameter.detach().clone()) for parameter in seed.parameters()]
    try:
        with torch.no_grad():
            for parameter, _ in before:
                parameter.zero_()
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before:
                parameter.copy_(value)


def describe_reasons(reasons: Mapping[str, str]) -> str:
    """The reasons of `find_fits` in one line."""
    return "; ".join(f"{slot}: {why}" for slot, why in reasons.items())
