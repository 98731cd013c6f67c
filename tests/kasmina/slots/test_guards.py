"""What a running slot refuses: a feature that changes between batches or is gone, a site that fires twice."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.kasmina.attach import attach
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.slot import Phase
from esper.leyline.errors import ConfigError
from tests.support.bitwise import bits

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Loose(nn.Module):
    """Its site returns whatever the caller's function makes of it, as often as asked."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.site = nn.Linear(4, 4), nn.Identity()

    def forward(self, x: Tensor, make: Any = None, times: int = 1) -> Any:
        x = self.body(x)
        x = make(x) if make else x
        for _ in range(times):
            out = self.site(x)
        return out


def twice(x: Tensor) -> Tensor:
    return torch.cat([x, x], dim=1)


def loose(phase: Phase | None = Phase.BLEND) -> Grown:
    torch.manual_seed(0)
    grown = attach(Loose(), {"r0c0": "site"}, X)
    if phase is not None:
        grown.slots["r0c0"].plant(nn.Linear(4, 4))
        grown.slots["r0c0"].phase = phase
        grown.slots["r0c0"].set_alpha(1.0)
    return grown


WRONG = [
    (lambda x: x[:, None], 1, r"returned \(3, 1, 4\), need BC with C = 4 as at attach"),
    (twice, 1, r"returned \(3, 8\), need BC with C = 4 as at attach"),
    (lambda x: (x, x), 1, "returned tuple; need the same kind of output as at attach"),
    (lambda x: None, 1, "returned NoneType; need the same kind of output as at attach"),
    (None, 2, "fired twice in one forward; a slot needs a module that runs once"),
]


@pytest.mark.parametrize(("make", "times", "said"), WRONG)
def test_an_active_slot_refuses_what_it_was_not_made_for_and_goes_on_with_the_next_batch(make, times, said):
    grown = loose()
    before = grown.model(X)
    with pytest.raises(ConfigError, match="site 'site' of slot r0c0 " + said) as caught:
        grown.model(X, make, times)
    assert "\n" not in str(caught.value)
    assert torch.equal(grown.model(X), before)


@pytest.mark.parametrize(("make", "times", "said"), WRONG)
@pytest.mark.parametrize("phase", [None, Phase.OFF])
def test_an_empty_slot_does_not_even_look(phase, make, times, said):
    grown = loose(phase)
    made = make(grown.model.body(X)) if make else grown.model.body(X)
    out = grown.model(X, make, times)
    assert out is None if made is None else bits(out, made)


def test_a_dtype_that_changes_between_batches_is_refused_but_a_cast_model_and_autocast_are_not():
    grown = loose()
    grown.model(X)
    with pytest.raises(ConfigError, match=r"returned torch\.float64, before it was torch\.float32; keep one dtype"):
        grown.model(X, Tensor.double)
    with torch.autocast("cpu", torch.bfloat16):
        assert grown.model(X).dtype is torch.bfloat16
    assert grown.model(X).dtype is torch.float32
    grown.model.double()
    assert grown.model(X.double()).dtype is torch.float64
    with pytest.raises(ConfigError, match=r"returned torch\.float32, before it was torch\.float64"):
        grown.model(X.double(), Tensor.float)


def test_a_forward_that_fails_on_the_way_leaves_no_mark():
    grown = loose()

    def breaks(x: Tensor) -> Tensor:
        grown.model.site(x)
        raise RuntimeError("on the way")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="on the way"):
            grown.model(X, breaks)
    grown.model.site(X)
    grown.model.site(X)


def test_a_site_may_run_again_outside_of_a_root_forward():
    """Activation checkpointing computes the region again in backward; by hand a submodule runs as often as wanted."""

    class Saving(Loose):
        def forward(self, x: Tensor, make: Any = None, times: int = 1) -> Any:
            return checkpoint(super().forward, x, use_reentrant=False)

    torch.manual_seed(0)
    gradients = []
    for kind in (Loose, Saving):
        torch.manual_seed(0)
        grown = attach(kind(), {"r0c0": "site"}, X)
        grown.slots["r0c0"].plant(nn.Linear(4, 4))
        grown.slots["r0c0"].phase = Phase.BLEND
        grown.slots["r0c0"].set_alpha(0.5)
        for _ in range(2):
            grown.model(X).square().sum().backward()
        gradients.append([parameter.grad for parameter in grown.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.equal(grown.model.site(X), grown.model.site(X))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_guards_of_its_own(twin):
    grown = loose()
    copied = twin(grown.model)
    with pytest.raises(ConfigError, match="fired twice"):
        copied(X, None, 2)
    assert bits(copied(X), grown.model(X))


def test_a_compiler_sees_the_same_marks_in_every_forward():
    """No graph break and no recompile from batch to batch."""
    grown = loose()
    expected = grown.model(X)
    graphs = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(grown.model, backend=count, fullgraph=True)
    for _ in range(3):
        assert torch.allclose(compiled(X), expected)
    assert len(graphs) == 1
