"""Helpers that controllers share: checking an observation, charging budgets while proposing, having no state."""

import dataclasses
from typing import Any

from esper.leyline.errors import EsperError
from esper.leyline.observation import OBSERVATION_VERSION, BlueprintInfo, Observation


def check_observation(observation: Observation, slots: tuple[str, ...]) -> None:
    """Refuses an observation that this code would misread.

    Raises:
        EsperError: the observation has another version, or other slots than the controller was built for.
    """
    if observation.version != OBSERVATION_VERSION:
        raise EsperError(
            f"observation of version {observation.version}: controllers here read version {OBSERVATION_VERSION}; "
            "run engine and controllers from one release"
        )
    seen = tuple(view.slot for view in observation.slots)
    if seen != slots:
        raise EsperError(f"observation of slots {', '.join(seen)}: the controller was built for {', '.join(slots)}")


def charge_budgets(observation: Observation, info: BlueprintInfo) -> Observation:
    """Returns the observation with the cost of a proposed germination taken off the budgets.

    Otherwise two births proposed at one tick would spend the same budget twice.
    """

    def subtract(left: int | None, cost: int) -> int | None:
        return None if left is None else left - cost

    budgets = dataclasses.replace(
        observation.budgets,
        live=subtract(observation.budgets.live, 1),
        germinations=subtract(observation.budgets.germinations, 1),
        parameters=subtract(observation.budgets.parameters, info.parameters),
        flops=subtract(observation.budgets.flops, info.flops),
        memory=subtract(observation.budgets.memory, info.memory or 0),
    )
    return dataclasses.replace(observation, budgets=budgets)


class Stateless:
    """Base of a controller without state: its commands follow from settings and observation alone."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Accepts the empty state.

        Raises:
            ValueError: the state is not empty, so another controller saved it.
        """
        if state:
            raise ValueError(f"{type(self).__name__}: unknown {', '.join(sorted(map(str, state)))}; it has no state")
