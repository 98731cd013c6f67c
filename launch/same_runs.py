"""Proves a refactor: the same runs, made by an earlier commit and by the present code, end with the same bits.

    python launch/same_runs.py REV [--out FOLDER]     # REV: the earlier commit; two minutes on two cores

Three runs on two ranks, each with several births and at least one prune: the digits on a CNN by the heuristic, bytes on
a GPT by a schedule, and a session in a user's loop. The code of REV is checked out into a temporary folder, both make
the runs, and then the present code resumes each old run from a checkpoint in its middle.

These must be equal: ``result.json`` except for the digest of the sources, ``events.jsonl``, read whole, except for
schema, times and ids, and every tensor and value of the last checkpoint. Exit code 0 if they are, 1 with a
line for each difference.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esper.nissa.envelope import whole

ROOT = Path(__file__).resolve().parents[1]
LOOP = Path(__file__).resolve().parent / "same" / "loop.py"
SCHEDULE = (
    "{tick: 1, slot: r0c0, op: GERMINATE, blueprint: mlp_small, ticks: 2}, "
    "{tick: 1, slot: r1c0, op: GERMINATE, blueprint: lora, ticks: 1, operator: GATE}, "
    "{tick: 3, slot: r0c0, op: ADVANCE}, {tick: 3, slot: r1c0, op: ADVANCE}, "
    "{tick: 4, slot: r0c0, op: ADVANCE}, {tick: 4, slot: r1c0, op: ADVANCE}, "
    "{tick: 7, slot: r0c0, op: ADVANCE}, {tick: 7, slot: r1c0, op: PRUNE, ticks: 2}, "
    "{tick: 9, slot: r0c0, op: FOSSILIZE}"
)
COMMON = ("world.nproc_per_node=2", "telemetry.wandb.mode=disabled", "telemetry.console=off", "checkpoint.keep=100")
RUNS = {
    "digits": ("experiment=demo", "seed=3", "trainer.steps=560", "checkpoint.every_ticks=4"),
    "bytes": (
        "experiment=gpt_small",
        "seed=2",
        "host.dim=32",
        "data.block=32",
        "data.max_bytes=200000",
        "data.validation=128",
        "data.probe=256",
        "data.test=128",
        "gates=observe",
        "gates.probe_samples=64",
        "controller=schedule",
        f"controller.actions=[{SCHEDULE}]",
        "control.every=10",
        "trainer.steps=130",
        "checkpoint.every_ticks=4",
    ),
}
LIFE = ("tick", "command", "refusal", "gate", "stage", "ramp", "contribution", "veto", "skipped")
# Keys that differ between any two runs: times, durations, ids, the digest of the sources.
MILLISECONDS = ("steps_ms", "data_ms", "own_ms", "tick_ms", "digest_ms", "wrap_ms", "copy_ms", "save_ms", "stall_ms")
VOLATILE = {"schema", "time", "run_id", "code", "wall_s", *MILLISECONDS}


def make(code: Path, out: Path) -> None:
    """Makes the three runs below ``out`` with the sources in ``code``."""
    for name, overrides in RUNS.items():
        if not (out / name / "result.json").exists():
            _call(code, ["-m", "esper.cli", "train", *overrides, *COMMON, f"run.dir={out / name}"])
    if not (out / "session" / "done").exists():
        shutil.rmtree(out / "session", ignore_errors=True)
        (out / "session").mkdir(parents=True)
        _call(code, [*_torchrun(), str(LOOP), str(out / "session")])


def resume(code: Path, old: Path, out: Path) -> None:
    """Resumes each run of ``old`` from a checkpoint in its middle, with the sources in ``code``."""
    for name in RUNS:
        if not (out / name / "result.json").exists():
            shutil.rmtree(out / name, ignore_errors=True)
            steps = sorted(int(path.name[5:]) for path in (old / name / "checkpoints").glob("step-*"))
            at = steps[(len(steps) - 1) // 2]
            _call(code, ["-m", "esper.cli", "resume", str(old / name), "--at", str(at), "--as", str(out / name)])
    if not (out / "session" / "done").exists():
        shutil.rmtree(out / "session", ignore_errors=True)
        (out / "session").mkdir(parents=True)
        _call(code, [*_torchrun(), str(LOOP), str(out / "session"), str(old / "session" / "middle.pt")])


def _torchrun() -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def _call(code: Path, arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    print("same_runs:", code.name, " ".join(arguments)[:100], flush=True)
    done = subprocess.run([sys.executable, *arguments], cwd=code, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"same_runs: {' '.join(arguments)}\n{done.stdout}\n{done.stderr}\nended with {done.returncode}")


def differences(old: Any, new: Any, where: str) -> Iterator[str]:
    """Yields each place where two values differ: mappings and lists by their parts, tensors and numbers by bits."""
    import torch

    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            place = f"{where}.{key}"
            if key in VOLATILE:
                continue
            if key not in new or key not in old:
                yield f"{place}: only {'before' if key in old else 'now'}"
            else:
                yield from differences(old[key], new[key], place)
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        if len(old) != len(new):
            yield f"{where}: {len(old)} entries before, {len(new)} now"
        for index, (was, now) in enumerate(zip(old, new, strict=False)):
            yield from differences(was, now, f"{where}[{index}]")
    elif isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor):
        alike = (old.dtype, old.shape) == (new.dtype, new.shape)
        if not alike or old.contiguous().view(-1).numpy().tobytes() != new.contiguous().view(-1).numpy().tobytes():
            yield f"{where}: other bits in a tensor {tuple(old.shape)}"
    elif isinstance(old, float) and isinstance(new, float) and math.isnan(old) and math.isnan(new):
        pass
    elif type(old) is not type(new) or old != new:
        yield f"{where}: {old!r} before, {new!r} now"


def compare(old: Path, new: Path, *, resumed: bool = False) -> list[str]:
    """Compares two folders of `make`, line by difference.

    Args:
        old: runs of the earlier commit.
        new: runs of the present code.
        resumed: whether the new runs began in the middle.
    """
    import torch

    lines: list[str] = []
    for name in RUNS:
        for line in _compare_results(old / name, new / name):
            lines.append(f"{name}: {line}")
        before, now = _events(old / name / "events.jsonl"), _events(new / name / "events.jsonl")
        if resumed:  # events of a start and of saves are left out: a resumed run has others
            first = next(event["step"] for event in now if event["kind"] == "tick")
            before, now = (
                [{**event, "seq": 0} for event in events if event["step"] >= first and event["kind"] in LIFE]
                for events in (before, now)
            )
        lines += [f"{name}: {line}" for line in differences(before, now, "events")]
        last = max(path.name for path in (old / name / "checkpoints").glob("step-*"))
        for path in sorted((old / name / "checkpoints" / last).glob("*.pt")):
            other = new / name / "checkpoints" / last / path.name
            states = [torch.load(file, weights_only=True, map_location="cpu") for file in (path, other)]
            lines += [f"{name}: {line}" for line in differences(*states, f"{last}/{path.name}")]
    states = [torch.load(folder / "session" / "end.pt", weights_only=True) for folder in (old, new)]
    lines += [f"session: {line}" for line in differences(*states, "end.pt")]
    if not resumed:
        events = [_events(folder / "session" / "events.jsonl") for folder in (old, new)]
        lines += [f"session: {line}" for line in differences(*events, "events")]
    return lines


def _compare_results(old: Path, new: Path) -> Iterator[str]:
    yield from differences(*(json.loads((run / "result.json").read_text()) for run in (old, new)), "result")


def _events(path: Path) -> list[dict[str, Any]]:
    text = path.read_text().replace(str(path.parent), "RUN")
    return [whole(json.loads(line)) for line in text.splitlines()]


def lives(run: Path) -> dict[str, int]:
    """Counts the births and prunes of a run, from its events."""
    stages = [event for event in _events(run / "events.jsonl") if event["kind"] == "stage"]
    return {name: sum(event["payload"]["target"] == name for event in stages) for name in ("GERMINATED", "PRUNED")}


def main() -> int:
    """Makes, resumes and compares; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rev", help="the earlier commit")
    parser.add_argument("--out", type=Path, help="where the runs are kept; a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="esper-same-") as folder:
        out, code = (given.out or Path(folder)).absolute(), Path(folder) / "code"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(code)], check=True)
        subprocess.run(["git", "-C", str(code), "checkout", "--quiet", given.rev], check=True)
        make(code, out / "before")
        make(ROOT, out / "now")
        resume(ROOT, out / "before", out / "resumed")
        for name in (*RUNS, "session"):
            print(f"same_runs: {name}: {lives(out / 'before' / name)}")
        lines = compare(out / "before", out / "now")
        lines += [f"resumed: {line}" for line in compare(out / "before", out / "resumed", resumed=True)]
    for line in lines[:40]:
        print(f"same_runs: {line}")
    print(f"same_runs: {len(lines)} differences" if lines else "same_runs: equal")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
