"""What attach asks of a site before it gets a slot: that it runs exactly once in every forward, and with gradients.

One that `may_skip` may be left out of forwards in train(), so what is read off it is from eval().

A site that is left out now and then (layer drop, an expert without a token, a branch) leaves its seed without a
gradient, which data parallel training does not survive. So where a forward in train() draws random numbers, chance has
further goes. Under `torch.no_grad` no seed could ever learn; a site in a segment of reentrant activation checkpointing
looks the same until backward, which runs it again with gradients.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.axes.feature import replace_tensors, tensors_in
from esper.kasmina.lending import call_with, hush
from esper.kasmina.streams import cuda_devices, moved, read_streams
from esper.leyline.errors import ConfigError

CHANCES = 4  # forwards in train() of a host that draws random numbers
STEADY = (
    "a host that leaves modules out (layer drop, experts, branches) must not leave out a site: set that to 0, "
    "choose a module that always runs, or name the slot in may_skip"
)

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Fired = dict[str, list[tuple[Any, bool]]]


def run_sites(
    model: nn.Module, where: Mapping[str, str], inputs: Inputs, may_skip: Collection[str] = ()
) -> dict[str, Any]:
    """Returns the output of each site in a forward in train(), without a graph, in the order of execution.

    If train() may leave out a site, the outputs are those of eval().

    Whoever calls it puts flags, buffers and random streams back.

    Args:
        model: the host, without slots.
        where: what an error calls each site, by the module's name.
        inputs: positional and keyword inputs of one call; each forward gets a copy.
        may_skip: names of sites that a forward in train() may leave out.

    Raises:
        ConfigError: a site does not run exactly once in every forward in train() and eval(), or without gradients.
    """
    devices = cuda_devices(model)
    before = read_streams(devices)
    model.train()
    with torch.enable_grad():
        fired = _run(model, list(where), inputs)
    _check(fired, where, "train", may_skip)
    chances = CHANCES if moved(before, read_streams(devices)) else 1
    for mode in [*["train"] * (chances - 1), "eval"]:
        model.train(mode == "train")
        with torch.no_grad():
            latest = _run(model, list(where), inputs)
            _check(latest, where, mode, may_skip if mode == "train" else ())
    hidden = [name for name, ((_, graded),) in fired.items() if not graded]
    if hidden:
        model.train()
        _check_again(model, hidden, where, inputs)
    return {name: _cut(output) for name, ((output, _),) in (latest if may_skip else fired).items()}


def _run(
    model: nn.Module, names: list[str], inputs: Inputs, then: Callable[[Any], None] = lambda output: None
) -> Fired:
    """Runs one forward, ``then`` what follows on its output; returns what each module returned, and whether gradients
    were enabled, in the order in which the modules first did."""
    fired: Fired = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: fired.setdefault(name, []).append((output, torch.is_grad_enabled()))

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        args, kwargs = copy.deepcopy(inputs)
        then(model(*args, **kwargs))
    finally:
        for handle in handles:
            handle.remove()
    return fired


def _check(fired: Fired, where: Mapping[str, str], mode: str, may_skip: Collection[str]) -> None:
    for name, text in where.items():
        times = len(fired.get(name, []))
        if times == 1 or (times == 0 and name in may_skip):
            continue
        why = "" if times else f"; {STEADY}" if mode == "train" else "; may_skip is for train() alone"
        raise ConfigError(f"{text} fired {times} times in one {mode}() forward, need exactly once{why}")


def _check_again(model: nn.Module, hidden: list[str], where: Mapping[str, str], inputs: Inputs) -> None:
    """Checks that backward runs these sites again, with gradients."""
    hush()
    leaves: dict[str, Tensor] = {
        name: nn.Parameter(p.detach()) for name, p in model.named_parameters() if p.is_floating_point()
    }

    def backward(output: Any) -> None:
        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.float().sum().backward(retain_graph=True)

    with torch.enable_grad():
        fired = call_with(model, leaves, lambda: _run(model, hidden, inputs, backward))
    for name in hidden:
        if name in fired and not any(graded for _, graded in fired[name]):
            raise ConfigError(
                f"{where[name]} runs without gradients in train() (under torch.no_grad?), so that no seed could learn "
                "there: choose a module that runs with them"
            )


def _cut(output: Any) -> Any:
    return replace_tensors(output, Tensor.detach)
