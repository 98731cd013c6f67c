"""An average of the weights that grows and is pruned with the network.

    at first, at birth      average = the weights as they are then (a warm start)
    each optimizer step     average <- decay * average + (1 - decay) * weights

It follows the model by the names of its parameters: host, seeds, and gates while they live. A seed that is planted
joins with its present weights, one that is pruned leaves. A skipped optimizer step does not count. Buffers are not
averaged: whoever computes with the average has them as they are. The formula is that of
`torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`, whose model, a deep copy, does not grow.

No rank asks another: weights are equal on all ranks after a step, and so is what follows from them element by element.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import CheckpointError
from esper.tolaria.growth.guard import Judgement, StepReport
from esper.tolaria.lockstep.observers import Observer, Turn


def _place_average(average: Tensor | None, parameter: Tensor) -> Tensor:
    """An average where its parameter lies, float32 or wider; a new one has the parameter's value."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    start = parameter if average is None else average
    return start.detach().to(device=parameter.device, dtype=dtype, copy=average is None)


class WeightAverage(Observer):
    """The average of one network, on one rank.

    Args:
        grown: the network.
        decay: share of the average that one optimizer step keeps, in (0, 1).

    Fields:
        averages: by the name of the parameter.
        in_use: the model computes with the averages at present, see `applied`.
    """

    name = "ema"

    def __init__(self, grown: Grown, decay: float) -> None:
        self.grown, self.decay = grown, decay
        self.averages: dict[str, Tensor] = {}
        self.in_use = False
        self._parameters: list[Tensor] = []
        self.follow()

    def _named(self) -> dict[str, nn.Parameter]:
        named = self.grown.model.named_parameters()  # tied ones once
        return {name: p for name, p in named if p.is_floating_point() or p.is_complex()}

    def follow(self) -> None:
        """Takes in what was planted, with its present value, and lets go of what is gone; all else stays."""
        named = self._named()
        self.averages = {name: _place_average(self.averages.get(name), parameter) for name, parameter in named.items()}
        self._parameters = list(named.values())

    def restart(self) -> None:
        """Begins with the present weights, whatever it was before."""
        self.averages.clear()
        self.follow()

    def after_follow(self, turn: Turn) -> None:
        """The model has grown, or was pruned."""
        self.follow()

    def after_step(self, report: StepReport | Judgement) -> None:
        """One optimizer step is done; one that was skipped does not count."""
        share = 1.0 - self.decay
        with torch.no_grad():
            if isinstance(report, Judgement):
                self._move_late(share * report.taken())
            elif not report.skipped:
                torch._foreach_lerp_(list(self.averages.values()), self._live(), share)

    def _live(self) -> list[Tensor]:
        """The weights, in the dtypes of the averages."""
        pairs = zip(self.averages.values(), self._parameters, strict=True)
        return [p if p.dtype == average.dtype else p.to(average.dtype) for average, p in pairs]

    def _move_late(self, share: Tensor) -> None:
        """The same without a wait for the device.

        Args:
            share: 0-D; 0 where the step was skipped.
        """
        shares: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        for average in self.averages.values():
            key = (average.dtype, average.device)
            shares[key] = shares[key] if key in shares else share.to(dtype=key[0], device=key[1])
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, self._live(), [shares[a.dtype, a.device] for a in averages])

    # computing with it --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model's parameters are the averages; afterwards they are what they were, bit for bit.

        A block within another changes nothing.
        """
        if self.in_use:
            yield
            return
        with torch.no_grad():
            live = [parameter.detach().clone() for parameter in self._parameters]
        parameters, self.in_use = self._parameters, True
        try:
            self.write()
            yield
        finally:
            self.in_use = False
            with torch.no_grad():
                torch._foreach_copy_(parameters, live)

    def write(self) -> None:
        """Overwrites the model's parameters with the averages, for good."""
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, list(self.averages.values()))

    # saving -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The decay and the living averages by name, of the model as it is now."""
        self.follow()
        return {"decay": self.decay, "averages": dict(self.averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies `state_dict` back; the model has the topology of then already.

        Raises:
            CheckpointError: another decay; a parameter is missing or unknown, or has another shape.
        """
        if state["decay"] != self.decay:
            raise CheckpointError(f"ema: saved with the decay {state['decay']}, this is {self.decay}")
        named, saved = self._named(), state["averages"]
        missing, unknown = sorted(set(named) - set(saved)), sorted(set(saved) - set(named))
        if missing or unknown:
            raise CheckpointError(f"ema: missing {missing[:5] or 'nothing'}, unknown {unknown[:5] or 'nothing'}")
        for name, parameter in named.items():
            if saved[name].shape != parameter.shape:
                shapes = f"{tuple(saved[name].shape)} for a parameter {tuple(parameter.shape)}"
                raise CheckpointError(f"ema: {name} is {shapes}")
        self.averages = {name: _place_average(saved[name].clone(), parameter) for name, parameter in named.items()}
        self.follow()


def write_averages(grown: Grown, common: Mapping[str, Any], where: str) -> None:
    """Overwrites the weights of a network that was rebuilt from a checkpoint with the average that lies in it.

    Args:
        grown: the network of that checkpoint. common: its common part. where: the file that it comes from.

    Raises:
        CheckpointError: it holds no average, or not this network's.
    """
    saved = common.get("observers", {}).get(WeightAverage.name)
    if saved is None:
        raise CheckpointError(f"{where}: it holds no average of the weights; train with trainer.ema=0.999")
    average = WeightAverage(grown, saved["decay"])
    average.load_state_dict(saved)
    average.write()
