"""Hosts, the networks that growth begins from: the registry, and the built-in hosts.

The settings of a host come without torch; the networks are imported when they are first asked for.
"""

from typing import TYPE_CHECKING

from esper.kasmina.hosts.configs import CNNConfig, CustomHostConfig, GPTConfig, HFConfig, ResNet20Config, StartConfig
from esper.kasmina.hosts.registry import HOSTS, Host, InjectionPoint, build_host, host, host_config_class
from esper.leyline.imports import export_later

if TYPE_CHECKING:
    from esper.kasmina.hosts.cnn import CNN
    from esper.kasmina.hosts.gpt import GPT
    from esper.kasmina.hosts.resnet import ResNet20
    from esper.kasmina.hosts.start import freeze

__all__ = [
    "CNN",
    "GPT",
    "HOSTS",
    "CNNConfig",
    "CustomHostConfig",
    "GPTConfig",
    "HFConfig",
    "Host",
    "InjectionPoint",
    "ResNet20",
    "ResNet20Config",
    "StartConfig",
    "build_host",
    "freeze",
    "host",
    "host_config_class",
]
__getattr__ = export_later(__name__, {"CNN": "cnn", "GPT": "gpt", "ResNet20": "resnet", "freeze": "start"})
