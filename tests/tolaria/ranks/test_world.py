"""What a rank refuses before it joins the others."""

import socket

import pytest

from esper.leyline.errors import ConfigError
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World


def test_a_network_interface_that_is_not_there_is_named_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    here = [name for _, name in socket.if_nameindex()]
    name = "a-very-long-name-of-an-interface-that-gloo-would-cut-off-in-its-message"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", f"{here[0]},{name}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError) as caught:
        World(WorldConfig(), ControlConfig())
    assert str(caught.value) == (
        f"GLOO_SOCKET_IFNAME = '{here[0]},{name}': this host has no network interface {name}; it has "
        f"{', '.join(here)}; name one of these, or unset the variable"
    )
