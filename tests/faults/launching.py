"""One fault, or several after one another, in a run that a person started: launcher, torchrun, two ranks, a tiny host.

told = strike(start, folder, Cell(...))      # the run to its end, resumed where it did not get there by itself
told.named_s, told.again_s, told.lost        # for the table in the README
"""

import functools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.config.tree import write_config
from esper.nissa.reading import read_events
from esper.tolaria.data import TextConfig
from tests.support.commands import ESPER, Command, assert_gone, mark
from tests.support.fault_plans import Strike, plan, struck
from tests.support.patience import load
from tests.support.tiny import act, schedule, tiny_plain

TIMEOUT_S, STARTUP_S = 12.0, 60.0  # limits of a run, on a quiet machine
TICKS = 16  # of two steps each, a save at each, so that a stop adds none


def text_of(folder: Path) -> TextConfig:
    """Data that lies in a file: some of this Python's own source."""
    folder.mkdir()
    source = Path(json.__file__).parent
    names = {"train": ("decoder.py", "encoder.py", "scanner.py"), "test": ("__init__.py",)}
    for part, files in names.items():
        (folder / f"{part}.txt").write_text("".join((source / name).read_text() for name in files))
    return TextConfig(root=str(folder), block=16, validation=32, probe=64)


@functools.cache
def slowness() -> float:
    """How much longer than on a quiet machine ranks wait for each other; one figure for all runs, since they are
    compared."""
    return load()


def plain_of(run: Path, **settings: Any) -> dict[str, Any]:
    """Two lives on a tiny CNN: one trains from tick 5 and blends from tick 7 on, the other is staged at tick 8."""
    life = schedule(
        act(3, "r0c0", "GERMINATE", blueprint="conv_light", ticks=3),
        act(5, "r0c0", "ADVANCE"),
        act(7, "r0c0", "ADVANCE"),
        act(8, "r1c0", "GERMINATE", blueprint="norm", ticks=2),
        act(10, "r1c0", "ADVANCE"),
    )
    wanted: dict[str, Any] = {
        "trainer__steps": 2 * TICKS,
        "controller": life,
        "checkpoint__every_ticks": 1,
        "checkpoint__keep": 3,
        "control__timeout_s": TIMEOUT_S,
        "telemetry__level": "full",
        "telemetry__console": "plain",
        "run__dir": str(run),
    }
    task = "gpt" if "data" in settings else "cnn"
    if task == "gpt":
        for action in life["actions"]:
            action.update({"blueprint": "norm"} if "blueprint" in action else {})
    wanted |= settings
    wanted.setdefault("control__startup_timeout_s", STARTUP_S)
    for name in ("control__timeout_s", "control__startup_timeout_s"):
        wanted[name] *= slowness()
    return tiny_plain(task, **wanted)


@dataclass(slots=True)
class Told:
    """What was seen of a run.

    Args:
        code: exit code of the first command. err: what it said. resumed: by how many further commands.
        named_s: seconds from the fault to the line that names it. again_s: to the first step trained after it.
        lost: optimizer steps trained twice. attempts: step that each process group began from.
    """

    code: int
    err: str
    resumed: int = 0
    named_s: float | None = None
    again_s: float | None = None
    lost: int | None = None
    attempts: list[int | None] = field(default_factory=list)


class Place:
    """Where a run lies and commands are started; `Mounted` has a mount namespace of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self.seen = self.run  # by which path this process sees it
        self.before: list[str] = []
        self.started: list[Command] = []

    def make(self, **settings: Any) -> None:
        self.seen.mkdir(parents=True, exist_ok=True)
        write_config(self.seen / "config.yaml", plain_of(self.run, **settings))

    def start(self, *words: str, **more: str) -> Command:
        self.started.append(Command([*self.before, *ESPER], *words, folder=self.folder, **more))
        return self.started[-1]

    def close(self) -> None:
        for command in self.started:
            command.clear()

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Mounted(Place):
    """RUN on a tmpfs of ``size`` that no other process of the machine sees. Needs the right to mount."""

    def __init__(self, folder: Path, size: str) -> None:
        super().__init__(folder)
        self.run.mkdir(parents=True)
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]
        script = f"mount -t tmpfs -o size={size} tmpfs {self.run} && echo mounted && exec sleep 600"
        self.holder = subprocess.Popen([*words, script], stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout is not None
        assert self.holder.stdout.readline() == "mounted\n"
        self.seen = Path(f"/proc/{self.holder.pid}/root{self.run}")
        self.before = ["nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", f"--wd={folder}"]

    def thaw(self) -> None:
        """Takes a read-only mount off again."""
        subprocess.run([*self.before, "umount", str(self.run)], check=True)

    def close(self) -> None:
        super().close()
        self.holder.kill()
        self.holder.wait()


def may_mount() -> bool:
    """Whether this user may mount in a namespace of its own."""
    tools = all(shutil.which(name) for name in ("unshare", "nsenter", "mount"))
    return tools and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def begun(run: Path) -> list[int | None]:
    """Step that each attempt began from, None for nothing; the last word of each."""
    if not (run / "events.jsonl").exists():
        return []
    found = {
        e["attempt"]: e["payload"]["resumed_from"]
        for e in read_events(run / "events.jsonl")
        if e["kind"] == "run_started"
    }
    return [found[number] for number in sorted(found)]


def _attempt(run: Path) -> int:
    try:
        return int(json.loads((run / "attempt.json").read_text())["number"])
    except (OSError, ValueError):
        return 0


def strike(
    place: Place, strikes: list[Strike], says: str, *, mend: Callable[[Place], None] = lambda place: None, **more: str
) -> Told:
    """Runs, is struck, and runs to its end, by further commands where the first does not get there.

    Args:
        place: with its config. strikes: what befalls it. says: pattern of the line that names it, "" for none.
        mend: what a person does before `esper resume`. more: environment variables.
    """
    notes = place.folder / "notes"
    command = place.start("resume", str(place.run), **{**plan(notes, strikes), **more})
    told = Told(0, "")
    patience = command.patience()
    while command.process.poll() is None:
        assert patience.lasts(), f"it hangs: {patience}\n{command.told()}\n{struck(notes)}\n{mark(place.seen)}"
        _look(command, place, struck(notes), says, told)
        time.sleep(0.05)
    told.code, told.err = command.process.wait(), command.told()
    hits = struck(notes)
    assert hits, f"nothing struck\n{command.told()}"
    _look(command, place, hits, says, told)
    assert_gone(command, place.run)
    while told.code and told.resumed < 3:
        mend(place)
        left = [strike for strike in strikes if not strike.again]
        again = place.start("resume", str(place.run), **{**plan(notes, left), **more})
        told.resumed += 1
        if again.end() == 0:
            break
        told.err += again.err
    told.attempts = begun(place.seen)
    later = [step or 0 for step in told.attempts[1:]]
    told.lost = max(0, int(hits[-1]["step"]) - later[-1]) if later else 0  # a stop saves after what struck
    return told


def _look(command: Command, place: Place, hits: list[dict[str, float]], says: str, told: Told) -> None:
    if not hits:
        return
    since = time.monotonic() - hits[-1]["at"]
    if says and told.named_s is None and re.search(says, command.told()):
        told.named_s = since
    if told.again_s is None and _attempt(place.seen) > len(hits) and mark(place.seen).phase in ("forward", "backward"):
        told.again_s = since
