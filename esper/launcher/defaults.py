"""Stores the defaults of the config classes in Hydra, so that conf/ holds only what differs from them.

A file of a group names its class first, and Hydra lays the file's own values over the class's defaults:

    # conf/host/cnn.yaml
    defaults: [/CNNConfig@_here_, _self_]
    kind: cnn

``@_here_`` puts the class's settings where the file's own go. A setting without a default is ``???`` until the user
sets it. A file cannot take a default away, because ``???`` laid over a value changes nothing. For a setting that only
the user knows, such as a folder, a file names a node of `NEEDS` instead. Hydra sees plain values, never the classes;
`esper.config.tree` checks them and names every problem at once.
"""

from collections.abc import Iterable

from hydra.core.config_store import ConfigStore

from esper.config.strict import UNSET, defaults_of
from esper.config.tree import config_classes
from esper.tolaria.data import ImagesConfig
from esper.tolaria.training.distill_config import DistillConfig

NEEDS = ((ImagesConfig, "root"), (DistillConfig, "run"))  # class and setting: a node without that one's default


def store_classes(classes: Iterable[type]) -> None:
    """Makes the defaults of config classes known to Hydra, each under the name of its class."""
    for cls in classes:
        ConfigStore.instance().store(name=cls.__name__, node=defaults_of(cls), provider="esper")


def store_defaults() -> None:
    """Makes the defaults of every config class of a run known to Hydra, each under the name of its class."""
    store = ConfigStore.instance()
    store_classes(config_classes())
    for cls, name in NEEDS:
        store.store(name=f"{cls.__name__}_needs_{name}", node={**defaults_of(cls), name: UNSET}, provider="esper")
