"""Nets of one shape, stepped together.

    commit    births that wait are judged, commands reduced, effects performed        (for each net, by its own record)
    train     steps until each net's own tick: one forward, one backward, one update for all that are not there yet;
              then the sums, absorbed into each net's record, the governor's verdict, and the report

Records, gates, looks, the FLOP account and observations are `esper.accord`'s own; a band supplies the sums and performs
the effects, in the order of `esper.tolaria.lockstep.tick`.
"""

import math
from collections.abc import Hashable, Sequence

from esper.accord.absorb import absorb
from esper.accord.effects import Discard, Effect, Prepare, Register, Uproot, Veto
from esper.accord.observation import make_report
from esper.accord.reducer import reduce_tick
from esper.accord.state import RunState
from esper.kasmina.slots.grown import HOST
from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError
from esper.simic.batched.data import Pool
from esper.simic.batched.measuring import Measuring
from esper.simic.batched.net import Net
from esper.simic.batched.network import Network, form_of
from esper.simic.batched.recipe import Recipe
from esper.simic.batched.stepping import Stepper
from esper.simic.batched.training import Training
from esper.simic.batched.weights import GATE, HOST_KEY, Weights


def shape_of(recipe: Recipe) -> Hashable:
    """What two trials must have in common to be stepped together: shapes, slots, number format, optimizer.

    Raises:
        ConfigError: such a host cannot be stepped with others.
    """
    grown = recipe.grown
    host = [(name, tuple(p.shape), p.dtype, p.device) for name, p in grown.owner_parameters()[HOST]]
    slots = [(slot, site.module) for slot, site in grown.sites.items()]
    return type(grown.model), form_of(grown.model).key, tuple(host), tuple(slots), recipe.rules


class Band:
    """Nets of one shape.

    Args:
        places: number of places that nets may have.
        recipe: of one of them.

    Fields:
        weights: of all nets.
    """

    def __init__(self, places: int, recipe: Recipe) -> None:
        weight = next(recipe.grown.model.parameters())
        self.weights = Weights(weight.dtype, weight.device)
        self.network = Network(recipe.grown, self.weights)
        self._pools = [Pool(places, weight.dtype, weight.device) for _ in range(3)]
        train, validation, probe = self._pools
        self.training = Training(self.network, self.weights, Stepper(self.weights, recipe.rules), train, places)
        self.measuring = Measuring(self.network, self.weights, self.training, validation=validation, probe=probe)

    def place(self, index: int, recipe: Recipe) -> Net:
        """Puts a net in a place, before its first step.

        Raises:
            ConfigError: a planted seed cannot be built.
        """
        self.weights.add(HOST_KEY, index, dict(recipe.grown.owner_parameters()[HOST]))
        for pool, part in zip(self._pools, (recipe.train, recipe.validation, recipe.probe), strict=True):
            pool.put(index, part)
        net = Net(index, recipe, RunState(slots=recipe.terms.first_slots()))
        for entry in net.state.slots:
            if entry.stage.has_seed:
                seed = recipe.births.build(entry.slot, str(entry.blueprint), entry.generation)
                if isinstance(seed, Veto):
                    raise ConfigError(f"slots.planted.{entry.slot}: {entry.blueprint} cannot be built ({seed.name})")
                self.weights.add((entry.slot, str(entry.blueprint)), index, dict(seed.named_parameters()))
        self.training.sums[index] = 0.0
        self.training.forget()
        return net

    def leave(self, index: int) -> None:
        """Removes the net of a place."""
        self.weights.clear(index)
        self.training.forget()

    def commit(self, nets: Sequence[Net], commands: Sequence[Sequence[Command]]) -> None:
        """Commits each net's commands, and changes it as its record then says."""
        self._settle_births(nets)
        for net, own in zip(nets, commands, strict=True):
            self._commit(net, own)
        self.training.forget()

    def _settle_births(self, nets: Sequence[Net]) -> None:
        """Gives seeds that wait their size and measures the loss around them; what speaks against one is a veto."""
        asked: list[tuple[Net, str]] = []
        for net in nets:
            for slot, seed in net.staged.items():
                net.vetoes.pop(slot, None)
                count, total = net.sums[f"{slot}.feature_count"], net.sums[f"{slot}.feature_sq"]
                if count == 0:
                    net.vetoes[slot] = Veto.NOT_READY
                    continue
                staged = net.state.slot(slot).staged
                assert staged is not None
                net.recipe.births.set_size(seed, staged.operator, math.sqrt(total / count))
                self.weights.add((slot, str(staged.blueprint)), net.place, dict(seed.named_parameters()))
                asked.append((net, slot))
        if not asked:
            return
        for (net, slot), sums in zip(asked, self.measuring.birth_sums(asked), strict=True):
            staged = net.state.slot(slot).staged
            assert staged is not None
            veto = net.recipe.births.judge(str(staged.blueprint), *sums)
            if veto is not Veto.NONE:
                net.vetoes[slot] = veto

    def _commit(self, net: Net, commands: Sequence[Command]) -> None:
        recipe = net.recipe
        assert net.report is not None
        proposed = recipe.propose(commands, net.report.observation, net.state)
        vetoes = {slot: (veto, 0) for slot, veto in net.vetoes.items()}
        before = {entry.slot: entry for entry in net.state.slots}
        outcome = reduce_tick(net.state, proposed, vetoes, recipe.terms, stage_ticks=recipe.stage_ticks)
        net.state = outcome.state
        for effect in outcome.effects:
            self._perform(net, effect, str(before[effect.slot].blueprint))
        for entry in net.state.slots:
            gate = (entry.slot, GATE)
            has = self.weights.has(gate, net.place)
            if entry.wants_gate(net.state.step) and not has:
                module = recipe.births.build_gate(net.state, entry.slot)
                self.weights.add(gate, net.place, dict(module.named_parameters()))
            elif has and not entry.wants_gate(net.state.step):
                self.weights.remove(gate, net.place)

    def _perform(self, net: Net, effect: Effect, blueprint: str) -> None:
        """Performs an effect.

        Args:
            net: whose it is.
            effect: what is to be done.
            blueprint: of the seed that was in the slot before this tick.
        """
        slot = effect.slot
        if isinstance(effect, Prepare):
            net.heard.pop(slot, None)
            seed = net.recipe.births.build(slot, str(effect.command.blueprint), effect.generation)
            if isinstance(seed, Veto):
                net.vetoes[slot] = seed
            else:
                net.staged[slot] = seed
        elif isinstance(effect, Register):
            del net.staged[slot]
            net.births += 1
        elif isinstance(effect, Discard):
            net.staged.pop(slot, None)
            net.vetoes.pop(slot, None)
            for key in [key for key in self.weights.blocks if key[0] == slot and self.weights.has(key, net.place)]:
                self.weights.remove(key, net.place)
        elif isinstance(effect, Uproot):
            net.prunes += 1
            net.gates.pop(slot, None)
            self.weights.remove((slot, blueprint), net.place)
            if self.weights.has((slot, GATE), net.place):
                self.weights.remove((slot, GATE), net.place)

    def train(self, nets: Sequence[Net]) -> None:
        """Trains these nets to their next ticks, and sets their reports."""
        self.weights.settle()
        for net in nets:
            net.window.reset()
        stepping = list(nets)
        while stepping:
            self.training.step(stepping)
            left = [net for net in stepping if not self._due(net)]
            if len(left) < len(stepping):
                self.training.forget()
            stepping = left
        if nets:
            self.measuring.measure(nets)
        for net in nets:
            self._observe(net)

    def _due(self, net: Net) -> bool:
        return net.recipe.due(net.state, net.step, net.window.known_row)

    def _observe(self, net: Net) -> None:
        recipe, since = net.recipe, net.state.step
        epoch = recipe.epoch(net.step - 1)
        state = absorb(net.state, net.sums, recipe.terms, step=net.step, epoch=epoch)
        net.state = recipe.judge(state, net.sums, since)
        net.report = make_report(
            net.state,
            recipe.terms,
            budget=recipe.budget,
            parameters=sum(parameter.numel() for _, parameter in recipe.grown.owner_parameters()[HOST]),
            max_consecutive=recipe.max_consecutive,
            births=net.births,
            prunes=net.prunes,
        )
