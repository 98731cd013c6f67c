"""Trains: python launch/train.py [host=cnn data=digits world.nproc_per_node=2 ...], see --help."""

import importlib.util
import sys

try:
    import esper.launcher.early  # noqa: F401 - sets a handler before what follows takes seconds

    if importlib.util.find_spec("torch") is None:  # this process goes without, but those that it starts do not
        raise ModuleNotFoundError(name="torch")
    from esper.launcher.ahead.process import Ahead, is_plain_run

    ahead = Ahead()
    if __name__ == "__main__" and is_plain_run(sys.argv[1:]):
        ahead.start()  # before the next import, which takes its time, too
    from esper.launcher.compose import main
except ModuleNotFoundError as error:
    sys.exit(f"esper: this Python has no {error.name}: source .venv/bin/activate, which bash launch/setup.sh makes")

if __name__ == "__main__":
    sys.exit(main(ahead=ahead))
