"""Judges whether the training of a policy is sick. It is told and goes on; a person or a script decides.

Judged are the numbers of all ranks, so every rank would say the same; rank 0 does. What an update has done (KL, ratio,
mismatch) is told at once. What creeps (entropies, values, heads) is told after ``patience`` updates in a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from esper.leyline.events import PolicySymptom
from esper.simic.ppo.config import AlarmConfig

_AT_ONCE = frozenset({PolicySymptom.KL, PolicySymptom.RATIO, PolicySymptom.MISMATCH})


@dataclass(frozen=True, slots=True)
class Alarm:
    """What is beyond which limit, and for how many updates in a row."""

    symptom: PolicySymptom
    head: str
    value: float
    limit: float
    updates: int


class Alarms:
    """Counts how long each number has been beyond its limit.

    Args:
        config: the limits.
    """

    def __init__(self, config: AlarmConfig) -> None:
        self._config = config
        self._counts: dict[str, int] = {}
        self._first_entropy: float | None = None

    def judge(self, numbers: dict[str, float]) -> list[Alarm]:
        """Takes in the numbers of an update; returns the alarms that are raised by it."""
        if self._first_entropy is None:
            self._first_entropy = numbers["losses/entropy"]
        alarms, beyond = [], set()
        for symptom, head, value, limit in self._beyond(numbers):
            key = f"{symptom}/{head}/{limit}"
            beyond.add(key)
            count = self._counts[key] = self._counts.get(key, 0) + 1
            if count == (1 if symptom in _AT_ONCE else self._config.patience):
                alarms.append(Alarm(symptom, head, value, limit, count))
        self._counts = {key: count for key, count in self._counts.items() if key in beyond}
        return alarms

    def _beyond(self, numbers: dict[str, float]) -> Iterator[tuple[PolicySymptom, str, float, float]]:
        """What is beyond its limit now: symptom, head, value, limit. A number that is NaN is beyond each."""
        limits, first = self._config, self._first_entropy or 0.0
        least: list[tuple[PolicySymptom, str, float, float | None]] = [
            (PolicySymptom.VALUE, "", numbers["losses/explained_variance"], limits.min_explained)
        ]
        if first > 0:
            least.append((PolicySymptom.ENTROPY, "", numbers["losses/entropy"] / first, limits.min_entropy))
        for name, value in numbers.items():
            if name.startswith("heads/") and name.endswith("/share"):
                head = name.split("/")[1]
                least.append((PolicySymptom.DEAD_HEAD, head, value, limits.min_head_share))
                if value > 0:
                    entropy = numbers[f"heads/{head}/entropy"]
                    least.append((PolicySymptom.HEAD_ENTROPY, head, entropy, limits.min_head_entropy))
        most = [
            (PolicySymptom.KL, "", numbers["losses/approx_kl"], limits.max_kl),
            (PolicySymptom.RATIO, "", numbers["losses/ratio_max"], limits.max_ratio),
            (PolicySymptom.MISMATCH, "", numbers["losses/mismatch"], limits.max_mismatch),
            (PolicySymptom.VALUE, "", numbers["losses/value_loss"], limits.max_value_loss),
        ]
        for symptom, head, value, limit in least:
            if limit is not None and not value >= limit:
                yield symptom, head, value, limit
        for symptom, head, value, limit in most:
            if limit is not None and not value <= limit:
                yield symptom, head, value, limit

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts and the entropy of the first update."""
        return {"counts": dict(self._counts), "first_entropy": self._first_entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back."""
        self._counts, self._first_entropy = dict(state["counts"]), state["first_entropy"]
