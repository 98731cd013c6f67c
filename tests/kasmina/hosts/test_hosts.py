"""Built-in hosts: registry, shapes, slot maps that tell the truth, and what each refuses."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.births.build import build_seed
from esper.kasmina.hosts import HOSTS, CNNConfig, GPTConfig, ResNet20Config, build_host, host, host_config_class
from esper.leyline.errors import ConfigError
from esper.leyline.slots import sort_slots
from esper.leyline.topology import Topology

VOCABULARY = 31


def cnn(side: int = 8, **settings: object) -> nn.Module:
    return build_host(CNNConfig(**settings), (1, side, side), 10)


def gpt(**settings: object) -> nn.Module:
    return build_host(GPTConfig(dim=16, block=12, **settings), (12,), VOCABULARY)


def resnet(width: int = 4, side: int = 8) -> nn.Module:
    return build_host(ResNet20Config(width=width), (1, side, side), 10)


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


def test_resnet_slot_map() -> None:
    seen = features(resnet(side=9), torch.randn(2, 1, 9, 9))
    shapes = {slot: [tuple(out.shape) for out in outs] for slot, outs in seen.items()}
    assert shapes == {"r0c0": [(2, 4, 9, 9)], "r1c0": [(2, 8, 5, 5)], "r2c0": [(2, 16, 3, 3)]}


def test_gpt_slot_map() -> None:
    seen = features(gpt(layers=3), tokens())
    assert {slot: [tuple(out.shape) for out in outs] for slot, outs in seen.items()} == {
        f"r{row}c0": [(3, 12, 16)] for row in range(3)
    }


def test_gpt_sites_are_opt_in_and_lie_where_the_slot_map_says() -> None:
    network = gpt(layers=2, sites=["mlp", "block", "attention"])
    names = [point.slot for point in network.injection_points()]
    assert names == ["r0c0", "r0c1", "r0c2", "r1c0", "r1c1", "r1c2"]
    assert network.state_dict().keys() == gpt(layers=2).state_dict().keys()
    entered: list[Tensor] = []
    network.blocks[1].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    seen = {slot: outs[0] for slot, outs in features(network, tokens()).items()}
    assert {tuple(out.shape) for out in seen.values()} == {(3, 12, 16)}
    torch.testing.assert_close(entered[0], seen["r0c0"])
    torch.testing.assert_close(entered[0] + seen["r1c1"] + seen["r1c2"], seen["r1c0"])
    assert [point.slot for point in gpt(layers=2, sites=["mlp"]).injection_points()] == ["r0c2", "r1c2"]


@pytest.mark.parametrize("site", ["block", "attention", "mlp"])
def test_a_seed_at_any_gpt_site_moves_the_logits_and_lives(site: str) -> None:
    network = gpt(layers=2, sites=[site])
    (first, _) = (point.module for point in network.injection_points())
    seed = build_seed("lora", dim=16, topology=Topology.SEQUENCE, key=0, dtype=torch.float32, device="cpu")
    before = network(tokens())
    network.get_submodule(first).register_forward_hook(lambda module, args, out: out + seed(out.detach()))
    after = network(tokens())
    assert not torch.equal(before, after)
    after.square().mean().backward()
    for name, tensor in [*seed.named_parameters(), *network.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "network",
    [cnn(widths=[4, 4, 6, 8], norm_groups=2), resnet(), gpt(layers=11), gpt(layers=11, sites=["attention", "mlp"])],
    ids=["cnn", "resnet", "gpt", "gpt inside"],
)
def test_slots_are_canonical_row_major_and_of_the_right_topology(network: nn.Module) -> None:
    points = network.injection_points()
    slots = tuple(point.slot for point in points)
    assert slots == sort_slots(slots)
    seen = features(network, sample(network))
    for point in points:
        (out,) = seen[point.slot]
        assert out.ndim == point.topology.ndim


@pytest.mark.parametrize(
    "network", [cnn(), resnet(), gpt(sites=["block", "attention", "mlp"])], ids=["cnn", "resnet", "gpt"]
)
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


def test_resnet_of_the_paper_has_its_size_and_takes_channels_last() -> None:
    network = build_host(ResNet20Config(), (3, 32, 32), 10).eval()
    assert sum(tensor.numel() for tensor in network.parameters()) == 269_722, "0.27 M in table 6 of the paper"
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20
    x = torch.randn(2, 3, 32, 32)
    y, lasting = network(x), x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(lasting), y, rtol=1e-4, atol=1e-4)
    assert all(outs[0].is_contiguous(memory_format=torch.channels_last) for outs in features(network, lasting).values())


def test_resnet_shortcuts_have_no_parameters_and_pass_what_they_skip_to() -> None:
    network = resnet().eval()
    for stage in network.stages:
        for block in stage:
            nn.init.zeros_(block.norm2.weight)  # only shortcuts are left
    seen = {slot: outs[0] for slot, outs in features(network, torch.randn(2, 1, 9, 9)).items()}
    assert seen["r0c0"].abs().max() > 0
    halved = nn.functional.pad(seen["r0c0"][:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    assert torch.equal(seen["r1c0"], halved)


def test_resnet_learns_one_batch_and_its_gradients_are_live() -> None:
    torch.manual_seed(0)
    network, x, y = resnet(), torch.randn(20, 1, 8, 8), torch.arange(20) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(x), y)
        loss.backward()
        losses.append(loss.item())
        for name, tensor in network.named_parameters():
            assert tensor.grad is not None, name
            assert tensor.grad.abs().max() > 0, name
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0], losses


def test_resnet_takes_one_sample_of_the_smallest_size_in_training() -> None:
    assert build_host(ResNet20Config(width=1), (2, 5, 5), 3)(torch.randn(1, 2, 5, 5)).isfinite().all()


@pytest.mark.parametrize("network", [cnn(), gpt()], ids=["cnn", "gpt"])
def test_every_parameter_gets_a_gradient_and_there_are_no_buffers(network: nn.Module) -> None:
    network(sample(network)).square().mean().backward()
    for name, tensor in network.named_parameters():
        assert tensor.grad is not None, name
        assert tensor.grad.abs().max() > 0, name
    assert not list(network.buffers()), "nothing that could drift between ranks"


@pytest.mark.parametrize("make", [cnn, resnet, gpt])
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
    with pytest.raises(ConfigError, match=r"'resnt'.*there are cnn, custom, gpt, hf, resnet20"):
        host_config_class("resnt")

    @dataclass
    class Foreign:
        kind: str = "cnn"

    with pytest.raises(ConfigError, match="takes CNNConfig, got Foreign"):
        build_host(Foreign(), (1, 8, 8), 10)


def test_registration_refuses_a_taken_kind_and_a_config_of_another_kind() -> None:
    with pytest.raises(ConfigError, match="taken are cnn, custom, gpt, "):
        host("cnn", config=CNNConfig)(HOSTS["cnn"].build)
    with pytest.raises(ConfigError, match=r"CNNConfig\.kind has the default 'cnn'"):
        host("mine", config=CNNConfig)(HOSTS["cnn"].build)
    assert HOSTS["cnn"].config is CNNConfig
    assert "mine" not in HOSTS


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
        (GPTConfig, {"sites": []}, "sites"),
        (GPTConfig, {"sites": ["block", "block"]}, "sites"),
        (GPTConfig, {"sites": ["heads"]}, r"sites = \['heads'\]: one or more of block, attention, mlp"),
        (ResNet20Config, {"width": 0}, "width"),
        (ResNet20Config, {"kind": "cnn"}, "kind"),
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
        (ResNet20Config(), (64,), r"\(C, H, W\)"),
        (ResNet20Config(), (3, 32, 4), "at least 5 pixels a side, the data has 32x4"),
        (GPTConfig(), (1, 8, 8), r"\(T,\)"),
        (GPTConfig(block=8), (9,), r"host\.block = 8.*9 tokens"),
    ],
)
def test_data_that_does_not_fit_is_refused(config: object, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_host(config, shape, 10)
