"""Networks that growth begins from: the registry, and the built-in hosts it holds once this package is imported."""

from esper.kasmina.hosts.cnn import CNN, CNNConfig
from esper.kasmina.hosts.custom import CustomHostConfig
from esper.kasmina.hosts.gpt import GPT, GPTConfig
from esper.kasmina.hosts.registry import HOSTS, Host, InjectionPoint, build_host, host, host_config_class

__all__ = [
    "CNN",
    "GPT",
    "HOSTS",
    "CNNConfig",
    "CustomHostConfig",
    "GPTConfig",
    "Host",
    "InjectionPoint",
    "build_host",
    "host",
    "host_config_class",
]
