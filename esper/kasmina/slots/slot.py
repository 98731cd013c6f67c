"""A slot: the place where a seed lives. It only computes, and knows nothing of ticks, ranks or telemetry.

Its `Phase` decides what it does in the host's forward (`esper.kasmina.slots.phases`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.axes.block import Call, OwnBlock
from esper.kasmina.axes.feature import put, take
from esper.kasmina.axes.site import Site
from esper.kasmina.precision import keeping_wide
from esper.kasmina.slots.beat import Beat
from esper.kasmina.slots.blend import HostOnly
from esper.kasmina.slots.gating import Heard, Tally
from esper.kasmina.slots.joint import Joint
from esper.kasmina.slots.phases import Phase
from esper.kasmina.slots.regions import Region
from esper.kasmina.slots.rows import Rows, rows_of
from esper.kasmina.slots.told import Told
from esper.kasmina.streams import undisturbed
from esper.leyline.alpha import Operator, check_alpha
from esper.leyline.channels import channels_path
from esper.leyline.errors import ConfigError


class SeedSlot(Joint):
    """Holds at most one seed and joins it to the host's features by the agreed alpha.

    Alpha, the fade and a CHANNEL's vector are float32 buffers: never persistent, never cast by ``.to(dtype)``. The slot
    stores no device; ``.to()``, ``.double()`` and ``deepcopy`` work mid-life. An empty slot has no state-dict key.

    Args:
        slot: slot id.
        site: the hooked module and the feature there, given by `attach`. A slot that is called by hand needs none.
        beat: the state that all slots of the model share, given by `attach`. A slot that is called by hand needs none.

    Attributes:
        seed: the module that computes the delta; None in an empty slot.
        gate: the gate module of GATE while it is in use, else None.
        phase: what the slot does in the host's forward.
        operator: how the delta is joined (see `esper.kasmina.slots.blend`).
        fades_from: the operator that is being faded out; None without a cross-fade.
        tally: g_eff of the training samples since it was last read.
        heard: the size of the feature in training forwards, while a seed is staged.
        region: the compiled `join`, None where nothing is compiled.
        hidden: whether the site ran without gradients in a forward that has them, as in a segment of the reentrant form
            of activation checkpointing; None before such a forward.
        told: masks and cache of the call under way, for a seed that mixes positions; None where there are none.
        called: arguments of the site's module in the call under way, for a seed that is a whole block.
        degraded: why the seed runs by a fallback that was taken at run time (a compile that failed), None while it runs
            as it was built. The code that takes the fallback sets it; the next tick reads it.
    """

    def __init__(self, slot: str, site: Site | None = None, beat: Beat | None = None) -> None:
        super().__init__()
        self.slot, self.site, self.beat = slot, site, beat
        self._dtypes: dict[torch.dtype | None, torch.dtype] = {}  # of the feature, by the dtype of autocast
        self.seed: nn.Module | None = None
        self.gate: nn.Module | None = None
        self.phase = Phase.OFF
        self.operator, self.fades_from = Operator.ADD, None  # type: Operator, Operator | None
        self.tally, self.heard = Tally(), Heard()
        self.region: Region | None = None
        self.degraded: str | None = None
        self.told: Told | None = None
        self.called: Call | None = None
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float32), persistent=False)
        self.register_buffer("fade", torch.ones((), dtype=torch.float32), persistent=False)
        self.register_buffer("channels", None, persistent=False)
        self._level, self._fade_level = 0.0, 1.0
        self._channels: tuple[float, ...] | None = None
        self._override: float | Rows | None = None
        self.hidden: bool | None = None

    @property
    def level(self) -> float:
        """The committed alpha as a Python number, by which forward selects its branch."""
        return self._level

    @property
    def fade_level(self) -> float:
        """The committed share of `operator` in a cross-fade; 1 without a cross-fade."""
        return self._fade_level

    def set_alpha(self, value: float, fade: float = 1.0) -> None:
        """Writes the agreed alpha and the share of `operator` in a cross-fade.

        Raises:
            ValueError: one of them is NaN or outside [0, 1].
        """
        self._level = check_alpha(value, f"alpha of {self.slot}")
        self._fade_level = check_alpha(fade, f"fade of {self.slot}")
        self.alpha.fill_(self._level)
        self.fade.fill_(self._fade_level)

    def set_channels(self, values: Sequence[float] | None) -> None:
        """Gives CHANNEL its vector v, one value in [0, 1] per channel of the site; None takes it away.

        Raises:
            ConfigError: the number of values is not the site's number of channels.
            ValueError: a value is NaN or outside [0, 1].
        """
        assert self.site is not None
        if values is not None and len(values) != self.site.dim:
            raise ConfigError(
                f"{channels_path(self.slot)}: {len(values)} values, the slot has C = {self.site.dim} channels; "
                "give one per channel"
            )
        self._channels = None if values is None else tuple(check_alpha(v, f"v of {self.slot}") for v in values)
        self._write_channels()

    def _write_channels(self) -> None:
        self.channels = None
        if self._channels is not None:
            assert self.site is not None
            v = torch.tensor(self._channels, dtype=torch.float32, device=self.alpha.device)
            self.channels = v.view(-1, *[1] * (self.site.topology.ndim - 1 - self.site.topology.channel_axis))

    @property
    def overridden(self) -> float | Rows | None:
        """The alpha (or alphas per sample) of the override in force; None without an override."""
        return self._override

    def override(self, value: float | Tensor | Rows | None) -> None:
        """Uses ``value`` instead of the committed alpha, whatever the phase; for evaluation. None ends the override.

        Args:
            value: in [0, 1], for all samples alike; or a tensor with one per sample (see `esper.kasmina.slots.rows`).

        Raises:
            ValueError: an alpha is NaN or outside [0, 1].
            ConfigError: the tensor has another shape.
        """
        if isinstance(value, Tensor):
            ndim = value.ndim if self.site is None else self.site.topology.ndim
            value = rows_of(value, ndim, self.slot)
        elif value is not None and not isinstance(value, Rows):
            value = check_alpha(value, f"alpha override of {self.slot}")
        self._override = value
        if value is None and self.beat is not None:
            self.beat.overrides.pop(self.slot, None)
        elif value is not None and self.beat is not None:
            self.beat.overrides[self.slot] = value

    @property
    def idle(self) -> bool:
        """Whether the feature would pass through unchanged, without a gradient for the seed."""
        if self.seed is None or (self._override is None and self.phase is Phase.OFF):
            return True
        if torch.is_grad_enabled():
            return False
        level = self._level if self._override is None else self._override
        if isinstance(level, Rows):
            return not len(level.chosen)
        return level == 0.0 or (self._override is None and self.phase is Phase.STRAIGHT)

    def plant(self, seed: nn.Module, region: Region | None = None) -> None:
        """Registers a seed, and the region that was compiled for it.

        Raises:
            ValueError: the slot already holds a seed.
        """
        if self.seed is not None:
            raise ValueError(f"slot {self.slot} already holds a seed")
        self.seed, self.region = seed, region
        if region is not None:
            region.owner = self
        self._dtypes.clear()
        self.set_alpha(0.0)
        self._note_change()

    def uproot(self) -> None:
        """Removes the seed and everything that belongs to it."""
        self.seed = self.gate = self.region = self.degraded = self.told = self.called = None
        self.phase, self.operator, self.fades_from, self.tally = Phase.OFF, Operator.ADD, None, Tally()
        self.set_alpha(0.0)
        self._note_change()

    @property
    def asks_logits(self) -> bool:
        """Whether a forward now needs class logits handed in."""
        if self.seed is None or Operator.CONFIDENCE not in (self.operator, self.fades_from):
            return False
        if isinstance(self._override, Rows):
            return len(self._override.chosen) > 0
        return self.phase is Phase.BLEND if self._override is None else self._override != 0.0

    def forward(self, host: Tensor, x: Tensor) -> Tensor:
        """Joins the delta of ``x`` to ``host``.

        Args:
            host: features at the site, their axes in the order of the topology.
            x: the seed's input, of the same shape.
        """
        if self.seed is None:
            return host
        if isinstance(self._override, Rows):
            return self._join_rows(host, x, self._override)
        if self._override is not None:
            return self._join_by_level(host, x, self._override, torch.full_like(self.alpha, self._override))
        if self.phase is Phase.OFF:
            return host
        if self.phase is Phase.STRAIGHT:
            if not torch.is_grad_enabled():
                return host
            with undisturbed(x):  # a seed's dropout must not move the host's
                return self._join_by_tensor(host, x, torch.ones_like(self.alpha), straight=True)
        return self._join_by_level(host, x, self._level, self.alpha)

    def _join_by_level(self, host: Tensor, x: Tensor, level: float, alpha: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # it guards every Python number that is read
            return self._join_by_tensor(host, x, alpha)
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if level == 0.0 and not learning:
            return host
        if self.region is not None and self.degraded is None:
            return self._join_by_tensor(host, x, alpha)
        if level != 0.0:
            return self._blend(host, x, level, alpha)
        # Parameters that learn stay in the gradient reduction at alpha 0: every rank must use them in every step.
        with undisturbed(x):  # what alpha 0 adds must not draw: a checkpointed segment may run first without it
            strength = self._strength(host, x.detach(), alpha)
            others = [self._delta(x.detach(), host), *([] if strength.gate is None else [strength.gate])]
        return HostOnly.apply(host, *others)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Forward hook of the site; a bound method, so that a deep copy of the model binds the copied slot.

        Raises:
            ConfigError: the site fires twice in one forward, or its feature is no longer what it was.
        """
        self.heard.hear(output, self.site, self.beat)
        if self.seed is None:
            return None
        if isinstance(self.seed, OwnBlock):
            self.called = Call(args, kwargs)
        if torch.compiler.is_compiling():
            return self._join_output(output)
        assert self.beat is not None
        again = self.beat.again
        if again is not None:
            return self._join_again(output, again)
        if self.beat.inside and self.beat.graded:
            self.hidden = not torch.is_grad_enabled()
        return self._join_output(output)

    def _join_output(self, output: Any) -> Any:
        """The module's output with the joined feature; None where it stays as it is."""
        if self.phase is Phase.OFF and self._override is None:
            return None
        assert self.site is not None
        feature = take(output, self.site.place)
        self._check(feature, output)
        x = self.site.turned(feature)
        if x is not feature and self.region is not None:  # as compiled: strides of a rehearsal
            x = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
        joined = self(x, x)
        self.called = None
        if self.told is not None and self.told.cache is not None:
            self.told = dataclasses.replace(self.told, cache=None)  # masks stay, for a forward that is run again
        return None if joined is x else put(output, self.site.place, self.site.turned_back(joined))

    def _check(self, feature: Any, output: Any) -> None:
        assert self.site is not None
        assert self.beat is not None
        site, beat = self.site, self.beat
        where = f"site {site.module!r} of slot {self.slot}"
        if beat.inside and beat.fired[self.slot]:
            raise ConfigError(f"{where} fired twice in one forward; a slot needs a module that runs once")
        beat.fired[self.slot] = beat.inside
        if not isinstance(feature, Tensor):
            raise ConfigError(f"{where} returned {type(output).__name__}; need the same kind of output as at attach")
        if feature.ndim != len(site.layout) or feature.shape[site.layout.index("C")] != site.dim:
            raise ConfigError(
                f"{where} returned {tuple(feature.shape)}, need {site.layout} with C = {site.dim} as at attach"
            )
        if torch.compiler.is_compiling():
            return  # a compiler guards the dtype by itself, and would compile again for every dtype noted here
        kind = feature.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        before = self._dtypes.setdefault(cast, feature.dtype)
        if before is not feature.dtype:
            raise ConfigError(f"{where} returned {feature.dtype}, before it was {before}; keep one dtype per run")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SeedSlot":
        super()._apply(keeping_wide(fn), recurse)
        self._dtypes.clear()
        if self.alpha.dtype != torch.float32:
            levels = torch.tensor([self._level, self._fade_level], dtype=torch.float32, device=self.alpha.device)
            self.alpha, self.fade = (level.clone() for level in levels)
            self._write_channels()
        return self
