"""Named places in the worker where a fault can strike a rank, reached by wrapping the real functions there.

strike_at("rename", 5, act)    # calls act() whenever this process is at that place, from tick 5 on
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from esper.tolaria.checkpoint import store as checkpoint
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.growth import growth
from esper.tolaria.growth.growth import Growth
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.world import World
from esper.tolaria.training.evaluate import Evaluator
from esper.tolaria.training.governor import Governor

# The second column is where the process then stands, by its own last mark.
PLACES = {
    "start": "start",  # joined, nothing loaded or built
    "forward": "forward",  # half of the modules have run
    "backward": "backward",  # half of the gradients are there
    "measure": "measure",  # validation is done
    "before-commit": "commit",  # decided, digests taken, nothing agreed
    "apply": "apply",  # agreed, nothing done
    "stage": "stage",  # a seed is built and not staged
    "rewrap": "rewrap",  # the new wrapper stands
    "save": "save",  # half of this rank's file is written
    "settle": "save-commit",  # every rank: the commit has told what became of a save
    "hash": "save-commit",  # rank 0: every file is there, without a manifest
    "rename": "save-commit",  # rank 0: the manifest is there, the folder still temporary
    "committed": "save-commit",  # rank 0: the folder has its name, older ones are not yet removed
    "rollback": "rollback",  # a panic is agreed, nothing has been put back
    "gone-back": "rollback",  # the model is the generation's, what was saved since still bears its name
    "test": "test",  # trained and saved, the test part not yet read
    "close": "test",  # the result is written, the process groups still stand
}

# Places that nobody is killed at in `tests/dist/`: before there is a heartbeat, and within a measurement.
EARLY = ("import", "data", "compile")  # nothing of the worker imported; no data; the host about to be compiled
WITHIN = {"probe": "measure"}  # a seed's contribution is about to be measured

# What a thread does beside training: the process may then stand anywhere, so its own last mark says nothing.
WRITING = ("save", "hash", "rename", "committed")
_MARKED = ("start", "before-commit", "apply", "settle", "rollback", "test")


def _after(owner: Any, name: str, due: Callable[[], bool], act: Callable[[], None], before: bool = False) -> None:
    """Lets the real function run, then acts (or acts before it)."""
    real = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        if before and due():
            act()
        result = real(*args, **kwargs)
        if not before and due():
            act()
        return result

    setattr(owner, name, struck)


def _strike_early(place: str, act: Callable[[], None]) -> None:
    if place == "import":
        act()
        return
    from esper.run import assembly, train  # here, since this module is imported into ranks before the worker is

    owner, name = (train, "load_data") if place == "data" else (assembly, "build_compiler")
    _after(owner, name, lambda: True, act, before=True)


def strike_at(place: str, tick: int, act: Callable[[], None]) -> None:
    """Puts ``act`` in place, in this process for good."""
    if place in EARLY:
        _strike_early(place, act)
        return
    mark = Heartbeat.mark
    beat: list[Heartbeat] = []

    def due() -> bool:
        if not beat:
            return False
        now = beat[0].tick + 1 if place in ("forward", "backward") else beat[0].tick
        here = place in WRITING or beat[0].phase == {**PLACES, **WITHIN}[place]
        return here and now >= tick

    def marked(self: Heartbeat, phase: str, error: str = "") -> None:
        beat[:] = [self]
        mark(self, phase, error)
        if place in _MARKED and due():
            act()

    Heartbeat.mark = marked  # type: ignore[method-assign]

    def in_forward(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Linear | nn.Conv2d) and torch.is_grad_enabled():
            if place == "forward" and due():
                act()
            elif place == "backward" and isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda grad: act() if due() else None)

    if place in ("forward", "backward"):
        register_module_forward_hook(in_forward)
    elif place == "measure":
        _after(Evaluator, "part_sums", due, act)
    elif place == "probe":
        _after(Evaluator, "probe_sums", due, act, before=True)
    elif place == "stage":
        _after(Growth, "build", due, act)
    elif place == "rewrap":
        _after(growth, "wrap", due, act)
    elif place == "gone-back":
        _after(Governor, "discard_later", due, act, before=True)
    elif place == "hash":
        write_synced = checkpoint.write_synced

        def without_manifest(path: Path, content: Any) -> None:
            if path.name == "manifest.json" and due():
                act()
            write_synced(path, content)

        checkpoint.write_synced = without_manifest  # type: ignore[assignment]
    elif place in ("rename", "committed"):
        _after(Path, "rename", due, act, before=place == "rename")
    elif place == "close":
        _after(World, "close", due, act, before=True)
    elif place == "save":
        write = CheckpointStore.write

        def torn(self: CheckpointStore, step: int, name: str, payload: dict[str, Any]) -> None:
            write(self, step, name, payload)
            if due() and name != "state.pt":
                path = self._temporary(step) / name
                whole = path.read_bytes()
                os.truncate(path, len(whole) // 2)
                act()
                path.write_bytes(whole)  # for an act that returns

        CheckpointStore.write = torn  # type: ignore[method-assign]
