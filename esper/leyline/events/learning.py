"""Events of the training of a policy. Their axes: ``step`` counts the policy's optimizer steps, ``tick`` the steps of
each of its environments, ``epoch`` its updates.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from esper.leyline.events.base import Event


class PolicySymptom(StrEnum):
    """How the training of a policy is sick.

    ENTROPY: it hardly chooses any more. HEAD_ENTROPY: one head always picks the same. DEAD_HEAD: a head matters in
    hardly any decision. KL, RATIO: an update went too far from the policy that acted. MISMATCH: before its first step
    an update did not find the probabilities that acting had noted. VALUE: values say nothing of the returns.
    """

    ENTROPY = "entropy"
    HEAD_ENTROPY = "head_entropy"
    DEAD_HEAD = "dead_head"
    KL = "kl"
    RATIO = "ratio"
    MISMATCH = "mismatch"
    VALUE = "value"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyUpdated(Event):
    """A policy learned from one rollout of all ranks."""

    kind: ClassVar[str] = "policy_update"
    level: ClassVar[str] = "full"
    numbers: dict[str, float]
    """Everything measured, by the names that docs/policy.md explains."""

    collect_ms: float
    """Milliseconds that rank 0's environments and decisions took."""

    update_ms: float
    """Milliseconds that learning took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyAlarm(Event):
    """The training of a policy is sick; it goes on."""

    kind: ClassVar[str] = "policy_alarm"
    priority: ClassVar[bool] = True
    symptom: PolicySymptom
    """How."""

    head: str
    """The head that it is about; empty: all."""

    value: float
    """What was measured."""

    limit: float
    """The limit that it is beyond."""

    updates: int
    """Updates in a row for which it has been."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySaved(Event):
    """All ranks wrote a checkpoint of the training of a policy."""

    kind: ClassVar[str] = "policy_saved"
    path: str
    """Its folder, relative to the run directory."""
