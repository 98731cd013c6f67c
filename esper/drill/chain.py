"""A host of linear layers, on which ranks drill."""

import torch
from torch import nn

DIM = 4


class ChainHost(nn.Module):
    """A host with a site behind each of its layers; features BC."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, DIM]."""
        for layer in self.layers:
            x = layer(x)
        return x
