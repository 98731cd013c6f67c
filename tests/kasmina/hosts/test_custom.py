"""A model of the user's own as a host: found, built, told where its slots are, refused with one line."""

import copy
import pickle

import pytest
import torch
from torch import nn

from esper.kasmina.attach import attach
from esper.kasmina.hosts import CustomHostConfig, build_host
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology

HERE = "tests.kasmina.hosts.test_custom"


def small(input_shape: tuple[int, ...], classes: int, width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(input_shape[0], width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


def not_a_module(input_shape: tuple[int, ...], classes: int) -> str:
    return "no"


def config(**changes: object) -> CustomHostConfig:
    return CustomHostConfig(**{"path": f"{HERE}:small", "sites": {"r1c0": "2", "r0c0": "0"}, **changes})  # type: ignore[arg-type]


def test_any_module_is_a_host_and_its_sites_are_slots_row_major() -> None:
    network = build_host(config(options={"width": 6}), (1, 8, 8), 10)
    assert [point.slot for point in network.injection_points()] == ["r0c0", "r1c0"]  # type: ignore[operator]
    grown = attach(network, {"r0c0": "0", "r1c0": "2"}, torch.zeros(2, 1, 8, 8))
    assert [(site.topology, site.dim) for site in grown.sites.values()] == [(Topology.FEATURE_MAP, 6)] * 2


def test_the_layout_of_a_slot_may_be_said() -> None:
    network = build_host(config(layout={"r1c0": "BHWC"}), (1, 8, 8), 10)
    points = network.injection_points()  # type: ignore[operator]
    assert [point.known_layout for point in points] == [None, "BHWC"]
    assert [point.topology for point in points] == [None, Topology.FEATURE_MAP]


def test_a_site_that_may_be_left_out_is_named() -> None:
    network = build_host(config(may_skip=["r1c0"]), (1, 8, 8), 10)
    assert [point.may_skip for point in network.injection_points()] == [False, True]  # type: ignore[operator]


def test_the_model_can_be_copied_and_pickled() -> None:
    network = build_host(config(), (1, 8, 8), 10)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert twin.injection_points() == network.injection_points()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"path": "small"}, "path = 'small': write package.module:function"),
        ({"path": f"{HERE}:large"}, "has no large; it has"),
        ({"path": "no_such_package:small"}, "cannot import no_such_package"),
        ({"path": f"{HERE}:not_a_module"}, "returned str, need an nn.Module"),
        ({"options": {"depth": 3}}, "does not take input_shape, classes and these"),
        ({"sites": {"r0c0": "9"}}, "host.sites.r0c0 = '9': the model has no such module; it has 0, 1, 2"),
        ({"sites": {"early": "0"}}, "slot 'early': not a slot id"),
        ({"sites": {}}, "name at least one"),
        ({"layout": {"r0c0": "BXHW"}}, "layout.r0c0 = 'BXHW': expected a letter for each axis"),
        ({"layout": {"r2c0": "BCHW"}}, "r2c0 is no slot of host.sites"),
        ({"may_skip": ["r2c0"]}, "may_skip = ['r2c0']: r2c0 is no slot of host.sites"),
    ],
)
def test_each_mistake_is_one_line(changes: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_host(config(**changes), (1, 8, 8), 10)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
