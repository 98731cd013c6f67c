"""What the modules around a site are called with that a seed cannot see in the feature: masks, and a cache.

The blocks of a causal language model of transformers take ``attention_mask`` and ``past_key_values``, torch's encoder
layers ``src_key_padding_mask``. The nearest module at or above a site that takes such an argument tells the slot of it
before it runs. A cache (`transformers.DynamicCache`) gets one more layer for each seed that attends, behind the host's
own: so whatever reorders, crops or copies the cache, as beam search does, does it for the seed too.
"""

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from esper.leyline.errors import ConfigError

CACHES = ("past_key_values", "past_key_value")
SEEING = ("attention_mask",)  # [B, K] or [B, 1, Q, K]: 1 or True may be seen; as floats added to scores, 0 may
HIDDEN_KEYS = ("src_key_padding_mask", "tgt_key_padding_mask", "key_padding_mask")  # torch's, [B, K]: True may not
HIDDEN_PAIRS = ("src_mask", "tgt_mask", "attn_mask")  # torch's, [Q, K]: True may not

LAYERS = "esper_layers"  # attribute of a cache: index of its layer by slot


class Argument(NamedTuple):
    """An argument of a module's forward: its name and its place among the positional ones."""

    name: str
    place: int

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Its value in a call; None where it is not given."""
        return kwargs[self.name] if self.name in kwargs else args[self.place] if self.place < len(args) else None


def find_teller(model: nn.Module, site: str) -> tuple[str, tuple[Argument, ...]] | None:
    """Name of the nearest module at or above a site that takes a mask or a cache, and those arguments."""
    parts = site.split(".") if site else []
    for depth in range(len(parts), -1, -1):
        name = ".".join(parts[:depth])
        module = model.get_submodule(name)
        own = type(module).__module__.partition(".")[0] == "torch"
        wanted = (*CACHES, *SEEING, *(HIDDEN_KEYS + HIDDEN_PAIRS if own else ()))
        try:
            known = list(inspect.signature(module.forward).parameters)
        except (TypeError, ValueError):
            continue
        arguments = tuple(Argument(word, place) for place, word in enumerate(known) if word in wanted)
        if arguments:
            return name, arguments
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What one call around a site said.

    Fields:
        masks: those given, by the argument's name.
        cache: the host's cache of keys and values; None without one.
    """

    masks: tuple[tuple[str, Tensor], ...] = ()
    cache: Any = None

    def visible(self, ones_QK: Tensor) -> Tensor | None:
        """bool, to broadcast over [B, 1, Q, K]: what the masks leave; None where none is of these positions."""
        four = [_four(name, mask, *ones_QK.shape) for name, mask in self.masks]
        fitting = [mask for mask in four if mask is not None]
        if not fitting:
            return None
        width = min(mask.shape[-1] for mask in fitting)
        together = fitting[0][..., -width:]
        for mask in fitting[1:]:
            together = together & mask[..., -width:]
        return together

    def rows(self, chosen: Tensor, samples: int) -> "Told":
        """For some samples of the batch alone."""
        picked = [(name, mask[chosen] if len(mask) == samples > 1 else mask) for name, mask in self.masks]
        return replace(self, masks=tuple(picked))


def _four(name: str, mask: Tensor, queries: int, keys: int) -> Tensor | None:
    """A mask as bool with four axes, True where a position may be seen; None if it is of other positions."""
    if name in HIDDEN_PAIRS:
        return (mask == 0)[None, None] if mask.shape == (queries, keys) else None
    if name in HIDDEN_KEYS:
        return (mask == 0)[:, None, None] if mask.ndim == 2 and mask.shape[1] == keys else None
    if mask.ndim == 2:
        return (mask != 0)[:, None, None] if mask.shape[1] == keys else None
    seen = mask if mask.dtype == torch.bool else mask == 0
    fits = mask.ndim == 4 and mask.shape[-2] in (1, queries) and mask.shape[-1] <= keys
    return seen[:, :1] if fits else None


def length_of(cache: Any) -> int | None:
    """How many positions a cache holds; None if it does not say."""
    try:
        return int(attending(cache).get_seq_length())
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return None


def attending(cache: Any) -> Any:
    """Of an encoder's and a decoder's cache the decoder's own."""
    return getattr(cache, "self_attention_cache", cache)


def layer_class(cache: Any) -> type[Any] | None:
    """The class of a layer that grows without end, of the library that a dynamic cache comes from; None for others."""
    dynamic = any(kind.__name__ == "DynamicCache" for kind in type(cache).__mro__)
    return getattr(sys.modules.get(type(cache).__module__), "DynamicLayer", None) if dynamic else None


class HostMemory:
    """Keys and values of a seed in a layer of its own in the host's cache.

    Args:
        cache: the host's, as its module was given it.
        slot: slot id.
        host_layers: number of the host's own layers.

    Raises:
        ConfigError: a seed cannot keep anything in such a cache.
    """

    def __init__(self, cache: Any, slot: str, host_layers: int) -> None:
        self.cache, self.slot = attending(cache), slot
        self._kind = layer_class(self.cache)
        lazy = getattr(self.cache, "layer_class_to_replicate", None)
        if self._kind is None or (lazy is not None and not host_layers):
            raise ConfigError(
                f"slot {slot}: its seed mixes positions and cannot keep what came before in a "
                f"{type(self.cache).__name__}; call with a transformers.DynamicCache or use_cache=False, or grow a "
                "blueprint that looks at one position at a time"
            )
        if lazy is not None:  # the host adds its layers one by one as they run: ours must stand behind them
            while len(self.cache.layers) < host_layers:
                self.cache.layers.append(lazy())

    def check(self, positions: int) -> None:
        """Checks that the seed has seen all that the host has, before the ``positions`` of this call.

        Raises:
            ConfigError: the host's cache holds positions that the seed has not seen.
        """
        index = vars(self.cache).get(LAYERS, {}).get(self.slot)
        own = 0 if index is None else self.cache.layers[index].get_seq_length()
        held = length_of(self.cache)
        if held not in (own, own + positions):  # the host may have added this call's already
            raise ConfigError(
                f"slot {self.slot}: the cache holds {held} positions, of which its seed has seen {own}; begin with an "
                "empty cache while the seed is at work and gradients are off, or call with use_cache=False"
            )

    def extend(self, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values of this call; returns all."""
        k, v = self.cache.layers[self.open_layer()].update(k_BHTD, v_BHTD)
        return k, v

    def open_layer(self) -> int:
        """Index of the seed's layer, which is added to the cache if it is not there yet."""
        layers = vars(self.cache).setdefault(LAYERS, {})
        if self.slot not in layers:
            layers[self.slot] = len(self.cache.layers)
            self.cache.layers.append(self._kind())  # type: ignore[misc]
        return int(layers[self.slot])
