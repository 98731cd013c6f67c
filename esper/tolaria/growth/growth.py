"""Makes the model follow the agreed state: staging, planting, uprooting, freezing, alpha, re-wrapping.

A birth takes two ticks. At the first the seed is *staged*: built, probed and counted beside the model, on every rank
alike, with nothing registered; with a library a thread does it beside training, and `settle` waits for it before the
second tick's commit. At the second tick, unless some rank vetoed, the seed is planted and its parameters are owned.
All else (phase, alpha, what learns) is read off the state by `follow`, so no second record can drift. A parameter is in
DDP's reducer exactly while it gets a gradient on every rank at every step. Whenever that set changes, the old wrapper
is dropped and a new one made without a broadcast.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from esper.accord.effects import Discard, Effect, Prepare, Register, Uproot, Veto
from esper.accord.lifecycle import SlotState, learns
from esper.accord.state import RunState, Terms
from esper.kasmina.births import Birth, Library, Order
from esper.kasmina.births.build import birth_key
from esper.kasmina.compiler import Compiler
from esper.kasmina.precision import seed_dtype
from esper.kasmina.slots.copies import grows_by_itself
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.regions import Region
from esper.leyline.alpha import Operator
from esper.leyline.legality import COPY
from esper.leyline.stages import Incubation, Stage
from esper.tolaria.growth import planting
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.growth.parameters import ParameterChecker
from esper.tolaria.growth.size import UNHEARD
from esper.tolaria.growth.staging import check_forward, check_weights, digest_newborn, veto_of
from esper.tolaria.growth.waiting import Waiting, await_births
from esper.tolaria.growth.wrapper import no_sync, wrap
from esper.tolaria.ranks.world import World


class Growth:
    """Owns the wrapper around the model and the seeds that wait beside it.

    Args:
        grown: the model.
        owner: owns its optimizer.
        world: the ranks.
        terms: of the run.
        run_seed: the run's seed, from which seeds' weights follow.
        dtype: number format of the host; seeds have that of `seed_dtype`.
        library: builds seeds beside training; None builds them here, when they are staged.
        compiler: compiles seeds; None if nothing is compiled.

    Fields:
        call: the model as training calls it (DDP, or the model itself when alone).
        parameters: checks that nothing is trained that may not be.
        staged: seeds that are ready, by slot.
        waiting: seeds that are being built, by slot.
        vetoes: this rank's vetoes of its staged seeds, which travel in the next commit.
        failures: by slot, why a staged seed failed here.
        newborns: by slot, the digest of what a seed that is ready computes; None if it does not equal itself.
        compiled: whether something was compiled since the last `perform`; the same on every rank.
    """

    def __init__(
        self,
        grown: Grown,
        owner: ParameterOwner,
        world: World,
        terms: Terms,
        *,
        run_seed: int,
        dtype: torch.dtype,
        library: Library | None = None,
        compiler: Compiler | None = None,
    ) -> None:
        self.grown, self.owner, self.world, self.terms = grown, owner, world, terms
        self.run_seed, self.library = run_seed, library
        self.host_dtype, self.dtype = dtype, seed_dtype(dtype)
        self.compiler, self.compiled = compiler, False
        self._regions: dict[str, Region] = {}  # of staged seeds
        self.waiting: dict[str, Waiting] = {}
        self.staged: dict[str, nn.Module] = {}
        self.vetoes: dict[str, Veto] = {}
        self.failures: dict[str, str] = {}
        self.newborns: dict[str, int | None] = {}
        self.call: Callable[..., Any] = grown.model
        self.parameters = ParameterChecker(grown, owner)
        grows_by_itself(grown.beat)
        grown.beat.find_unused = world.find_unused
        self._wrapped: tuple[str, ...] | None = None

    def perform(self, effects: Sequence[Effect]) -> None:
        """Executes a tick's effects in their order."""
        self.compiled = False
        for effect in effects:
            if isinstance(effect, Prepare):
                self._prepare(effect)
            elif isinstance(effect, Register):
                self.plant(effect.slot, self.staged.pop(effect.slot))
                planting.enter(self.grown, effect.slot, self.terms.slots_config, self.owner.optimizer)
                self.grown.slots[effect.slot].heard.listen(False)
                self.vetoes.pop(effect.slot, None)
                self.newborns.pop(effect.slot, None)
            elif isinstance(effect, Discard):
                self._discard(effect.slot)
            elif isinstance(effect, Uproot):
                self.owner.release(effect.slot)
                self.grown.slots[effect.slot].uproot()
                self.parameters.forget_learning()
                self._wrapped = None  # the wrapper also lists frozen parameters; only a new one lets go of the seed

    def clear(self) -> None:
        """Uproots every seed and discards every birth under way.

        The model is as before its first birth, except for the host's weights and moments; `follow` wraps it again.
        """
        self.call, self._wrapped = self.grown.model, None  # the reducer holds the seeds' parameters, too
        self.perform([Uproot(slot) for slot, holder in self.grown.slots.items() if holder.seed is not None])
        for slot in {*self.staged, *self.waiting, *self.vetoes}:
            self._discard(slot)
        self.failures.clear()
        self.owner.optimizer.zero_grad(set_to_none=True)

    def plant(self, slot: str, seed: nn.Module, operator: Operator | None = None) -> None:
        """Registers a built seed in the model and with the optimizer, frozen until its stage says that it learns."""
        region = self._regions.pop(slot, None)
        if region is None and self.compiler is not None:  # after a load
            region = self.compiler.stage(slot, seed, operator or Operator.ADD)
        self.grown.slots[slot].plant(seed, region)
        self.owner.register(slot)
        self.owner.set_learning(slot, False)

    def plant_record(self, state: RunState) -> None:
        """Plants a seed of the recorded blueprint in every slot that has one, and a gate where the record wants one."""
        for entry in state.slots:
            if entry.stage.has_seed:
                self.plant(entry.slot, self.build(entry.slot, str(entry.blueprint), entry.generation), entry.operator)
                if entry.wants_gate(state.step):
                    self.grown.slots[entry.slot].set_gate(self._gate(entry))
                    self.owner.register(entry.slot)

    def build(self, slot: str, blueprint: str, generation: int) -> nn.Module:
        """Builds the seed that every rank builds alike; see `planting.build`."""
        return planting.build(self.grown, slot, blueprint, generation, **self._build_options)

    def _gate(self, entry: SlotState) -> nn.Module:
        return planting.gate_for(self.grown.sites[entry.slot], entry, **self._build_options)

    @property
    def _build_options(self) -> dict[str, Any]:
        return {"run_seed": self.run_seed, "dtype": self.dtype, "device": self.world.device}

    def _prepare(self, effect: Prepare) -> None:
        """Builds and checks a seed, or orders it from the library; a failure becomes this rank's veto, no exception."""
        slot, blueprint = effect.slot, str(effect.command.blueprint)
        self.grown.slots[slot].heard.listen(True)
        site, key = self.grown.sites[slot], birth_key(self.run_seed, slot, effect.generation)
        weights = partial(check_weights, site=site, blueprint=blueprint)
        runs = partial(check_forward, site=site, blueprint=blueprint, dtype=self.dtype, device=self.world.device)
        self.compiled |= self.compiler is not None

        def forward(seed: nn.Module) -> None:
            runs(seed)
            self.newborns[slot] = digest_newborn(self.world, slot, seed, site, self.dtype)
            if self.compiler is not None:
                self._regions[slot] = self.compiler.stage(slot, seed, effect.command.operator)

        try:
            if self.library is None or blueprint == COPY:  # a copy is a function of the host, not of a key
                seed = self.build(slot, blueprint, effect.generation)
                weights(seed)
                forward(seed)
                self.staged[slot] = seed
                return
            birth = Birth.of(blueprint, dim=site.dim, topology=site.topology, dtype=self.dtype, key=key)
            order = Order(birth=birth, device=self.world.device, checks=(weights,))
            self.waiting[slot] = Waiting(self.library.begin(order), forward)
        except Exception as error:
            self._refuse(slot, error)

    def _refuse(self, slot: str, error: Exception) -> None:
        self.vetoes[slot], text = veto_of(error)
        if self.vetoes[slot] is not Veto.NOT_READY:  # that one may still come
            self.failures[slot] = text

    def settle(self, check: Callable[[str, nn.Module], None]) -> float:
        """Before a commit: waits for births under way, and checks every seed that is ready; a failure is a veto.

        Args:
            check: called with slot and seed; see `esper.tolaria.growth.size.BirthCheck`.

        Returns:
            Milliseconds waited for the library.
        """
        waited = 0.0
        if self.library is not None and self.waiting:
            waited, found = await_births(self.library, self.waiting)
            for slot, seed in found.items():
                if isinstance(seed, Exception):
                    self._refuse(slot, seed)
                else:
                    self.staged[slot] = seed
        for slot, seed in self.staged.items():
            self.vetoes.pop(slot, None)
            try:
                check(slot, seed)
            except Exception as error:
                self._refuse(slot, error)
        return waited

    def _discard(self, slot: str) -> None:
        """Discards a staged seed, or one that is still being built."""
        self.grown.slots[slot].heard.listen(False)
        self.staged.pop(slot, None)
        self._regions.pop(slot, None)
        if self.vetoes.pop(slot, None) is Veto.NOT_READY:
            self.failures[slot] = UNHEARD
        self.newborns.pop(slot, None)
        waiting = self.waiting.pop(slot, None)
        if waiting is not None and self.library is not None:
            self.library.cancel(waiting.ticket)
            self.failures[slot] = "it was still being built when it was given up; see library.wait_s"

    def close(self) -> None:
        """Cancels births under way; leaves no thread and no process behind."""
        parts: tuple[Library | Compiler | None, ...] = (self.library, self.compiler)
        for part in parts:
            if part is not None:
                part.close()

    def restage(self, state: RunState) -> None:
        """After a load, builds again the seeds that the state says are staged; their weights follow from the record."""
        for slot in state.slots:
            if slot.staged is not None:
                self._prepare(Prepare(slot.slot, slot.staged, slot.generation + 1))

    # following the state ------------------------------------------------------------------------------------------

    def set_alphas(self, state: RunState, step: int) -> None:
        """Writes every slot's agreed alpha for optimizer step ``step``."""
        for entry in [entry for entry in state.slots if entry.stage.has_seed]:
            holder, alpha, fade = self.grown.slots[entry.slot], entry.alpha(step), entry.fade(step)
            if (alpha, fade) != (holder.level, holder.fade_level):
                holder.set_alpha(alpha, fade)

    def shadowed_slots(self, state: RunState) -> list[str]:
        """Slots whose seed learns in a shadow forward of its own, row-major."""
        if self.terms.slots_config.incubation != Incubation.SHADOW:
            return []
        return [s.slot for s in state.slots if s.stage is Stage.TRAINING and self.grown.seed_parameters(s.slot) > 0]

    def seat(self, state: RunState) -> None:
        """Sets phases, operators, gates, alphas and what learns as the state says."""
        config = self.terms.slots_config
        for entry in planting.find_taken(self.grown, state):
            holder = self.grown.slots[entry.slot]
            planting.seat(holder, entry, state.step, config.incubation)
            if entry.wants_gate(state.step) != (holder.gate is not None):
                holder.set_gate(self._gate(entry) if holder.gate is None else None)
                self.owner.register(entry.slot)
            if entry.stage.has_seed:
                learning = learns(entry.stage, ending=entry.ending, train_fossils=config.train_fossils)
                self.owner.set_learning(entry.slot, learning)

    def follow(self, state: RunState, *, force: bool = False) -> float | None:
        """Does what `seat` does; re-wraps if the gradient set changed.

        Args:
            state: the agreed state.
            force: re-wrap in any case. A save is a re-wrap point, so that a resumed run sums in the same order.

        Returns:
            Milliseconds of the wrap; None if there was none.
        """
        self.seat(state)
        self.parameters.follow(state, train_fossils=self.terms.slots_config.train_fossils)
        if self.compiler is not None:
            self.compiled |= self.compiler.follow()
        wanted = self.owner.gradient_set()
        if wanted == self._wrapped and not force:
            return None
        self.parameters.check()
        began = time.perf_counter()
        self.call = self.grown.model  # the old reducer must be gone before a new one hooks the same parameters
        self.call = wrap(self.grown.model, self.world)
        self._wrapped = wanted
        self.parameters.note_learning()
        return 1e3 * (time.perf_counter() - began)

    def changed_by_hand(self) -> list[str]:
        """Names of parameters whose ``requires_grad`` is no longer as it was when the model was wrapped."""
        changed = self._wrapped is None or self.parameters.has_changed()
        return sorted(set(self.owner.gradient_set()) ^ set(self._wrapped or ())) if changed else []

    def no_sync(self) -> contextlib.AbstractContextManager[None]:
        """Within the block gradients accumulate on this rank only."""
        return no_sync(self.call)
