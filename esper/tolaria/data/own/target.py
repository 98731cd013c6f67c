"""What the target of a sample is."""

from enum import StrEnum


class Target(StrEnum):
    """CLASS: one of some texts or whole numbers. NUMBER: one or several numbers. LABELS: columns of 0 and 1."""

    CLASS = "class"
    NUMBER = "number"
    LABELS = "labels"
