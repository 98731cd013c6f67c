"""Settings of the built-in hosts, and their places in the registry. Nothing here needs torch.

So the launcher can compose and read a run's settings without it; a builder is imported when it first builds.
"""

import re
from dataclasses import dataclass, field
from typing import Any

from esper.kasmina.hosts.registry import HOSTS, HostKind
from esper.leyline.fields import Checks
from esper.leyline.imports import call_later, is_dotted
from esper.leyline.slots import sort_slots
from esper.leyline.topology import topology_of

# Name in the config -> submodule of a block whose output is the feature; its index here is the slot's column.
SITES = {"block": "", "attention": ".project", "mlp": ".down"}


@dataclass(kw_only=True, slots=True)
class StartConfig:
    """Settings that hosts of every kind have."""

    weights: str | None = None
    """Weights to start from: a file of safetensors or of ``torch.save(state_dict)``, another RUN whose network has not
    grown, or a folder of ``save_pretrained``; every tensor must fit. null: random ones.
    """

    weights_step: int | None = None
    """Where ``weights`` is a RUN, the step of its checkpoint; null: the one that validation chose."""

    freeze: str = "none"
    """What of the host does not learn: ``none``, ``all``, or a regular expression for whole names of parameters, such
    as tokens.*; layers whose parameters are all frozen keep their running statistics, too.
    """

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("weights_step", self.weights_step is None or self.weights is not None, "needs host.weights=<a RUN>")
            try:
                re.compile(self.freeze)
            except re.error as error:
                check("freeze", False, f"no regular expression ({error}); or none, or all")


@dataclass(kw_only=True, slots=True)
class CNNConfig(StartConfig):
    """Shape of the convolutional host."""

    kind: str = "cnn"
    """Registered name of this kind: ``cnn``."""

    widths: list[int] = field(default_factory=lambda: [4, 8])
    """Channels of each stage, at least one stage."""

    norm_groups: int = 2
    """Groups of every GroupNorm; divides every width."""

    def __post_init__(self) -> None:
        StartConfig.__post_init__(self)
        with Checks(self) as check:
            check("kind", self.kind == "cnn", "this config is of kind 'cnn'")
            check("widths", bool(self.widths) and all(width >= 1 for width in self.widths), "one or more, each >= 1")
            groups = self.norm_groups
            check(
                "norm_groups",
                groups >= 1 and all(width % groups == 0 for width in self.widths),
                f"must be >= 1 and divide every width of {self.widths}",
            )


@dataclass(kw_only=True, slots=True)
class CustomHostConfig(StartConfig):
    """Where the function is, its keyword arguments, and where slots go."""

    kind: str = "custom"
    """Registered name of this kind: ``custom``."""

    path: str
    """``package.module:function``, importable on every rank; called with ``input_shape``, ``classes`` and the options.
    """

    options: dict[str, Any] | None = None
    """Further keyword arguments of the function, {width: 16}; null: none."""

    sites: dict[str, str]
    """Slot id -> dotted name of the submodule whose output is the feature there, {r0c0: layer2}."""

    layout: dict[str, str] | None = None
    """Slot id -> the axes of the feature there, a letter each, {r0c0: TBC}: BCHW, BHWC, BTC, TBC, BCT, BC or another
    order of these; of slots that are not named here they are found by varying an example. null: all are found.
    """

    may_skip: list[str] | None = None
    """Slot ids of sites that a forward in train() may leave out (layer drop, a branch), [r1c0]; in eval() they run.
    null: none.
    """

    def __post_init__(self) -> None:
        StartConfig.__post_init__(self)
        sort_slots(self.sites)
        for slot, layout in (self.layout or {}).items():
            topology_of(layout, f"layout.{slot}")
        with Checks(self) as check:
            unknown = sorted(set(self.layout or ()) - set(self.sites))
            check("layout", not unknown, f"{', '.join(unknown)} is no slot of host.sites")
            astray = sorted(set(self.may_skip or ()) - set(self.sites))
            check("may_skip", not astray, f"{', '.join(astray)} is no slot of host.sites")
            check("kind", self.kind == "custom", "must be 'custom'")
            check("path", is_dotted(self.path), "write package.module:function")
            check("sites", bool(self.sites), "name at least one, as {r0c0: module.name}")
            reserved = {"input_shape", "classes"} & set(self.options or ())
            check("options", not reserved, "input_shape and classes are given by the data; leave them out")


@dataclass(kw_only=True, slots=True)
class GPTConfig(StartConfig):
    """Shape of the GPT host."""

    kind: str = "gpt"
    """Registered name of this kind: ``gpt``."""

    layers: int = 2
    """Number of blocks."""

    heads: int = 4
    """Attention heads of each block; divides ``dim``."""

    dim: int = 64
    """Channels of the residual stream."""

    block: int = 64
    """Longest sequence, in tokens."""

    tied: bool = True
    """The head shares the token embedding's weight."""

    sites: list[str] = field(default_factory=lambda: ["block"])
    """Where each block has a slot: ``block`` (c0), ``attention`` (c1), ``mlp`` (c2); see `GPT`."""

    def __post_init__(self) -> None:
        StartConfig.__post_init__(self)
        with Checks(self) as check:
            check("kind", self.kind == "gpt", "this config is of kind 'gpt'")
            for name in ("layers", "dim", "block"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("heads", self.heads >= 1 and self.dim % self.heads == 0, f"must be >= 1 and divide dim = {self.dim}")
            sound = bool(self.sites) and set(self.sites) <= set(SITES) and len(set(self.sites)) == len(self.sites)
            check("sites", sound, f"one or more of {', '.join(SITES)}, each once")


@dataclass(kw_only=True, slots=True)
class ResNet20Config(StartConfig):
    """Shape of the residual host."""

    kind: str = "resnet20"
    """Registered name of this kind: ``resnet20``."""

    width: int = 16
    """Channels of the first stage; the next two have twice and four times as many. 16 in the paper; 4 is the
    quarter-width network.
    """

    def __post_init__(self) -> None:
        StartConfig.__post_init__(self)
        with Checks(self) as check:
            check("kind", self.kind == "resnet20", "this config is of kind 'resnet20'")
            check("width", self.width >= 1, "must be >= 1")


@dataclass(kw_only=True, slots=True)
class HFConfig(StartConfig):
    """A model of transformers; needs the extra ``hf``."""

    kind: str = "hf"
    """Registered name of this kind: ``hf``."""

    path: str
    """A folder with ``config.json``, a model type such as gpt2, or with ``hub`` a name on the hub."""

    hub: bool = False
    """Whether a ``path`` that is no folder is looked up on the hub, which needs a network."""

    options: dict[str, Any] | None = None
    """Settings of the model's own config, {n_layer: 2}; null: as they are."""

    sites: str | None = None
    """Regular expression for whole names of the modules that get a slot; null: the blocks, of a known family."""

    def __post_init__(self) -> None:
        StartConfig.__post_init__(self)
        with Checks(self) as check:
            check("kind", self.kind == "hf", "this config is of kind 'hf'")
            check("path", self.path.strip() != "", "a folder with config.json, or a model type such as gpt2")


HOSTS |= {
    "cnn": HostKind(CNNConfig, call_later("esper.kasmina.hosts.cnn:build_cnn")),
    "custom": HostKind(CustomHostConfig, call_later("esper.kasmina.hosts.custom:build_custom")),
    "gpt": HostKind(GPTConfig, call_later("esper.kasmina.hosts.gpt:build_gpt")),
    "hf": HostKind(HFConfig, call_later("esper.kasmina.hosts.hf:build_hf")),
    "resnet20": HostKind(ResNet20Config, call_later("esper.kasmina.hosts.resnet:build_resnet20")),
}
