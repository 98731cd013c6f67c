"""Features of one blueprint on offer in one slot: what it is and how it fared, never what it is called."""

from esper.leyline.legality import spent_budget
from esper.tamiyo.policy.columns import REACH, SIZE, Sight, Table, Values, count, kind_of

ENTRY = Table("entry")

LEFT_OUT = {
    "name": "a policy must serve blueprints that it never saw; `tried` alone goes by the name",
    "memory": "for a gate; the shipped policy was not taught it",
    "shadow": "for a gate, with memory",
    "folds_into": "for the masks: such a seed cannot be chosen",
}


@ENTRY.add("kind", (*SIZE, *REACH), reads=("parameters", "flops", "reach"))
def _kind(s: Sight) -> Values:
    """Its size beside the host, and what it mixes."""
    return kind_of(s.entry, s.run)


@ENTRY.add("affordable", ("now",), reads=("parameters", "flops"))
def _affordable(s: Sight) -> Values:
    """Whether the budgets allow it."""
    return (float(spent_budget(s.run.budgets, s.entry) is None),)


@ENTRY.add("tried", ("births", "failures", "elsewhere_alive", "elsewhere_kept", "elsewhere_failures"), reads=("name",))
def _tried(s: Sight) -> Values:
    """How often it lived here and is gone, in how many other slots it lives or is a fossil, how often it failed
    there."""
    name, here = s.entry.name, s.memory.slots[s.slot.slot]
    alive, kept, failed = s.tallies.get(name, (0, 0, 0))
    if here.living == name:
        alive, kept = alive - (not here.kept), kept - here.kept
    failures = here.failures.get(name, 0)
    return count(here.births.get(name, 0)), count(failures), count(alive), count(kept), count(failed - failures)
