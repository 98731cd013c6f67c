"""A copy of the host's block whose run goes back between its staging and its entry.

What the copy weighs follows from the host at the tick of its entry. So after a rollback it is staged again, enters as
the host is then, and a rank that is killed in the midst of it changes no bit of the end.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.accord.effects import Register
from esper.kasmina.hosts import CustomHostConfig
from esper.nissa.reading import read_events
from esper.run import train
from esper.tolaria.growth.growth import Growth
from esper.tolaria.training.engine import Engine
from tests.support.diverging_runs import GUARDED, spoil_data
from tests.support.killed_runs import Kill, assert_same_run, final, live, prepare_run
from tests.support.tiny import act, schedule, tiny_plain

STAGED, PANIC, BACK = 21, 22, 18  # ticks; it would enter at the tick of the panic
BAD = range(40, 42)  # optimizer steps whose samples drive the loss away, two a tick
SETTINGS: dict[str, Any] = {
    "host": CustomHostConfig(path="tests.dist.test_copied_blocks_rolled_back:residual", sites={"r0c0": "block"}),
    "trainer__steps": 56,
    "control__every": 2,
    **GUARDED,
    "checkpoint__every_ticks": 2,
    "checkpoint__keep": 40,
    "slots__blocks": ["copy"],
    "slots__copy_zero": ["last"],
    "slots__incubation": "immediate",
    "controller": schedule(
        act(STAGED, "r0c0", "GERMINATE", blueprint="copy", ticks=1),
        act(STAGED + 2, "r0c0", "ADVANCE"),
    ),
}


class Block(nn.Module):
    """Feature map [B, C, H, W] -> the same shape: a residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.last(torch.relu(self.first(x)))
        return x + inner


def residual(input_shape: tuple[int, ...], classes: int, width: int = 8) -> nn.Module:
    """Images [B, C, H, W] -> logits [B, classes], without any norm that would swallow a scale."""
    stem = nn.Conv2d(input_shape[0], width, 3, stride=2, padding=1)
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * width, classes))
    return nn.Sequential(OrderedDict(stem=stem, act=nn.ReLU(), block=Block(width), head=head))


def spoil_and_watch(rank: int) -> None:
    """Spoils the training part of this process; a copy that enters unlike the host of that moment fails the run."""
    own, perform = train.assemble, Growth.perform

    def assemble(*args: Any, **parts: Any) -> Engine:
        engine = own(*args, **parts)
        spoil_data(engine, BAD, 1e3)
        return engine

    def watched(self: Growth, effects: Any) -> None:
        perform(self, effects)
        if any(isinstance(effect, Register) for effect in effects):
            copy, source = self.grown.slots["r0c0"].seed.block, self.grown.model.get_submodule("block")
            assert torch.equal(copy.first.weight, source.first.weight), "as the host is at its entry"
            assert not copy.last.weight.any()

    train.assemble = assemble  # type: ignore[attr-defined]
    Growth.perform = watched  # type: ignore[method-assign]


def events_of(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [r for r in read_events(run_dir / "events.jsonl") if r["kind"] == kind]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks with one rollback; nobody changes this folder."""
    run_dir = prepare_run(tmp_path_factory.mktemp("undisturbed") / "run", tiny_plain("cnn", **SETTINGS))
    assert live(run_dir, 2, prepare=spoil_and_watch) == [0, 0]
    return run_dir


def test_it_is_staged_again_and_enters_once(undisturbed: Path) -> None:
    (back,) = events_of(undisturbed, "rollback")
    assert (back["tick"], back["payload"]["to_tick"]) == (PANIC, BACK)
    commands = [r for r in events_of(undisturbed, "command") if r["payload"]["command"]["op"] == "GERMINATE"]
    assert [(r["tick"], r["seq"] < back["seq"]) for r in commands] == [(STAGED, True), (STAGED, False)]
    (born,) = events_of(undisturbed, "born")
    assert born["seq"] > back["seq"]
    assert any("esper_slots.r0c0.seed.block.first" in name for name in final(undisturbed)["tensors"])


@pytest.mark.parametrize(
    "kill", [Kill("gone-back", BACK, rank=0), pytest.param(Kill("rollback", PANIC, rank=1), marks=pytest.mark.slow)]
)
def test_killed_in_that_rollback_it_comes_to_the_same_bits(kill: Kill, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = prepare_run(tmp_path / "run", tiny_plain("cnn", **SETTINGS))
    live(run_dir, 2, kill, prepare=spoil_and_watch)
    assert live(run_dir, 2, prepare=spoil_and_watch) == [0, 0]
    assert_same_run(final(run_dir), final(undisturbed))
