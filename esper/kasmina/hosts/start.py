"""What every built-in host can begin with: weights from elsewhere, and parts of it that do not learn."""

import re
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks


@dataclass(kw_only=True, slots=True)
class StartConfig:
    """Settings that hosts of every kind have."""

    weights: str | None = None
    """Weights to start from: a file of safetensors or of ``torch.save(state_dict)``, another RUN whose network has not
    grown, or a folder of ``save_pretrained``; every tensor must fit. null: random ones.
    """

    weights_step: int | None = None
    """Where ``weights`` is a RUN, the step of its checkpoint; null: the one that validation chose."""

    freeze: str = "none"
    """What of the host does not learn: ``none``, ``all``, or a regular expression for whole names of parameters, such
    as tokens.*; layers whose parameters are all frozen keep their running statistics, too.
    """

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("weights_step", self.weights_step is None or self.weights is not None, "needs host.weights=<a RUN>")
            try:
                re.compile(self.freeze)
            except re.error as error:
                check("freeze", False, f"no regular expression ({error}); or none, or all")


def freeze(host: nn.Module, what: str) -> None:
    """Freezes parts of a host, in place.

    Args:
        host: before slots are attached.
        what: see `StartConfig.freeze`.

    Raises:
        ConfigError: a pattern matches no parameter.
    """
    if what == "none":
        return
    named = dict(host.named_parameters())
    chosen = [name for name in named if what == "all" or re.fullmatch(what, name)]
    if not chosen:
        raise ConfigError(f"host.freeze = {what!r}: matches no parameter, such as {', '.join(list(named)[:4])}")
    for name in chosen:
        named[name].requires_grad_(False)
    for module in host.modules():
        own = list(module.parameters())
        held = not any(parameter.requires_grad for parameter in own) and (own or what == "all")
        if isinstance(module, _NormBase) and held:
            module.eval()  # it normalises by the statistics that it has, and takes none
