"""What `esper why --end` says of the recorded faults, held against what was done to each run.

``python -m tests.karn.faults_recorded`` prints the tables of docs/why.md; ``... pack FOLDER`` packs what
`tests.faults.recording` has recorded.
"""

import json
import os
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esper.karn.why.endings import Diagnosis, diagnose, read_evidence
from esper.karn.why.rules import Action

HERE = Path(__file__).parent / "recorded"
PACKED, KNOWN = HERE / "faults.tar.xz", HERE / "faults_known.txt"
ACTIONS = {"nothing": Action.NOTHING, "restart": Action.RESTART, "change": Action.CHANGE}
# What may be said of the phase. A save goes on beside training, so what its rank was doing is not asked.
PHASES = {
    "start-up": {"start", "load"},
    "forward": {"forward"},
    "backward": {"backward"},
    "between observe and commit": {"decide", "births", "commit"},
    "staging": {"stage"},
    "teardown": {"test"},
}
CAUSES = {
    "kill -9 of a rank": {"rank killed"},
    "SIGSTOP of a rank": {"rank hung"},
    "kill -9 of all": {"silent"},
    "kill -9 of the launcher": {"stopped", "silent", "stopped by force"},
    "stop signal to the launcher": {"stopped", "stopped by force"},
    "forged weight": {"ranks parted"},
    "forged stage": {"ranks parted", "rank hung"},
    "data file vanished": {"data"},
    "full disk": {"disk full"},
    "RUN gone read-only": {"read-only"},
    "every checkpoint damaged": {"no checkpoint"},
    "newest checkpoint damaged": {"silent"},  # the kill before it
}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One recorded run, what was done to it, what was said of it, and on which points that was right."""

    name: str
    known: bool
    label: dict[str, Any]
    said: Diagnosis
    right: dict[str, bool]


def held_out(name: str) -> bool:
    """Whether a record was kept apart while the rules were written."""
    return name not in KNOWN.read_text().split()


def unpacked(folder: Path) -> Iterator[Path]:
    """Every recorded run, unpacked."""
    with tarfile.open(PACKED) as packed:
        packed.extractall(folder, filter="data")
    for run in sorted(path.parent for path in folder.glob("*/label.json")):
        for path in run.rglob("*.json"):
            os.utime(path, (2, 2))  # STATUS.json is of the newest attempt
        for path in run.glob("heartbeat/*"):
            os.utime(path, (1, 1))
        yield run


def judge(run: Path) -> Judged:
    """Asks why a recorded run ended, and compares."""
    label = json.loads((run / "label.json").read_text())
    place = "Read-only file system" if label.get("read_only") else ""
    if label.get("free_bytes", 1 << 30) < 1 << 16:
        place = "No space left on device"
    said = diagnose(replace(read_evidence(run), place=place))
    failure = said.failures[-1] if said.failures else None
    right = {"action": said.action is ACTIONS[label["action"]]}
    fault, phase = label["fault"], label["phase"]
    causes = CAUSES.get(fault, {"done"})
    found = {said.cause} if label["action"] != "nothing" else {failure.cause} if failure else {"done"}
    right["cause"] = bool(found & causes)
    if fault in ("kill -9 of a rank", "SIGSTOP of a rank", "forged weight", "forged stage"):
        right["rank"] = failure is not None and failure.rank == label["rank"]
        right["tick"] = failure is not None and abs(failure.tick - label["tick"]) <= 1
    elif fault.startswith("out of memory"):
        told = [e for s in said.sentences for e in s.events if e["kind"] == "veto"]
        right["rank"] = [e["payload"]["rank"] for e in told] == [label["rank"]]
    else:
        right["rank"] = failure is None or failure.rank is None
    if fault in ("kill -9 of a rank", "SIGSTOP of a rank", "kill -9 of all") and phase in PHASES:
        right["phase"] = failure is not None and failure.phase in PHASES[phase]
    return Judged(name=run.name, known=not held_out(run.name), label=label, said=said, right=right)


def judge_all() -> list[Judged]:
    """All of them."""
    with tempfile.TemporaryDirectory() as folder:
        return [judge(run) for run in unpacked(Path(folder))]


def shares(judged: list[Judged]) -> dict[str, tuple[int, int]]:
    """How often each point was right, and how often it was asked."""
    asked, right = Counter[str](), Counter[str]()
    for one in judged:
        asked.update(one.right)
        right.update(point for point, good in one.right.items() if good)
    return {point: (right[point], asked[point]) for point in ("cause", "rank", "phase", "tick", "action")}


def tables(judged: list[Judged]) -> str:
    """The confusion matrices of docs/why.md."""
    text = []
    for title, known in (("Kept apart", False), ("Known while the rules were written", True)):
        some = [one for one in judged if one.known is known]
        cells = Counter((one.label["action"], one.said.action.value) for one in some)
        columns = [action.value for action in Action]
        text += [f"{title}, {len(some)} runs: what was right to do (rows), and what was said (columns).", ""]
        text += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        text += [f"| {row} | " + " | ".join(str(cells[row, c]) for c in columns) + " |" for row in ACTIONS]
        figures = ", ".join(f"{point} {good} of {of}" for point, (good, of) in shares(some).items())
        text += ["", f"Right on: {figures}.", ""]
    faults = sorted({one.label["fault"] for one in judged})
    text += ["| fault | runs kept apart | said of them | known runs | said of them |", "|---|---|---|---|---|"]
    for fault in faults:
        cells = []
        for known in (False, True):
            some = [one for one in judged if one.known is known and one.label["fault"] == fault]
            said = Counter(one.said.cause for one in some)
            cells += [str(len(some)), ", ".join(f"{cause} {n}" for cause, n in sorted(said.items())) or "–"]
        text.append(f"| {fault} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def pack(folder: Path) -> None:
    """Packs recorded runs."""

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(PACKED, "w:xz") as packed:
        for run in sorted(path.parent for path in folder.glob("*/label.json")):
            packed.add(run, arcname=run.name, filter=plain)


if __name__ == "__main__":
    if sys.argv[1:2] == ["pack"]:
        pack(Path(sys.argv[2]))
    else:
        print(tables(judge_all()), end="")
