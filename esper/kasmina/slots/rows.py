"""One alpha for each sample of a batch: several coalitions of seeds run in one forward, stacked along the batch.

    stacked = torch.cat([x, x])                                     # [2B, ...]
    with grown.override({"r0c0": torch.tensor([1.0] * B + [0.0] * B)}), torch.no_grad():
        output = grown.model(stacked)                               # with the seed, then without

The seed runs only on the samples whose alpha is not 0; the others keep the host's features bit for bit, whatever the
seed computes. For evaluation only: the gradient rules at alpha 0 and above (`esper.kasmina.slots.blend`) are different
ones, and one batch cannot follow both.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.leyline.errors import ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Checked alphas of a batch.

    Fields:
        alphas: alpha of each sample, [B] float32, on the CPU.
        chosen: indices of the samples whose alpha is not 0, int64, ascending, on the CPU.
    """

    alphas: Tensor
    chosen: Tensor

    def __format__(self, spec: str) -> str:
        return "per sample"

    def strength(self, feature: Tensor) -> Tensor:
        """Returns the alphas of the chosen samples, [R, 1, ...] to broadcast over their features, on their device."""
        return self.alphas[self.chosen].to(feature.device).view(-1, *[1] * (feature.ndim - 1))

    def check(self, feature: Tensor, slot: str) -> None:
        """Checks the features that the alphas are for.

        Raises:
            ConfigError: the batch has another size, or gradients are enabled.
        """
        if len(feature) != len(self.alphas):
            raise ConfigError(
                f"alpha override of {slot} has {len(self.alphas)} alphas, the features there are "
                f"{tuple(feature.shape)}: need one alpha per sample"
            )
        if torch.is_grad_enabled():
            raise ConfigError(f"alpha override of {slot}, one per sample: for evaluation, under torch.no_grad()")


def rows_of(value: Tensor, ndim: int, slot: str) -> Rows:
    """Checks alphas per sample.

    Args:
        value: float, [B] or [B, 1, ...] with as many axes as the slot's features have; not changed.
        ndim: that number: 4 for feature maps, 3 for sequences, 2 for vectors.
        slot: slot id, for the error.

    Raises:
        ConfigError: the tensor has another shape, or does not hold floats.
        ValueError: an alpha is NaN or outside [0, 1]; the first such sample is named.
    """
    what = f"alpha override of {slot}"
    fits = value.ndim == 1 or (value.ndim == ndim and value.shape[1:].numel() == 1)
    if not fits or not value.is_floating_point() or value.numel() == 0:
        whole = ", ".join(["B", *["1"] * (ndim - 1)])
        raise ConfigError(f"{what} is {value.dtype} {list(value.shape)}: need floats, [B] or [{whole}], one per sample")
    alphas = value.detach().reshape(-1).to("cpu", torch.float32)
    wrong = ~((alphas >= 0.0) & (alphas <= 1.0))  # NaN too
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(f"{what} = {alphas[at].item()!r} for sample {at}: must be a finite number in [0, 1]")
    return Rows(alphas.clone(), alphas.nonzero().flatten())
