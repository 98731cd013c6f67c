"""Seeds that mix positions heed what the host heeds: padding, masks, and both directions."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esper.kasmina.attach import attach
from esper.kasmina.slots.told import Told, find_teller
from tests.kasmina.axes.test_layout import Patches, encoder, normal, plant


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("as_floats", [False, True])
def test_padding_that_an_encoder_is_told_of_reaches_no_seed(first: bool, as_floats: bool) -> None:
    torch.manual_seed(0)
    host = encoder(first).eval()
    x, more = normal(2, 5, 16), normal(2, 2, 16) + 3
    order = (0, 1, 2) if first else (1, 0, 2)
    grown = attach(host, r"layers\.\d", x.permute(order))
    plant(grown, "attention")
    assert not grown.sites["r0c0"].causal
    padding: Tensor = torch.arange(7).expand(2, 7) >= 5
    if as_floats:
        padding = torch.zeros(2, 7).masked_fill(padding, -torch.inf)
    long = torch.cat([x, more], 1).permute(order)
    plain = grown.export()
    for model in (host, plain, copy.deepcopy(host)):
        alone = model(x.permute(order))
        with_padding = model(long, src_key_padding_mask=padding)
        torch.testing.assert_close(with_padding.narrow(1 if first else 0, 0, 5), alone, atol=1e-4, rtol=1e-4)
    with grown.override({"r0c0": torch.tensor([1.0, 0.0]), "r1c0": 1.0}), torch.no_grad():
        rows = host(long, src_key_padding_mask=padding)
    with torch.no_grad():
        whole = host(long, src_key_padding_mask=padding)
    sample = 0 if first else 1
    torch.testing.assert_close(rows.select(sample, 0), whole.select(sample, 0), atol=1e-5, rtol=1e-4)


def test_a_class_token_in_front_learns_from_what_is_behind_it() -> None:
    torch.manual_seed(0)
    host = Patches().eval()
    grown = attach(host, {"r0c0": "encoder.layers.1"}, normal(3, 1, 8, 8))
    plant(grown, "attention")
    holder = grown.slots["r0c0"]
    seen: list[Tensor] = []
    handle = holder.seed.norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))  # type: ignore[union-attr]
    host(normal(3, 1, 8, 8)).sum().backward(inputs=list(host.parameters()), retain_graph=True)
    handle.remove()
    feature = seen[0]
    (grad,) = torch.autograd.grad(host.head(holder(feature, feature)[:, 0]).sum(), feature)
    assert grad[:, 1:].abs().amax((0, 2)).min() > 0, "every patch is seen"
    assert all(p.grad is not None and p.grad.any() for _, p in grown.owner_parameters()["r0c0"])


def test_masks_become_one_of_four_axes() -> None:
    ones = torch.ones(2, 3, dtype=torch.bool)
    keys = torch.tensor([[1, 1, 0]])
    seen = torch.tensor([[[[True, True, False]]]])
    least = torch.finfo(torch.float32).min
    for name, mask in (
        ("attention_mask", keys),
        ("attention_mask", keys.bool()),
        ("attention_mask", seen),
        ("attention_mask", torch.zeros(1, 1, 1, 3).masked_fill(~seen, least)),
        ("key_padding_mask", keys == 0),
        ("src_key_padding_mask", torch.zeros(1, 3).masked_fill(keys == 0, -torch.inf)),
    ):
        assert torch.equal(Told(((name, mask),)).visible(ones), seen), name  # type: ignore[arg-type]
    pairs = torch.tensor([[False, True, True], [False, False, True]])
    assert torch.equal(Told((("src_mask", pairs),)).visible(ones), ~pairs[None, None])  # type: ignore[arg-type]
    both = Told((("src_mask", pairs), ("src_key_padding_mask", torch.tensor([[True, False, False]]))))
    assert both.visible(ones).tolist() == [[[[False, False, False], [False, True, False]]]]  # type: ignore[union-attr]
    assert Told((("attention_mask", torch.ones(1, 9)),)).visible(ones) is None, "of other positions"
    assert len(both.rows(torch.tensor([0]), 1).masks) == 2


def test_the_nearest_module_with_such_an_argument_tells() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.plain = encoder(True), nn.Linear(16, 16)

        def forward(self, x: Tensor, attention_mask: Any = None) -> Tensor:
            return self.plain(self.encoder(x))

    def told(site: str) -> Any:
        found = find_teller(Own(), site)
        return None if found is None else (found[0], [argument.name for argument in found[1]])

    assert told("encoder.layers.0.linear1") == ("encoder.layers.0", ["src_mask", "src_key_padding_mask"])
    assert told("plain") == ("", ["attention_mask"])
    assert find_teller(nn.Sequential(nn.Linear(2, 2)), "0") is None


class Remembering(nn.Module):
    """The root is told of the mask; the site lies in a checkpointed segment below."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.site, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        below = checkpoint(self.site, x, use_reentrant=False) if self.checkpointed else self.site(x)
        return self.head(torch.tanh(below))


def test_what_is_computed_again_in_backward_sees_the_mask_of_its_own_forward() -> None:
    x, masks = normal(2, 5, 8), (torch.arange(5) < torch.tensor([[5], [3]]), torch.arange(5) < torch.tensor([[2], [4]]))
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        host = Remembering(checkpointed)
        grown = attach(host, {"r0c0": "site"}, {"x": x, "attention_mask": masks[0]}, layout="BTC")
        plant(grown, "attention")
        first, second = (host(x, mask).square().sum() for mask in masks)
        second.backward()
        first.backward()
        gradients.append([p.grad for p in host.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]
