"""Saves beside training: what is written is what was at the tick; the next save and the end wait."""

import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esper.leyline.errors import CheckpointError, LeaseError
from esper.leyline.events import CheckpointSaved, Fault, Rewrapped
from esper.tolaria.checkpoint.hostcopy import HostCopy, rebuild
from esper.tolaria.checkpoint.saver import Saver
from esper.tolaria.checkpoint.store import CheckpointStore, rank_file
from esper.tolaria.lockstep.wire import RankWord, SaveWord
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World
from esper.tolaria.training.engine import Engine
from tests.support.dist import run_distributed
from tests.support.small_runs import train_on
from tests.support.tiny import bits, events, make_engine, tiny_config

AXES = {"step": 1, "tick": 1, "epoch": 1}
PATIENT = 60.0


def saver_in(folder: Path, control: ControlConfig | None = None) -> Saver:
    store = CheckpointStore(folder / "checkpoints", attempt=1, keep=9)
    return Saver(store, World(WorldConfig(), control or ControlConfig()))


class Held:
    """A store whose writing of one step stands still until it is let go."""

    def __init__(self, store: CheckpointStore, step: int) -> None:
        self.begun, self.free = threading.Event(), threading.Event()
        write = store.write

        def held(at: int, name: str, payload: dict[str, Any]) -> None:
            if at == step:
                self.begun.set()
                assert self.free.wait(PATIENT)
            write(at, name, payload)

        store.write = held  # type: ignore[method-assign]


def words(saver: Saver) -> tuple[RankWord, ...]:
    return (RankWord(save=saver.word),)


def savers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "esper-saver"]


def test_what_is_written_is_what_was_at_the_tick(tmp_path: Path) -> None:
    saver = saver_in(tmp_path)
    held = Held(saver.store, 10)
    model = nn.Linear(3, 3)
    controller = {"counts": [1, 2]}
    wanted = bits(model.state_dict().items())
    saver.begin(10, 1, 0.5, {"model": dict(model.state_dict()), "controller": controller}, {"rank": 0})
    assert held.begun.wait(PATIENT)
    assert saver.word is SaveWord.WRITING
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    controller["counts"].append(3)
    assert saver.settle(words(saver), AXES) == []
    assert saver.in_flight == 10, "nobody has spoken"
    held.free.set()
    (told,) = saver.finish(AXES, PATIENT)
    assert isinstance(told, CheckpointSaved)
    assert (told.saved_step, told.bytes > 0, told.stall_ms > 0, saver.in_flight) == (10, True, True, None)
    payload = saver.store.load(10, "state.pt")
    assert bits(payload["model"].items()) == wanted
    assert payload["controller"] == {"counts": [1, 2]}
    assert saver.store.verify(10).score == 0.5
    assert savers() == []


def test_a_save_takes_a_copy_from_the_training_thread_and_nothing_else(tmp_path: Path) -> None:
    """Counted: each number is copied once; nothing is opened, hashed, serialised or written there."""
    engine = make_engine(tiny_config(), tmp_path)
    engine.begin(None)
    train_on(engine, until=4)
    sizes: dict[int, int] = {}
    rebuild(engine.collect_saved(engine.state), lambda tensor, _: sizes.setdefault(tensor.data_ptr(), tensor.nbytes))
    engine.saves.begin(engine.state, scored=False)  # the first one makes the buffers
    engine.saves.settle_now(engine.state)
    calls, copied, copy = Counter[str](), [], torch.Tensor.copy_

    def note(frame: Any, event: str, function: Any) -> None:
        if event in ("call", "c_call"):
            calls[frame.f_code.co_name if event == "call" else function.__name__] += 1

    def counted(self: torch.Tensor, source: torch.Tensor, **more: Any) -> torch.Tensor:
        copied.append(source.nbytes)
        return copy(self, source, **more)

    before = sys.getprofile()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", counted)
        sys.setprofile(note)
        try:
            engine.saves.begin(engine.state, scored=False)
        finally:
            sys.setprofile(before)
    engine.saves.settle_now(engine.state)
    engine.growth.close()
    engine.feed.close()
    assert sum(copied) == sum(sizes.values())
    assert calls.keys().isdisjoint({"save", "open", "mkdir", "write", "write_synced", "fsync", "sha256", "update"})


def test_a_save_is_committed_once_all_have_spoken_and_told_when_it_is_done(tmp_path: Path) -> None:
    saver = saver_in(tmp_path)
    assert (saver.word, saver.settle(words(saver), AXES), saver.finish(AXES, PATIENT)) == (SaveWord.NONE, [], [])
    saver.begin(10, 1, None, {"a": 1}, {"rank": 0})
    saver.wait(PATIENT)
    assert (saver.word, saver.store.steps()) == (SaveWord.WRITTEN, [])
    saver.settle(words(saver), AXES)
    saver.begin(20, 2, None, {"a": 2}, {"rank": 0})  # its writing waits for the commit of the one before
    saver.wait(PATIENT)
    assert saver.store.steps() == [10]
    told = saver.settle(words(saver), AXES)
    assert [event.saved_step for event in told if isinstance(event, CheckpointSaved)] == [10]
    told = saver.finish(AXES, PATIENT)
    assert [event.saved_step for event in told if isinstance(event, CheckpointSaved)] == [20]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("basic_ios::clear"), KeyError()]
)
def test_what_goes_wrong_in_the_thread_is_this_rank_s_word(error: Exception, tmp_path: Path) -> None:
    saver = saver_in(tmp_path)
    saver.begin(10, 1, None, {"a": 1}, {"rank": 0})
    saver.finish(AXES, PATIENT)
    write = saver.store.write

    def full(step: int, name: str, payload: dict[str, Any]) -> None:
        write(step, name, payload)
        raise error

    saver.store.write = full  # type: ignore[method-assign]
    saver.begin(20, 2, None, {"a": 2}, {"rank": 0})
    saver.wait(PATIENT)
    assert saver.word is SaveWord.FAILED
    (fault,) = saver.settle(words(saver), AXES)
    assert isinstance(fault, Fault)
    assert f"save of step 20 failed on rank 0: {type(error).__name__}" in fault.what
    assert [path.name for path in saver.store.folder.iterdir()] == ["step-00000010"]
    saver.begin(30, 3, None, {"a": 3}, {"rank": 0})
    with pytest.raises(
        CheckpointError, match=r"save of step 30 failed on rank 0: .*; the newest checkpoint is step 10"
    ):
        saver.finish(AXES, PATIENT)


def test_a_lease_that_is_lost_while_rank_0_commits_ends_the_run(tmp_path: Path) -> None:
    lost = threading.Event()

    def lease() -> None:
        if lost.is_set():
            raise LeaseError("a newer attempt has begun")

    saver = saver_in(tmp_path)
    saver.store.lease = lease
    saver.begin(10, 1, None, {"a": 1}, {"rank": 0})
    saver.wait(PATIENT)
    lost.set()
    with pytest.raises(LeaseError, match=r"^a newer attempt has begun$"):
        saver.finish(AXES, PATIENT)
    assert saver.store.steps() == []


def test_the_last_save_waits_so_long_and_no_longer(tmp_path: Path) -> None:
    saver = saver_in(tmp_path)
    held = Held(saver.store, 10)
    saver.begin(10, 1, None, {"a": 1}, {"rank": 0})
    with pytest.raises(
        CheckpointError, match=r"save of step 10 is still being written on rank 0 .*no older checkpoint"
    ):
        saver.finish(AXES, 0.05)
    held.free.set()
    saver.close(PATIENT)
    assert savers() == []


def test_buffers_stand_and_follow_what_grows() -> None:
    tied = torch.randn(4, 3)
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    payload = {"a": {"w": tied, "again": tied}, "b": [channels_last, 3, "text", None], "c": (torch.zeros(0),)}
    copy = HostCopy()
    first = copy.take(payload)
    copy.ready()
    assert first["a"]["w"] is first["a"]["again"]
    assert first["b"][0].stride() == channels_last.stride()
    assert first["b"][1:] == [3, "text", None]
    at = first["a"]["w"].data_ptr(), first["b"][0].data_ptr()
    assert at[0] != tied.data_ptr()
    tied.add_(1.0)
    second = copy.take({**payload, "new": torch.ones(5)})
    assert (second["a"]["w"].data_ptr(), second["b"][0].data_ptr()) == at, "no new memory"
    assert torch.equal(second["a"]["w"], tied)
    assert torch.equal(second["new"], torch.ones(5))
    third = copy.take({"a": {"w": torch.zeros(2, 2)}})
    assert set(copy._buffers) == {"/a/w"}, "what is gone has given its memory back"
    assert third["a"]["w"].shape == (2, 2)


def slow_on(rank: int, engine: Engine, step: int, until: int) -> Callable[[], None]:
    """Rank ``rank`` is not done with the save of ``step`` before ``until`` steps are trained; returns the release."""
    if engine.world.rank != rank:
        return lambda: None
    held = Held(engine.saver.store, step)
    train_step = engine.train_step

    def stepping() -> None:
        train_step()
        if engine.step == until:
            held.free.set()

    engine.train_step = stepping  # type: ignore[method-assign]
    return held.free.set


def slow_disk(
    rank: int, run_dir: Path, slow_rank: int
) -> tuple[list[int], list[str], list[tuple[int, str]], list[int]]:
    """Saves due at steps 4, 8, ... 24; that of 8 is being written until after step 17."""
    config = tiny_config("cnn", checkpoint__every_ticks=2, checkpoint__keep=9, control__timeout_s=4.0)
    engine = make_engine(config, run_dir)
    engine.begin(None)
    release = slow_on(slow_rank, engine, 8, 17)
    try:
        train_on(engine)
        engine.saves.finish(engine.state)
    finally:
        release()
    engine.world.close()
    sink = events(engine)
    rewraps = [(event.step, event.cause) for event in sink.of(Rewrapped)]
    saved = [event.saved_step for event in sink.of(CheckpointSaved)]
    return engine.saver.store.steps(), [fault.what for fault in sink.of(Fault)], rewraps, saved


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_save_that_is_due_while_one_is_being_written_is_left_out_on_all_ranks(ranks: int, tmp_path: Path) -> None:
    results = [slow_disk(0, tmp_path, 0)] if ranks == 1 else run_distributed(slow_disk, 2, tmp_path, 1)
    for steps, faults, rewraps, _ in results:
        assert steps == [24, 20, 8, 4]
        assert len(faults) == 2
        for fault, step in zip(faults, (12, 16), strict=True):
            assert f"save of step {step} left out: that of step 8 is still being written" in fault
        assert rewraps == [(step, "save") for step in (4, 8, 20, 24)]
    assert results[0][3] == [4, 8, 20, 24]
    store = CheckpointStore(tmp_path / "checkpoints", attempt=1, keep=9)
    for step in store.steps():
        assert set(store.verify(step).files) == {"state.pt", *(rank_file(rank) for rank in range(ranks))}
    assert savers() == []
