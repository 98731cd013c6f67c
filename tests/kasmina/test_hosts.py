"""Built-in hosts: registry, shapes, slot maps that tell the truth, and what each refuses."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.hosts import HOSTS, CNNConfig, GPTConfig, build_host, host, host_config_class
from esper.leyline.errors import ConfigError
from esper.leyline.slots import sort_slots
from esper.leyline.topology import Topology

VOCABULARY = 31


def cnn(side: int = 8, **settings: object) -> nn.Module:
    return build_host(CNNConfig(**settings), (1, side, side), 10)


def gpt(**settings: object) -> nn.Module:
    return build_host(GPTConfig(dim=16, block=12, **settings), (12,), VOCABULARY)


def tokens(length: int = 12) -> Tensor:
    return torch.randint(VOCABULARY, (3, length), generator=torch.Generator().manual_seed(0))


def sample(network: nn.Module) -> Tensor:
    on_maps = network.injection_points()[0].topology is Topology.FEATURE_MAP
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) if on_maps else tokens()


def features(network: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """What each slot's module returned during one forward."""
    seen: dict[str, list[Tensor]] = {point.slot: [] for point in network.injection_points()}
    for point in network.injection_points():
        module = network.get_submodule(point.module)
        module.register_forward_hook(lambda module, args, out, slot=point.slot: seen[slot].append(out))
    network(x)
    return seen


def test_cnn_slot_map() -> None:
    seen = features(cnn(), torch.randn(2, 1, 8, 8))
    shapes = {slot: [tuple(out.shape) for out in outs] for slot, outs in seen.items()}
    assert shapes == {"r0c0": [(2, 4, 8, 8)], "r0c1": [(2, 4, 4, 4)], "r1c0": [(2, 8, 4, 4)]}


def test_gpt_slot_map() -> None:
    seen = features(gpt(layers=3), tokens())
    assert {slot: [tuple(out.shape) for out in outs] for slot, outs in seen.items()} == {
        f"r{row}c0": [(3, 12, 16)] for row in range(3)
    }


@pytest.mark.parametrize("network", [cnn(widths=[4, 4, 6, 8], norm_groups=2), gpt(layers=11)], ids=["cnn", "gpt"])
def test_slots_are_canonical_row_major_and_of_the_right_topology(network: nn.Module) -> None:
    points = network.injection_points()
    slots = tuple(point.slot for point in points)
    assert slots == sort_slots(slots)
    seen = features(network, sample(network))
    for point in points:
        (out,) = seen[point.slot]
        assert out.ndim == point.topology.ndim


@pytest.mark.parametrize("network", [cnn(), gpt()], ids=["cnn", "gpt"])
def test_a_slot_feature_is_not_overwritten_after_its_module_returned(network: nn.Module) -> None:
    copies: dict[str, tuple[Tensor, Tensor]] = {}
    for point in network.injection_points():
        module = network.get_submodule(point.module)
        module.register_forward_hook(
            lambda module, args, out, slot=point.slot: copies.__setitem__(slot, (out, out.clone()))
        )
    network(sample(network))
    assert len(copies) == len(network.injection_points())
    for out, taken in copies.values():
        assert torch.equal(out, taken)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (2, 9, 13)])
def test_cnn_takes_any_resolution_and_keeps_channels_last(shape: tuple[int, int, int]) -> None:
    network = build_host(CNNConfig(widths=[4, 8, 16], norm_groups=2), shape, 7)
    x = torch.randn(2, *shape)
    y = network(x)
    assert y.shape == (2, 7)
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last)), y)
    (out,) = features(network, x.to(memory_format=torch.channels_last))["r1c0"]
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("network", [cnn(), gpt()], ids=["cnn", "gpt"])
def test_every_parameter_gets_a_gradient_and_there_are_no_buffers(network: nn.Module) -> None:
    network(sample(network)).square().mean().backward()
    for name, tensor in network.named_parameters():
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name
    assert not list(network.buffers()), "nothing that could drift between ranks"


@pytest.mark.parametrize("make", [cnn, gpt])
def test_initial_weights_follow_the_callers_seed(make: object) -> None:
    def built(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(make().parameters())

    assert all(torch.equal(a, b) for a, b in zip(built(1), built(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(built(1), built(2), strict=True))


def test_gpt_does_not_look_ahead() -> None:
    network, seen = gpt().double(), tokens()
    changed = seen.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
    before, after = network(seen), network(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=(0, 2)).min() > 0, "what follows does see it"


def test_gpt_takes_shorter_sequences_and_refuses_longer_ones() -> None:
    network = gpt()
    assert network(tokens(5)).shape == (3, 5, VOCABULARY)
    with pytest.raises(ValueError, match=r"13 tokens.*host\.block = 12"):
        network(tokens(13))


def test_gpt_initial_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    logits = gpt()(tokens())
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    assert abs(loss.item() - torch.tensor(VOCABULARY).log().item()) < 0.1


@pytest.mark.parametrize("tied", [True, False])
def test_gpt_head_is_tied_by_config_and_counted_once(tied: bool) -> None:
    network = gpt(tied=tied)
    counted = sum(tensor.numel() for tensor in network.parameters())
    layer = 2 * 2 * 16 + 3 * 16 * 16 + (16 * 16 + 16) + (4 * 16 * 16 + 64) + (4 * 16 * 16 + 16)
    assert counted == VOCABULARY * 16 * (1 if tied else 2) + 12 * 16 + 2 * layer + 2 * 16
    assert {"tokens.weight", "head.weight"} <= set(network.state_dict())
    twin = copy.deepcopy(network)
    assert (twin.head.weight is twin.tokens.weight) == tied


def test_unknown_kind_and_foreign_config_are_errors_that_say_what_there_is() -> None:
    assert host_config_class("cnn") is CNNConfig
    assert host_config_class("gpt") is GPTConfig
    with pytest.raises(ConfigError, match=r"'resnt'.*there are cnn, custom, gpt"):
        host_config_class("resnt")

    @dataclass
    class Foreign:
        kind: str = "cnn"

    with pytest.raises(ConfigError, match="takes CNNConfig, got Foreign"):
        build_host(Foreign(), (1, 8, 8), 10)


def test_registration_refuses_a_taken_kind_and_a_config_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="taken are cnn, custom, gpt"):
        host("cnn", config=CNNConfig)(HOSTS["cnn"].build)
    with pytest.raises(ConfigError, match=r"CNNConfig\.kind has the default 'cnn'"):
        host("mine", config=CNNConfig)(HOSTS["cnn"].build)
    assert set(HOSTS) == {"cnn", "custom", "gpt"}


@pytest.mark.parametrize(
    ("config", "settings", "named"),
    [
        (CNNConfig, {"widths": []}, "widths"),
        (CNNConfig, {"widths": [4, 6], "norm_groups": 4}, "norm_groups"),
        (CNNConfig, {"norm_groups": 0}, "norm_groups"),
        (CNNConfig, {"kind": "gpt"}, "kind"),
        (GPTConfig, {"dim": 30}, "heads"),
        (GPTConfig, {"layers": 0}, "layers"),
        (GPTConfig, {"kind": "cnn"}, "kind"),
    ],
)
def test_bad_settings_are_refused_by_name(config: type, settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        config(**settings)


@pytest.mark.parametrize(
    ("config", "shape", "said"),
    [
        (CNNConfig(), (64,), r"\(C, H, W\)"),
        (CNNConfig(widths=[2, 2, 2, 2, 2]), (1, 8, 8), "at least 16 pixels"),
        (GPTConfig(), (1, 8, 8), r"\(T,\)"),
        (GPTConfig(block=8), (9,), r"host\.block = 8.*9 tokens"),
    ],
)
def test_data_that_does_not_fit_is_refused(config: object, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_host(config, shape, 10)
