"""Hosts, the networks that growth begins from: the registry, and the built-in hosts, which register on import."""

from esper.kasmina.hosts.cnn import CNN, CNNConfig
from esper.kasmina.hosts.custom import CustomHostConfig
from esper.kasmina.hosts.gpt import GPT, GPTConfig
from esper.kasmina.hosts.hf import HFConfig
from esper.kasmina.hosts.registry import HOSTS, Host, InjectionPoint, build_host, host, host_config_class
from esper.kasmina.hosts.resnet import ResNet20, ResNet20Config
from esper.kasmina.hosts.start import StartConfig, freeze

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
