"""Trains a policy: python launch/policy.py train [env.name=recall agent.hidden=64 ...], resume RUN, evaluate RUN."""

import sys

try:
    import esper.launcher.early  # noqa: F401 - sets a handler before what follows takes seconds
    from esper.launcher.policy import main
except ModuleNotFoundError as error:
    sys.exit(f"esper: this Python has no {error.name}: source .venv/bin/activate, which bash launch/setup.sh makes")

if __name__ == "__main__":
    sys.exit(main())
