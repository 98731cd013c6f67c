"""Counts the tensor values that Python reads: each makes the CPU wait for the device."""

import pytest
from torch import Tensor

READS = ("tolist", "item", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero")


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the name of each such call from now on."""
    reads: list[str] = []
    for name in READS:
        plain = getattr(Tensor, name)

        def counted(*args, _name=name, _plain=plain, **kwargs):
            reads.append(_name)
            return _plain(*args, **kwargs)

        monkeypatch.setattr(Tensor, name, counted)
    return reads
