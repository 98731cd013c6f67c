"""Features drawn to a teacher's inside a checkpointed segment: taken in one form, refused by name in the other."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.kasmina.attach import attach
from esper.leyline.errors import ConfigError
from esper.tolaria.training.distill import Distillation, DistillConfig, Teacher


class Host(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.reentrant is None:
            return self.head(self.block(h))
        return self.head(checkpoint(self.block, h, use_reentrant=self.reentrant))


def gradient(reentrant: bool | None) -> Tensor:
    """Gradient of the block by the term alone, features of the block drawn to those of the teacher's stem."""
    torch.manual_seed(3)
    host, teacher, x = Host(reentrant), Host(None), torch.randn(4, 6)
    grown = attach(host, {"r0c0": "block"}, x)
    config = DistillConfig(path="a.b:c", weight=0.5, features={"r0c0": "stem"})
    term = Distillation(config, Teacher(teacher, "here"), grown, x, contextlib.nullcontext)
    with term.lesson(x) as taught:
        taught(grown.model(x)).sum().backward()
    assert host.block.weight.grad is not None
    return host.block.weight.grad


def test_a_segment_of_the_default_form_gives_the_gradient_of_a_plain_forward() -> None:
    torch.testing.assert_close(gradient(False), gradient(None))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, at the check
def test_a_segment_of_the_reentrant_form_is_refused_by_name_instead_of_teaching_nothing() -> None:
    with pytest.raises(ConfigError, match=r"distill\.features\.r0c0: .* reentrant activation checkpointing"):
        gradient(True)
