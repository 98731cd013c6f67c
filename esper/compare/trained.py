"""Settings of comparisons that begin with a trained host: how rates are searched, and at which marks arms are read."""

from dataclasses import dataclass, field
from typing import Any

from esper.config.strict import defaults_of
from esper.karn.marks import MarkClaim
from esper.leyline.fields import Checks


@dataclass(kw_only=True, slots=True)
class SearchConfig:
    """Every arm searches its own rate: the same values for each, on seeds that the comparison does not use."""

    key: str = "optim.lr"
    """The setting that is searched."""

    values: list[float]
    """Its values, rising, two or more: the trials of each arm."""

    seeds: list[int]
    """Seeds of the search, one or more, each once."""

    widen: int = 3
    """How often at most the values are widened by one more, for *all* arms, where the best of one lies at an edge."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            rising = all(0 < low < high for low, high in zip(self.values, self.values[1:]))
            check("values", len(self.values) >= 2 and rising, "two or more above 0, each larger than the one before")
            check("seeds", bool(self.seeds) and len(set(self.seeds)) == len(self.seeds), "one or more, each once")
            check("widen", 0 <= self.widen <= 10, "must be 0 to 10")


@dataclass(kw_only=True, slots=True)
class MarksConfig:
    """Where arms are read, in shares of the FLOPs that the runs of one arm have cost, seed by seed."""

    of: str
    """The arm whose FLOPs are 1: the trained host."""

    at: list[float]
    """The marks, rising."""

    main: float
    """The mark of the claims, and of the search."""

    apart: list[str] = field(default_factory=list)
    """Validation metrics that are shown beside the loss, such as loss_old and loss_new."""

    claims: dict[str, MarkClaim]
    """What is to be shown at the main mark, by name."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            rising = all(low < high for low, high in zip([0.0, *self.at], self.at))
            check("at", bool(self.at) and rising, "one or more above 0, each larger than the one before")
            check("main", self.main in self.at, "must be one of the marks")

    def arms(self) -> set[str]:
        """The arms that are named here."""
        return {self.of} | {arm for claim in self.claims.values() for arm in (claim.arm, claim.than)}


def fill_claims(plain: dict[str, Any]) -> None:
    """Writes what search, marks and claims leave out into the plain settings of a comparison, in place."""
    plain.setdefault("search", None)
    plain.setdefault("marks", None)
    for name in ("marks", "search"):
        if isinstance(plain.get(name), dict):
            plain[name] = {**defaults_of(MarksConfig if name == "marks" else SearchConfig), **plain[name]}
    claims = (plain.get("marks") or {}).get("claims")
    if isinstance(claims, dict):
        for name, claim in claims.items():
            if isinstance(claim, dict):
                claims[name] = {**defaults_of(MarkClaim), **claim}
