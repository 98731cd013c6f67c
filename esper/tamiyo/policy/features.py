"""All features, their meanings by version, and the choice of them that a network was trained on.

A checkpoint names each of its features with its version. A feature that came later is left out for it, a blueprint that
came later is one more entry; a feature whose meaning has changed is refused by name.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper.leyline.errors import ConfigError
from esper.leyline.observation import BlueprintInfo, Observation, SlotObservation
from esper.leyline.plain import digest62
from esper.tamiyo.policy import entry_features, run_features, slot_features
from esper.tamiyo.policy.columns import Feature, Table

FEATURES = 1
"""Version of the way in which features become arrays: their names, their flags for what is absent, their bounds."""

REMEDY = "train the policy again, or run it with the code that it was trained by"
KINDS = ("run", "slot", "entry")
TABLES: dict[str, Table] = {"run": run_features.RUN, "slot": slot_features.SLOT, "entry": entry_features.ENTRY}
LEFT_OUT = {"run": run_features.LEFT_OUT, "slot": slot_features.LEFT_OUT, "entry": entry_features.LEFT_OUT}
READ = {"run": Observation, "slot": SlotObservation, "entry": BlueprintInfo}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The features of each kind, in the order of their columns."""

    run: tuple[Feature, ...]
    slot: tuple[Feature, ...]
    entry: tuple[Feature, ...]

    def width(self, kind: str) -> int:
        """Columns of a kind: run, slot or entry."""
        return sum(len(feature.columns) for feature in getattr(self, kind))

    def columns(self, kind: str) -> tuple[str, ...]:
        """Names of the columns of a kind, as ``feature.column``."""
        return tuple(f"{one.name}.{column}" for one in getattr(self, kind) for column in one.columns)

    def plain(self) -> dict[str, Any]:
        """Returns the layout as plain data: versions by name, in order."""
        kinds = {kind: [[one.name, one.version] for one in getattr(self, kind)] for kind in KINDS}
        return {"version": FEATURES, **kinds}

    def digest(self) -> int:
        """A 62-bit digest of all meanings, as their versions and columns tell them."""
        return digest62([FEATURES, [[kind, self.columns(kind)] for kind in KINDS], self.plain()])


LAYOUT = Layout(**{kind: tuple(TABLES[kind].features.values()) for kind in KINDS})
"""Every feature there is."""


def read_layout(plain: Mapping[str, Any], where: str) -> Layout:
    """Returns the layout that a checkpoint was made with.

    Args:
        plain: from `Layout.plain`.
        where: what an error calls the checkpoint.

    Raises:
        ConfigError: features that this code does not have, or has with another meaning; one line names them all.
    """
    if plain["version"] != FEATURES:
        raise ConfigError(f"{where}: FEATURES version {plain['version']}, this code makes version {FEATURES}; {REMEDY}")
    chosen: dict[str, tuple[Feature, ...]] = {}
    wrong = []
    for kind in KINDS:
        known, found = TABLES[kind].features, []
        for name, version in plain[kind]:
            feature = known.get(name)
            if feature is None:
                wrong.append(f"{kind}.{name} (version {version}, none here)")
            elif feature.version != version:
                wrong.append(f"{kind}.{name} (version {version}, here {feature.version})")
            else:
                found.append(feature)
        chosen[kind] = tuple(found)
    if wrong:
        raise ConfigError(f"{where}: features of another meaning: {', '.join(wrong)}; {REMEDY}")
    return Layout(**chosen)


def unread(kind: str) -> set[str]:
    """Fields of the observation that no feature of a kind reads and none says why not."""
    fields = {field.name for field in dataclasses.fields(READ[kind])}
    read = {name for feature in TABLES[kind].features.values() for name in feature.reads}
    return fields - read - set(LEFT_OUT[kind])
