"""One command for a machine with CUDA devices: the GPU-marked tests, then the benchmarks on its devices.

    python launch/bench.py gpu [--devices N] [--rounds R] [--out FOLDER] [--plan]

It takes every device that torch sees, unless ``--devices`` says fewer. FOLDER gets a log and, of a benchmark, a JSON
file for each part of the table in BENCHMARKS.md; the last lines say what passed. What fails does not keep the rest from
running; the exit code is then 1. ``--plan`` prints the commands and starts nothing. Without a CUDA device the command
refuses in a line.
"""

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

BENCHES = {
    "lockstep": ("step", "tick", "growth", "save", "share"),
    "kasmina": ("step", "layout", "library", "compiled"),
}
ROOT = Path(__file__).resolve().parents[2]
NO_DEVICE = "bench.py gpu: torch sees no CUDA device here; run it on a machine with one, or see its plan by --plan"


@dataclass(frozen=True, slots=True)
class Part:
    """A command, and the name of its log."""

    name: str
    command: list[str]


def plan_parts(devices: int, rounds: int, out: Path) -> list[Part]:
    """What is run on so many devices, in order.

    FlexAttention's backward against SDPA is among the tests (`tests/kasmina/blueprints/test_flex.py`).
    """
    parts = [Part("tests", [sys.executable, "-m", "pytest", "-m", "gpu", "-q", str(ROOT / "tests")])]
    for what, names in BENCHES.items():
        for name in names:  # each alone, so that one that fails costs no other
            where = ["--ranks", str(devices), "--rounds", str(rounds), "--device", "gpu"]
            told = ["--json", str(out / f"{what}-{name}.json")]
            command = [sys.executable, str(ROOT / "launch" / "bench.py"), what, "--parts", name, *where, *told]
            parts.append(Part(f"{what}-{name}", command))
    return parts


def main(argv: list[str]) -> int:
    """Runs the parts; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench.py gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, help="CUDA devices to use; all by default")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("gpu"))
    parser.add_argument("--plan", action="store_true", help="print the commands alone")
    args = parser.parse_args(argv)
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.plan:
        for part in plan_parts(args.devices or max(1, there), args.rounds, args.out):
            print(f"{part.name}: {' '.join(part.command)}")
        return 0
    if there == 0:
        print(NO_DEVICE, file=sys.stderr)
        return 78
    if not 1 <= (args.devices or there) <= there:
        print(f"bench.py gpu: --devices {args.devices}: torch sees {there} here", file=sys.stderr)
        return 78
    args.out.mkdir(parents=True, exist_ok=True)
    codes = {}
    for part in plan_parts(args.devices or there, args.rounds, args.out.absolute()):
        print(f"{part.name}: {' '.join(part.command)}", flush=True)
        with (args.out / f"{part.name}.log").open("w") as log:
            codes[part.name] = subprocess.run(part.command, cwd=ROOT, stdout=log, stderr=log, check=False).returncode
    for name, code in codes.items():
        print(f"{name}: {'passed' if code == 0 else f'failed, exit code {code}'}; see {args.out / f'{name}.log'}")
    return 1 if any(codes.values()) else 0
