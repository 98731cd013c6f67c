"""Settings of a trained policy, and its place in the registry. Nothing here needs torch."""

from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.fields import Checks
from esper.leyline.imports import call_later
from esper.tamiyo.registry import register


class Mode(StrEnum):
    """How a policy chooses.

    GREEDY: the likeliest option of each head. SAMPLED: each option as often as its probability says.
    """

    GREEDY = "greedy"
    SAMPLED = "sampled"


@dataclass(kw_only=True, slots=True)
class PolicyConfig:
    """Which policy, and how it chooses."""

    kind: str = "policy"
    """Registered name of this kind: ``policy``."""

    checkpoint: str | None = None
    """File of a trained policy; it holds no code. null: the one that comes with this package."""

    mode: Mode = Mode.GREEDY
    """``greedy``: the likeliest option of each head; ``sampled``: drawn, as while it was trained, from the run's
    seed.
    """

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("kind", self.kind == "policy", "must be 'policy'")


register("policy", PolicyConfig)(call_later("esper.tamiyo.policy.controller:PolicyController"))
