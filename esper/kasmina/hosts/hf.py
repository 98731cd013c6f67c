"""A host of the library transformers: a causal language model, or an image classifier.

    kind: hf
    path: gpt2-small/                 # a folder with config.json, or the name of a model on the hub
    weights: gpt2-small/              # its weights; without it they are random
    options: {n_layer: 2}             # settings of its config instead of those in the file
    sites: transformer\\.h\\.\\d+       # whole names of modules; null: the blocks of a known family

Only ``config.json`` is read here, and nothing is downloaded unless ``path`` is no folder. ``path`` may be the name of a
model type instead (``gpt2``, ``llama``, ``vit``, ``resnet``) with ``hub: false``: its config's defaults then stand.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from esper.kasmina.hosts.configs import HFConfig
from esper.kasmina.hosts.registry import InjectionPoint
from esper.leyline.errors import ConfigError

# By model type of transformers: whole names of the modules that are blocks.
FAMILIES = {
    "gpt2": r"transformer\.h\.\d+",
    "llama": r"model\.layers\.\d+",
    "mistral": r"model\.layers\.\d+",
    "qwen2": r"model\.layers\.\d+",
    "qwen3": r"model\.layers\.\d+",
    "vit": r"vit\.(encoder\.)?layers?\.\d+",
    "resnet": r"resnet\.encoder\.stages\.\d+\.layers\.[1-9]\d*",
}


def load_transformers() -> Any:
    """Imports the library.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"host.kind = 'hf': {error}; install the extra hf (pip install 'esper[hf]')") from None
    return transformers


def read_hf_config(config: HFConfig, *, tokens: bool, classes: int) -> Any:
    """The model's own config, with the options and the classes of the data.

    Raises:
        ConfigError: it cannot be read, or does not take an option.
    """
    transformers, where = load_transformers(), f"host.path = {config.path!r}"
    options = dict(config.options or {})
    folder = Path(config.path).expanduser()
    if not tokens:
        options.setdefault("num_labels", classes)
    try:
        if folder.is_dir() or config.hub:
            own = transformers.AutoConfig.from_pretrained(str(folder) if folder.is_dir() else config.path, **options)
        else:
            own = transformers.AutoConfig.for_model(config.path, **options)
    except Exception as error:  # the library raises of many kinds
        advice = "name a folder with config.json, a model type such as gpt2, or set host.hub=true for a name on the hub"
        raise ConfigError(f"{where}: {' '.join(str(error).split())[:200]}; {advice}") from None
    plain = type(own)()  # the library takes any name for a setting
    unknown = sorted(name for name in config.options or {} if not hasattr(plain, name))
    if unknown:
        raise ConfigError(f"host.options: {', '.join(unknown)} is no setting of {type(own).__name__}")
    return own


class HFHost(nn.Module):
    """A model of transformers that takes a tensor and returns logits.

    Args:
        model: the model, a child of this module.
        tokens: whether it takes token ids [B, T], or else images [B, C, H, W].
        names: modules in it that get a slot, in their order.
    """

    def __init__(self, model: nn.Module, *, tokens: bool, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.tokens, self.names = model, tokens, names

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, T] int64 to logits [B, T, V], or [B, C, H, W] to [B, classes]."""
        if self.tokens:
            logits: Tensor = self.model(input_ids=x, use_cache=False).logits
        else:
            logits = self.model(pixel_values=x).logits
        return logits

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        """Returns the places for seeds: row by row, as the model has its blocks."""
        return tuple(
            InjectionPoint(slot=f"r{row}c0", module=f"model.{name}", topology=None)
            for row, name in enumerate(self.names)
        )


def find_names(model: nn.Module, pattern: str | None, family: str) -> tuple[str, ...]:
    """Names of the modules that get a slot.

    Raises:
        ConfigError: the family is not known, or the pattern matches nothing.
    """
    wanted = pattern or FAMILIES.get(family)
    if wanted is None:
        raise ConfigError(f"host.sites: no blocks are known of {family!r}; known are {', '.join(FAMILIES)}")
    known = [name for name, _ in model.named_modules() if name]
    names = tuple(name for name in known if re.fullmatch(wanted, name))
    if not names:
        raise ConfigError(f"host.sites = {wanted!r}: matches no module's whole name, such as {', '.join(known[:6])}")
    return names


def build_hf(config: HFConfig, *, input_shape: tuple[int, ...], classes: int) -> HFHost:
    """Builds the model with random weights.

    Raises:
        ConfigError: the library or the config is missing, or it does not take the data.
    """
    tokens = len(input_shape) == 1
    if not tokens and len(input_shape) != 3:
        raise ConfigError(f"host.kind = 'hf': takes sequences (T,) or images (C, H, W), the data has {input_shape}")
    transformers, own = load_transformers(), read_hf_config(config, tokens=tokens, classes=classes)
    maker = transformers.AutoModelForCausalLM if tokens else transformers.AutoModelForImageClassification
    try:
        model = maker.from_config(own)
    except ValueError as error:
        raise ConfigError(f"host.path = {config.path!r}: {' '.join(str(error).split())[:200]}") from None
    return HFHost(model, tokens=tokens, names=find_names(model, config.sites, str(own.model_type)))
