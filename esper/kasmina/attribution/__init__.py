"""What seeds are worth, alone and together: leave-one-out, solo, Shapley values."""

from esper.kasmina.attribution.coalitions import make_plan
from esper.kasmina.attribution.worth import attribute, blended, readings

__all__ = ["attribute", "blended", "make_plan", "readings"]
