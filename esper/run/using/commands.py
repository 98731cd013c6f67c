"""The commands that use a trained network: their words on the command line, and what they print.

add_using(parsers)      adds them to the parser of ``esper``
USING[name](given)      runs one; returns its exit code
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from esper.leyline.files import write_whole

WIDE = 120  # columns where the output is no terminal


def add_using(parsers: Any) -> None:
    """Adds the commands to the subparsers of ``esper``."""
    evaluation = parsers.add_parser("eval", help="the metrics of a run's network on any part", allow_abbrev=False)
    evaluation.add_argument("--part", choices=("train", "validation", "probe", "test"), default="test", help="test")
    evaluation.add_argument("--data", metavar="data.KEY=VALUE", nargs="+", default=[], help="other settings")
    evaluation.add_argument("--json", metavar="FILE", type=Path, help="also write the numbers to this file")
    said = parsers.add_parser("predict", help="what a run's network says of new inputs", allow_abbrev=False)
    said.add_argument("--input", metavar="FILE", type=Path, required=True, help=".npy, .pt, .npz, .csv, a table")
    said.add_argument("--output", metavar="FILE", type=Path, required=True, help="a new file, .npz or .csv")
    begin = parsers.add_parser("init", help="write a package that trains at once", allow_abbrev=False)
    begin.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder, whose name is the package's")
    begin.add_argument("--task", choices=("classification", "regression", "segmentation"), default="classification")
    for parser in (evaluation, said):
        parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
        parser.add_argument("--at", metavar="STEP", type=int, help="checkpoint; the one that validation chose")
        parser.add_argument("--trust", action="store_true", help="run code that RUN names, although it is not yours")


def _evaluate(given: argparse.Namespace) -> int:
    from rich.console import Console

    from esper.run.using.evaluation import evaluate_run

    run = given.run.absolute()
    found = evaluate_run(run, at=given.at, part=given.part, settings=given.data, trusted=given.trust)
    if int(os.environ.get("RANK", "0")) == 0:
        if given.json is not None:
            write_whole(given.json, found.text() + "\n")
        console = Console(file=sys.stdout)
        console.width = max(console.width, WIDE)
        console.print(found.table())
    return 0


def _init(given: argparse.Namespace) -> int:
    from esper.run.using.starting import write_project

    print("\n".join(write_project(given.folder, given.task)), flush=True)
    return 0


def _predict(given: argparse.Namespace) -> int:
    from esper.run.using.prediction import predict_run

    print(predict_run(given.run.absolute(), given.input, given.output, at=given.at, trusted=given.trust), flush=True)
    return 0


USING: dict[str, Callable[[argparse.Namespace], int]] = {
    "eval": _evaluate,
    "predict": _predict,
    "init": _init,
}
