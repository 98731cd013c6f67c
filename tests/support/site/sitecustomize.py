"""Puts a fault plan in place in a rank that torchrun starts: this folder on PYTHONPATH, the plan in FAULT_PLAN.

The rank itself knows nothing of it: Python imports this module before the program.
"""

import os

if "FAULT_PLAN" in os.environ and "RANK" in os.environ:
    from tests.support.fault_plans import arm

    arm(int(os.environ["RANK"]))
