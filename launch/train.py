"""Trains: python launch/train.py [host=cnn data=digits world.nproc_per_node=2 ...], see --help."""

import sys

from esper.launcher import main

if __name__ == "__main__":
    sys.exit(main())
