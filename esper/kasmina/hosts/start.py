"""What every built-in host can begin with: weights from elsewhere, and parts of it that do not learn."""

import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from esper.leyline.errors import ConfigError


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
