"""Asks the controller, and turns its answer into one command per slot, each with a proposal id."""

from collections.abc import Sequence
from dataclasses import replace

from esper.leyline.commands import Command, wait
from esper.leyline.errors import ConfigError
from esper.leyline.observation import Observation
from esper.leyline.protocols import Controller


def propose(
    controller: Controller, observation: Observation, proposals: int, names: Sequence[str]
) -> dict[str, Command]:
    """Asks the controller and numbers its commands; slots that it leaves out wait.

    Whether a command is legal is not decided here: the reducer judges it, alike on every rank.

    Args:
        controller: of this run.
        observation: the agreed observation.
        proposals: proposal ids given so far.
        names: the agreed catalogue of blueprints.

    Raises:
        ConfigError: the controller named an unknown slot, one slot twice, or an unknown blueprint.
    """
    commands = {view.slot: wait(view.slot) for view in observation.slots}
    asked: set[str] = set()
    for command in controller.decide(observation):
        if command.slot not in commands or command.slot in asked:
            raise ConfigError(f"controller {controller.name}: slot {command.slot} unknown or twice")
        if command.blueprint is not None and command.blueprint not in names:
            raise ConfigError(f"controller {controller.name}: no blueprint {command.blueprint!r}")
        asked.add(command.slot)
        commands[command.slot] = replace(command, proposal=proposals + len(asked))
    return commands
