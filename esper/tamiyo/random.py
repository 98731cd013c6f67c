"""Seeded uniform choice over legal actions: the baseline that shows whether deciding matters at all.

Every draw is a hash of (seed, tick, slot, label of the draw), so there is no generator whose state could be lost: the
controller resumes anywhere, and no other random stream moves. Arguments are drawn so that the command is legal; the
gates judge evidence, and refuse commands without it.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from esper.leyline.alpha import Curve, check_alpha
from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks
from esper.leyline.legality import legal_ops, spent_budget, why_refused
from esper.leyline.observation import BlueprintInfo, Observation, SlotObservation
from esper.leyline.stages import Op, Stage
from esper.tamiyo.common import Stateless, charge_budgets, check_observation
from esper.tamiyo.registry import register

T = TypeVar("T")


@dataclass(kw_only=True, slots=True)
class RandomConfig:
    """How often and how far."""

    kind: str = "random"
    """Registered name of this kind: ``random``."""

    rate: float = 0.5
    """Probability that a slot draws at a tick, 0 to 1; WAIT is among what it draws from."""

    max_ticks: int = 4
    """Longest ramp in ticks; lengths are uniform from 0 to it."""

    targets: list[float] = field(default_factory=lambda: [0.5, 1.0])
    """Alphas that GERMINATE and SET_ALPHA_TARGET choose from, each in [0, 1]."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("kind", self.kind == "random", "must be 'random'")
            check("rate", 0 <= self.rate <= 1, "probability, must be 0 to 1")
            check("max_ticks", 0 <= self.max_ticks <= 10_000, "ticks, must be 0 to 10000")
            check("targets", bool(self.targets), "needs at least one alpha")
        for target in self.targets:
            try:
                check_alpha(target, "targets")
            except ValueError as error:
                raise ConfigError(str(error)) from None


class Draws:
    """Independent uniform draws for one (seed, tick, slot), one per label."""

    def __init__(self, seed: int, tick: int, slot: str) -> None:
        self._key = f"{seed}/{tick}/{slot}"

    def unit(self, label: str) -> float:
        """Returns a uniform number in [0, 1), of 53 bits."""
        word = hashlib.blake2b(f"{self._key}/{label}".encode(), digest_size=8).digest()
        return (int.from_bytes(word, "big") >> 11) * 2.0**-53

    def choice(self, label: str, options: Sequence[T]) -> T:
        """Returns one of ``options``, each with the same probability."""
        return options[int(self.unit(label) * len(options))]


@register("random", RandomConfig)
class RandomController(Stateless):
    """Draws one legal action per slot with probability ``rate`` at each tick; none while a seed of its is staged."""

    name = "random"

    def __init__(self, config: RandomConfig, *, slots: tuple[str, ...], seed: int) -> None:
        self._config = config
        self._slots = slots
        self._seed = seed

    def decide(self, observation: Observation) -> list[Command]:
        """Returns legal commands; a drawn WAIT is left out."""
        check_observation(observation, self._slots)
        commands = []
        for view in observation.slots:
            draws = Draws(self._seed, observation.tick, view.slot)
            if draws.unit("act") >= self._config.rate or view.staged:  # what was drawn is born, and then drawn for
                continue
            if view.stage is Stage.FOSSILIZED:  # only evidence takes a fossil out, and chance has none
                continue
            command = self._draw(observation, view, draws)
            if command.op is Op.WAIT:
                continue
            commands.append(command)
            for info in view.catalogue:
                if command.op is Op.GERMINATE and info.name == command.blueprint:
                    observation = charge_budgets(observation, info)
        return commands

    def _draw(self, observation: Observation, view: SlotObservation, draws: Draws) -> Command:
        possible = [info.name for info in view.catalogue if self._can_be_born(observation, view, info)]
        ops = [op for op in legal_ops(observation, view) if op is not Op.GERMINATE or possible]
        op = draws.choice("op", ops)
        command = Command(slot=view.slot, op=op, reason=f"drawn from {', '.join(option.name for option in ops)}")
        if op in (Op.GERMINATE, Op.SET_ALPHA_TARGET, Op.PRUNE):
            ticks, curve = draws.choice("ticks", range(self._config.max_ticks + 1)), draws.choice("curve", list(Curve))
            with_ramp = dataclasses.replace(command, ticks=ticks, curve=curve)
            if op is Op.PRUNE:  # where no ramp may run, prune at once
                return command if why_refused(observation, with_ramp) else with_ramp
            if op is Op.GERMINATE:
                with_ramp = dataclasses.replace(with_ramp, blueprint=draws.choice("blueprint", possible))
            target = float(draws.choice("target", self._config.targets))
            # a ramp of no tick is refused here and there, a target by some blueprints: then what is legal is drawn from
            longer = dataclasses.replace(with_ramp, ticks=max(1, ticks))
            for drawn, targets in ((with_ramp, [target]), (longer, [target]), (longer, self._config.targets)):
                if legal := self._legal(observation, view, drawn, targets):
                    return draws.choice("operator", legal)
            return dataclasses.replace(command, op=Op.WAIT)
        return command

    def _can_be_born(self, observation: Observation, view: SlotObservation, info: BlueprintInfo) -> bool:
        if spent_budget(observation.budgets, info) is not None:
            return False
        longest = Command(slot=view.slot, op=Op.GERMINATE, blueprint=info.name, ticks=self._config.max_ticks)
        return bool(self._legal(observation, view, longest, self._config.targets))

    def _legal(
        self, observation: Observation, view: SlotObservation, command: Command, targets: Sequence[float]
    ) -> list[Command]:
        """What is legal of a command, with each target and operator."""
        options = (
            dataclasses.replace(command, target=float(target), operator=operator)
            for target in targets
            for operator in view.operators
        )
        return [option for option in options if why_refused(observation, option) is None]
