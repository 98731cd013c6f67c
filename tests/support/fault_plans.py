"""Plans of faults for real ranks: what strikes, where, when and whom, from the environment variable FAULT_PLAN.

A plan is a list of `Strike`, as JSON. Each strikes once in a run (a file in its folder says that it has, and when),
or again in every attempt. `tests.support.fault_places` lists the places; `tests/support/site` puts the plan into a
rank.
"""

import ctypes
import dataclasses
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from esper.launcher.processes import children_of
from esper.leyline.stages import Stage
from esper.tolaria.training.engine import Engine
from tests.support.fault_places import strike_at

READ_ONLY, REMOUNT, BIND = 1, 32, 4096  # of mount(2)
WAIT_S = 5.0
CLOCK_JUMP_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """One fault.

    Args:
        fault: of `FAULTS`. place: of `PLACES`. tick: from which on. ranks: whom.
        again: in every attempt, not only the first time. path: what it concerns, where that is a file or a folder.
    """

    fault: str
    place: str
    tick: int
    ranks: list[int]
    again: bool = False
    path: str = ""


engines: list[Engine] = []  # of this process


def _engine() -> Engine:
    return engines[-1]


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_launcher() -> None:
    """The launcher is the parent of torchrun's agent, which is this rank's."""
    os.kill(_parent(os.getppid()), signal.SIGKILL)
    time.sleep(WAIT_S)  # the agent follows it, and takes this rank along


def _kill_all() -> None:
    agent = os.getppid()
    launcher = _parent(agent)
    others = [pid for pid in children_of(agent) if pid != os.getpid()]
    for pid in (launcher, agent, *others, os.getpid()):
        os.kill(pid, signal.SIGKILL)


def _ask_to_stop() -> None:
    """As Ctrl-C or Slurm at the launcher; this rank goes on at once."""
    os.kill(_parent(os.getppid()), signal.SIGTERM)


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _wait() -> None:
    time.sleep(WAIT_S)


def _forge_weight() -> None:
    weight = next(iter(_engine().grown.model.parameters()))
    weight.data.view(-1)[0].mul_(1.0 + 1e-6)  # as memory fails: autograd is not told


def _forge_stage() -> None:
    engine = _engine()
    engine.state = engine.state.with_slots({"r0c0": replace(engine.state.slot("r0c0"), stage=Stage.GERMINATED)})


def _inf_seed() -> None:
    seed = _engine().grown.slots["r0c0"].seed
    assert seed is not None
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.fill_(torch.inf)


def _no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def _clock(by_s: float) -> Callable[[], None]:
    def jump() -> None:
        real, real_ns = time.time, time.time_ns
        time.time = lambda: real() + by_s
        time.time_ns = lambda: real_ns() + int(by_s * 1e9)

    return jump


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def _freeze(path: Path) -> None:
    """A read-only mount of the folder on itself; what is open stays open."""
    libc = ctypes.CDLL(None, use_errno=True)
    name = os.fsencode(path)
    for flags in (BIND, BIND | REMOUNT | READ_ONLY):
        if libc.mount(name, name, None, flags, None) != 0:
            raise OSError(ctypes.get_errno(), "mount")


def _vanish(path: Path) -> None:
    """The file is gone, and so is this rank."""
    path.rename(path.with_name("elsewhere"))
    _kill()


FAULTS: dict[str, Callable[[Path], None]] = {
    "note": lambda path: None,
    "kill": lambda path: _kill(),
    "kill launcher": lambda path: _kill_launcher(),
    "kill all": lambda path: _kill_all(),
    "ask to stop": lambda path: _ask_to_stop(),
    "stop": lambda path: _stop(),
    "slow": lambda path: _wait(),
    "forged weight": lambda path: _forge_weight(),
    "forged stage": lambda path: _forge_stage(),
    "inf seed": lambda path: _inf_seed(),
    "no memory": lambda path: _no_memory(),
    "clock ahead": lambda path: _clock(CLOCK_JUMP_S)(),
    "clock back": lambda path: _clock(-CLOCK_JUMP_S)(),
    "fill": _fill,
    "free": Path.unlink,
    "freeze": _freeze,
    "vanish": _vanish,
    "truncate": lambda path: os.truncate(path, path.stat().st_size // 2),
    "remove": lambda path: shutil.rmtree(path),
}


def plan(folder: Path, strikes: list[Strike]) -> dict[str, str]:
    """Environment variables that put strikes in place; what they note lies in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    site = Path(__file__).parent / "site"
    text = json.dumps({"folder": str(folder), "strikes": [dataclasses.asdict(strike) for strike in strikes]})
    root = Path(__file__).parents[2]
    return {"FAULT_PLAN": text, "PYTHONPATH": os.pathsep.join([str(site), str(root)])}


def struck(folder: Path) -> list[dict[str, float]]:
    """What each strike noted: index, rank, seconds on the machine's own clock, step and tick; in order of time."""
    notes = [json.loads(path.read_text()) for path in folder.glob("strike-*")]
    return sorted(notes, key=lambda note: note["at"])


def arm(rank: int) -> None:
    """In a rank: puts what its plan says in place."""
    told = json.loads(os.environ["FAULT_PLAN"])
    began = Engine.__init__

    def noticed(self: Engine, *args: object, **kwargs: object) -> None:
        began(self, *args, **kwargs)  # type: ignore[arg-type]
        engines.append(self)

    Engine.__init__ = noticed  # type: ignore[assignment, method-assign]
    for index, entry in enumerate(told["strikes"]):
        strike = Strike(**entry)
        if rank in strike.ranks:
            strike_at(strike.place, strike.tick, _once(strike, index, rank, Path(told["folder"])))


def _once(strike: Strike, index: int, rank: int, folder: Path) -> Callable[[], None]:
    done: list[bool] = []

    def act() -> None:
        if done:
            return
        done.append(True)
        name = folder / f"strike-{index}-{rank}"
        if name.exists() and not strike.again:
            return
        engine = engines[-1] if engines else None
        where = {"step": engine.step if engine else 0, "tick": engine.state.tick if engine else 0}
        note = {"index": index, "rank": rank, "at": time.monotonic(), **where}
        temporary = name.with_name(f".{name.name}")
        temporary.write_text(json.dumps(note))
        temporary.rename(name)
        print(f"struck: {strike.fault} at {strike.place} on rank {rank}", file=sys.stderr, flush=True)
        FAULTS[strike.fault](Path(strike.path))

    return act
