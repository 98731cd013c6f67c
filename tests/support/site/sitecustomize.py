"""Puts a fault plan in place in a rank that torchrun starts: this folder on PYTHONPATH, the plan in FAULT_PLAN.

The rank itself knows nothing of it: Python imports this module before the program, and in a rank that is forked what
runs the program is wrapped.
"""

import os
import runpy
from typing import Any

_run = runpy.run_module


def _arm() -> None:
    from tests.support.fault_plans import arm

    arm(int(os.environ["RANK"]))


def _run_armed(*args: Any, **kwargs: Any) -> Any:
    if "RANK" in os.environ:
        _arm()
    return _run(*args, **kwargs)


if "FAULT_PLAN" in os.environ and "RANK" in os.environ:
    _arm()
elif "FAULT_PLAN" in os.environ:
    runpy.run_module = _run_armed
