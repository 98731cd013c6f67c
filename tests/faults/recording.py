"""Records of runs that a fault ended, for the rules of `esper why`: `python -m tests.faults.recording FOLDER [SHARE]`.

Each cell of `CELLS` is struck once, in a run that a person started, and left as its first command left it: no resume,
no mend. What RUN then holds (events, STATUS, marks of the ranks, settings) is kept without the names of this
machine, with what was done to it as the label.
"""

import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.launching import Mounted, Place, may_mount, text_of
from tests.faults.table import PHASES, TABLE, train_file
from tests.support.commands import assert_gone
from tests.support.dist import ROOT
from tests.support.fault_plans import Strike, plan, struck

KEPT = ("events*.jsonl", "STATUS.json", "attempt.json", "heartbeat/*", "config.yaml", "result.json", "saved.json")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One recorded run.

    Args:
        fault: row of the table. phase: where it strikes. rank: whom. seed: of the run. restarts: of torchrun.
        again: in every attempt. action: what is right to do then: nothing, restart, change.
    """

    fault: str
    phase: str
    rank: int
    seed: int
    action: str
    restarts: int = 0
    again: bool = False

    @property
    def name(self) -> str:
        """Name of its folder."""
        words = f"{self.fault} {self.phase} rank {self.rank} seed {self.seed}" + " again" * self.again
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + f"-r{self.restarts}"


RANKED = ("start-up", "forward", "backward", "between observe and commit", "staging", "save", "commit of a save")
HARD = (*RANKED, "teardown")


def cells() -> Iterator[Cell]:
    """Every recorded cell, those first that say most."""
    for index, phase in enumerate(HARD):
        for rank in (0, 1):
            seed = 1 + (index + rank) % 3
            yield Cell(fault="kill -9 of a rank", phase=phase, rank=rank, seed=seed, action="restart")
            yield Cell(fault="SIGSTOP of a rank", phase=phase, rank=rank, seed=1 + seed % 3, action="restart")
        yield Cell(fault="kill -9 of all", phase=phase, rank=0, seed=1 + index % 3, action="restart")
    for index, phase in enumerate(("forward", "save", "staging")):
        for rank in (0, 1):
            seed = 1 + (index + rank) % 3
            again = {"again": True, "restarts": 1}
            yield Cell(fault="kill -9 of a rank", phase=phase, rank=rank, seed=seed, action="change", **again)
    for index, phase in enumerate(("forward", "backward", "save", "staging")):
        yield Cell(
            fault="kill -9 of a rank", phase=phase, rank=index % 2, seed=1 + index % 3, action="nothing", restarts=1
        )
    for index, phase in enumerate(("forward", "probe", "staging", "save", "data")):
        action = "restart"
        yield Cell(fault="stop signal to the launcher", phase=phase, rank=0, seed=1 + index % 3, action=action)
    for index, phase in enumerate(("forward", "save", "staging", "backward")):
        yield Cell(fault="kill -9 of the launcher", phase=phase, rank=0, seed=1 + index % 3, action="restart")
    for index, phase in enumerate(TABLE["forged weight"].phases):
        yield Cell(fault="forged weight", phase=phase, rank=1, seed=1 + index % 3, action="restart")
    for index, phase in enumerate(("forward", "backward")):
        yield Cell(fault="forged stage", phase=phase, rank=1, seed=1 + index, action="restart")
    for seed in (1, 2, 3):
        yield Cell(fault="forged weight", phase="forward", rank=1, seed=seed, action="change", restarts=1, again=True)
        yield Cell(fault="data file vanished", phase="forward", rank=seed % 2, seed=seed, action="change", restarts=1)
    for seed in (1, 2):
        yield Cell(fault="Inf in a seed", phase="forward", rank=0, seed=seed, action="nothing")
        yield Cell(fault="a rank 5 s slow", phase="forward", rank=seed % 2, seed=seed, action="nothing")
        no_memory = "out of memory in one rank at germination"
        yield Cell(fault=no_memory, phase="staging", rank=seed % 2, seed=seed, action="nothing")
    for index, phase in enumerate(TABLE["full disk"].phases):
        yield Cell(fault="full disk", phase=phase, rank=0, seed=1 + index, action="change")
    for index, phase in enumerate(TABLE["RUN gone read-only"].phases):
        yield Cell(fault="RUN gone read-only", phase=phase, rank=0, seed=1 + index % 3, action="change")
    for index, phase in enumerate(TABLE["full disk, for a while"].phases):
        yield Cell(fault="full disk, for a while", phase=phase, rank=0, seed=1 + index, action="nothing")
    for index, phase in enumerate(("start-up", "forward")):
        yield Cell(fault="clock jumps an hour ahead", phase=phase, rank=1, seed=1 + index, action="nothing")
        yield Cell(fault="clock jumps an hour back", phase=phase, rank=0, seed=1 + index, action="nothing")
    for seed in (1, 2, 3):
        yield Cell(fault="every checkpoint damaged", phase="start-up", rank=0, seed=seed, action="change")
        yield Cell(fault="newest checkpoint damaged", phase="start-up", rank=0, seed=seed, action="nothing")
    yield Cell(fault="undisturbed", phase="forward", rank=0, seed=1, action="nothing")


STRIKES = {"kill -9 of a rank": "kill", "SIGSTOP of a rank": "stop"}


def strikes_of(cell: Cell, place: Place) -> list[Strike]:
    """What befalls the run of a cell."""
    if cell.fault in STRIKES or cell.fault.startswith(("a rank", "forged", "data file", "out of memory")):
        names = {"a rank 5 s slow": "slow", "data file vanished": "vanish", **STRIKES}
        fault = names.get(cell.fault, "no memory" if cell.fault.startswith("out of") else cell.fault)
        where, tick = PHASES[cell.phase]
        if where == "rename" and cell.rank != 0:
            where, tick = "settle", tick + 1
        path = str(train_file(place)) if fault == "vanish" else ""
        return [Strike(fault=fault, place=where, tick=tick, ranks=[cell.rank], again=cell.again, path=path)]
    made = TABLE[cell.fault].strikes
    assert made is not None
    return made(cell.phase, place)


def settings_of(cell: Cell, folder: Path) -> dict[str, Any]:
    """Settings of the run of a cell."""
    settings: dict[str, Any] = {"seed": cell.seed, "telemetry__level": "lifecycle"}
    settings["world__max_restarts"] = cell.restarts
    if cell.fault.startswith("SIGSTOP"):
        settings["control__startup_timeout_s"] = 20.0
    if cell.fault == "data file vanished":
        settings["data"] = text_of(folder / "text")
    return settings


def record(cell: Cell, out: Path) -> None:
    """Strikes, and keeps what RUN then holds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = TABLE[cell.fault].size if cell.fault in TABLE else ""
        with Mounted(folder, size) if size else Place(folder) as place:
            place.make(**settings_of(cell, folder))
            told = {"code": 0, "tick": 0, "step": 0}
            if cell.fault == "undisturbed":
                told["code"] = place.start("resume", str(place.run)).end()
            elif cell.fault.endswith("checkpoint damaged"):
                kill = [Strike(fault="kill all", place="forward", tick=9, ranks=[0])]
                place.start("resume", str(place.run), **plan(folder / "notes", kill)).end()
                saved = sorted((place.run / "checkpoints").glob("step-????????"))
                for path in saved if cell.fault.startswith("every") else saved[-1:]:
                    (path / "state.pt").write_bytes(b"")
                told["code"] = place.start("resume", str(place.run)).end()
            else:
                command = place.start("resume", str(place.run), **plan(folder / "notes", strikes_of(cell, place)))
                told["code"] = command.end()
                assert_gone(command, place.run)
                hits = struck(folder / "notes")
                assert hits, command.told()
                told |= {"tick": int(hits[-1]["tick"]), "step": int(hits[-1]["step"])}
            keep(place, out / cell.name)
            disk = os.statvfs(place.seen)
            label = {**asdict(cell), **told, "free_bytes": disk.f_bavail * disk.f_frsize}
            label["read_only"] = bool(disk.f_flag & os.ST_RDONLY)
            (out / cell.name / "label.json").write_text(json.dumps(label, indent=1, sort_keys=True) + "\n")


def keep(place: Place, to: Path) -> None:
    """Copies what `esper why` reads, without the names of this machine."""
    shutil.rmtree(to, ignore_errors=True)
    for pattern in KEPT:
        for path in sorted(place.seen.glob(pattern)):
            target = to / path.relative_to(place.seen)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(errors="replace").replace("\0", "")
            for own, other in ((str(place.run), "RUN"), (str(place.folder), "HOME"), (str(ROOT), "ESPER")):
                text = text.replace(own, other)
            target.write_text(text)


def main(folder: str, share: str = "1/1") -> None:
    """Records what is not there yet."""
    index, of = map(int, share.split("/"))
    chosen = list(cells())
    random.Random(0).shuffle(chosen)  # so that those recorded so far are of all kinds
    for cell in chosen[index - 1 :: of]:
        out = Path(folder)
        if (out / cell.name / "label.json").exists() or (
            TABLE.get(cell.fault) and TABLE[cell.fault].size and not may_mount()
        ):
            continue
        try:
            record(cell, out)
            print("recorded", cell.name, flush=True)
        except Exception as error:  # one that fails is said, and the others go on
            print("FAILED", cell.name, repr(error)[:2000], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
