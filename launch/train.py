"""Trains: python launch/train.py [host=cnn data=digits world.nproc_per_node=2 ...], see --help."""

import sys

try:
    import esper.launcher.early  # noqa: F401 - sets a handler before what follows takes seconds
    from esper.launcher.compose import main
except ModuleNotFoundError as error:
    sys.exit(f"esper: this Python has no {error.name}: source .venv/bin/activate, which bash launch/setup.sh makes")

if __name__ == "__main__":
    sys.exit(main())
