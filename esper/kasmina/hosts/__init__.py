"""Hosts, the networks that growth begins from: the registry, and the built-in hosts, which register on import."""

from esper.kasmina.hosts.cnn import CNN, CNNConfig
from esper.kasmina.hosts.custom import CustomHostConfig
from esper.kasmina.hosts.gpt import GPT, GPTConfig
from esper.kasmina.hosts.registry import HOSTS, Host, InjectionPoint, build_host, host, host_config_class
from esper.kasmina.hosts.resnet import ResNet20, ResNet20Config

__all__ = [
    "CNN",
    "GPT",
    "HOSTS",
    "CNNConfig",
    "CustomHostConfig",
    "GPTConfig",
    "Host",
    "InjectionPoint",
    "ResNet20",
    "ResNet20Config",
    "build_host",
    "host",
    "host_config_class",
]
