"""The controller that never grows anything: the control arm of every comparison."""

from dataclasses import dataclass

from esper.leyline.commands import Command
from esper.leyline.observation import Observation
from esper.tamiyo.common import Stateless, check_observation
from esper.tamiyo.registry import register


@dataclass(kw_only=True, slots=True)
class NoneConfig:
    """No settings."""

    kind: str = "none"
    """Registered name of this kind: ``none``."""


@register("none", NoneConfig)
class NoneController(Stateless):
    """Lets every slot wait for ever."""

    name = "none"

    def __init__(self, config: NoneConfig, *, slots: tuple[str, ...], seed: int) -> None:
        self._slots = slots

    def decide(self, observation: Observation) -> list[Command]:
        """Returns no commands."""
        check_observation(observation, self._slots)
        return []
