"""Attribution: the worth of seeds, alone and together, as leave-one-out, solo and Shapley values."""

from esper.kasmina.attribution.coalitions import make_plan
from esper.kasmina.attribution.worth import attribute, blended, readings

__all__ = ["attribute", "blended", "make_plan", "readings"]
