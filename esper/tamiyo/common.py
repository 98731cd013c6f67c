"""What controllers share: check that an observation is the right one, and spend budgets while proposing."""

import dataclasses
from typing import Any

from esper.leyline.errors import EsperError
from esper.leyline.observation import OBSERVATION_VERSION, BlueprintInfo, Observation


def check_observation(observation: Observation, slots: tuple[str, ...]) -> None:
    """Refuses an observation that this code would misread.

    Raises:
        EsperError: of another version, or of other slots than the controller was built for.
    """
    if observation.version != OBSERVATION_VERSION:
        raise EsperError(
            f"observation of version {observation.version}: controllers here read version {OBSERVATION_VERSION}; "
            "run engine and controllers from one release"
        )
    seen = tuple(view.slot for view in observation.slots)
    if seen != slots:
        raise EsperError(f"observation of slots {', '.join(seen)}: the controller was built for {', '.join(slots)}")


def after_birth(observation: Observation, info: BlueprintInfo) -> Observation:
    """The observation as it will be once a proposed germination was granted: its price is off the budgets.

    Two births proposed at one tick would otherwise spend the same budget twice.
    """

    def less(left: int | None, price: int) -> int | None:
        return None if left is None else left - price

    budgets = dataclasses.replace(
        observation.budgets,
        live=less(observation.budgets.live, 1),
        germinations=less(observation.budgets.germinations, 1),
        parameters=less(observation.budgets.parameters, info.parameters),
        flops=less(observation.budgets.flops, info.flops),
    )
    return dataclasses.replace(observation, budgets=budgets)


class Stateless:
    """State of a controller whose commands follow from settings and observation alone: none, strictly so."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the empty state back.

        Raises:
            ValueError: it holds anything; it was saved by another controller.
        """
        if state:
            raise ValueError(f"{type(self).__name__}: unknown {', '.join(sorted(map(str, state)))}; it has no state")
