"""Births through the library on two ranks: the bits of direct births, at the same ticks; one rank's trouble is agreed.

Every scenario is a run of its own, all in one launch. Libraries may be a folder of each rank's own, as on the nodes of
a cluster, so that one rank's can be damaged.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.config.tree import EsperConfig
from esper.kasmina.births import Birth, LibraryConfig, Order
from esper.kasmina.blueprints import blueprint
from esper.leyline.commands import Command
from esper.leyline.events import BirthVetoed, Fault, LibraryUsed, StageChanged
from esper.leyline.stages import Op
from esper.leyline.topology import Topology
from esper.tolaria.training.engine import Engine
from tests.support.dist import run_distributed, use_group
from tests.support.small_runs import Commands, Outcome, before, play, train_on
from tests.support.tiny import make_engine, replica, tiny_config

A, B = "r0c0", "r1c0"
go_on = threading.Event()


class Vast(nn.Module):
    """A build so large that the test decides when it is done."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim, 1, 1))
        nn.init.orthogonal_(self.weight)
        while self.weight.device.type != "meta" and not go_on.wait(0.01):
            nn.init.orthogonal_(self.weight)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x_BCHW, self.weight)


def config(**library: Any) -> EsperConfig:
    return tiny_config(
        "cnn",
        trainer__steps=20,
        control__every=2,
        control__digest_every=1,
        control__stage_ticks=3,
        control__timeout_s=60.0,
        **{f"library__{name}": value for name, value in {"wait_s": 30.0, "when_idle": False, **library}.items()},
    )


def lead(engine: Engine, due: dict[int, list[Command]] | None = None) -> None:
    """Two seeds, the second while the first one lives."""
    due = due or {
        1: [Command(slot=A, op=Op.GERMINATE, blueprint="conv_light", ticks=1)],
        3: [Command(slot=A, op=Op.ADVANCE), Command(slot=B, op=Op.GERMINATE, blueprint="bottleneck", ticks=1)],
        5: [Command(slot=A, op=Op.ADVANCE), Command(slot=B, op=Op.ADVANCE)],
    }
    if engine.world.rank == 0:
        engine.controller = Commands(due)


def flip_content_of(name: str, root: Path) -> None:
    """Damages one blueprint's content on disk."""
    for index in (root / "index").iterdir():
        if f'"blueprint": "{name}"' in index.read_text():
            content = index.read_text().split('"content": "')[1][:64]
            path = root / "seeds" / f"{content}.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)


def hold_up(ticket: list[Any], *, release_at: int | None) -> Callable[[Engine], None]:
    """Rank 1's thread is busy with a vast build from before the birth of A on, until a tick, or to the end."""

    def script(engine: Engine) -> None:
        lead(engine, {2: [Command(slot=A, op=Op.GERMINATE, blueprint="conv_light", ticks=1)]})
        go_on.clear()
        if engine.world.rank != 1:
            return
        library = engine.growth.library
        assert library is not None
        vast = Birth.of("vast", dim=4, topology=Topology.FEATURE_MAP, dtype=torch.float32, key=0)
        ticket.append(library.begin(Order(birth=vast, device=torch.device("cpu"))))

        def release() -> None:
            go_on.set()
            assert ticket[-1].wait(60)
            assert engine.growth.waiting[A].ticket.wait(60)

        if release_at is not None:
            before(engine, "tick", release, at_step=2 * release_at)
        else:
            own = engine.growth.close
            engine.growth.close = lambda: (go_on.set(), own())  # type: ignore[method-assign, assignment]

    return script


def play_scenarios(rank: int, run_dir: Path) -> dict[str, Outcome]:
    blueprint("vast", topology=Topology.FEATURE_MAP, parameters=lambda dim: dim * dim, flops=lambda dim, positions: 0)(
        Vast
    )
    own = run_dir / f"node-{rank}"
    found: dict[str, Outcome] = {}

    def scenario(name: str, script: Callable[[Engine], None], **library: Any) -> None:
        found[name] = play(config(**library), run_dir / name, script, group=len(found))
        found[name].notes["threads"] = [thread.name for thread in threading.enumerate()]

    scenario("direct", lead)
    scenario("library", lead, enabled=True)
    scenario("inline", lead, enabled=True, background=False)
    scenario("own library", lead, enabled=True, root=str(own))
    scenario("pinned", lead, enabled=True, require=True, root=str(own))
    scenario("missing", lead, enabled=True, require=True, root=str(own) if rank == 0 else f"{own}-empty")
    scenario("slow", hold_up([], release_at=5), enabled=True, wait_s=0.05)
    scenario("too slow", hold_up([], release_at=None), enabled=True, wait_s=0.05)
    if rank == 1:
        flip_content_of("conv_light", own)
    scenario("damaged", lead, enabled=True, root=str(own))
    return found


SCENARIOS = 9


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    return run_distributed(play_scenarios, 2, tmp_path_factory.mktemp("library"), groups=SCENARIOS)


def stages(outcome: Outcome, slot: str) -> list[tuple[int, str]]:
    return [(event.tick, event.target.name) for event in outcome.of(StageChanged) if event.slot == slot]


def test_every_scenario_ends_alike_on_both_ranks_and_leaves_no_thread(outcomes: list[dict[str, Outcome]]) -> None:
    assert len(outcomes[0]) == SCENARIOS
    for name in outcomes[0]:
        mine, other = outcomes[0][name], outcomes[1][name]
        assert (mine.error, other.error, mine.step, other.step) == ("", "", 20, 20), name
        assert mine.weights == other.weights
        assert [str(event) for event in mine.of(BirthVetoed)] == [str(event) for event in other.of(BirthVetoed)]
        for outcome in (mine, other):
            assert "esper-library" not in outcome.notes["threads"]


@pytest.mark.parametrize("name", ["library", "inline", "own library", "pinned"])
def test_births_are_those_of_direct_births_bit_for_bit_and_tick_for_tick(
    name: str, outcomes: list[dict[str, Outcome]]
) -> None:
    direct, outcome = outcomes[0]["direct"], outcomes[0][name]
    assert outcome.weights == direct.weights
    assert any(weight.startswith(f"esper_slots.{B}.") for weight in direct.weights)
    for slot in (A, B):
        assert stages(outcome, slot) == stages(direct, slot)
    assert stages(outcome, A) == [(2, "GERMINATED"), (3, "TRAINING"), (5, "BLENDING")]
    assert not direct.of(LibraryUsed)


def test_figures_tell_where_each_seed_was_found(outcomes: list[dict[str, Outcome]]) -> None:
    def sums(name: str, rank: int) -> dict[str, int]:
        events = outcomes[rank][name].of(LibraryUsed)
        return {key: sum(getattr(event, key) for event in events) for key in ("births", "built", "disk_hits", "failed")}

    for rank in (0, 1):
        assert sums("own library", rank) == {"births": 2, "built": 2, "disk_hits": 0, "failed": 0}
        assert sums("pinned", rank) == {"births": 2, "built": 0, "disk_hits": 2, "failed": 0}
    shared = [sums("library", rank) for rank in (0, 1)]
    assert all(found["built"] + found["disk_hits"] == 2 for found in shared), "who comes second may find it"


@pytest.mark.parametrize(
    ("name", "slots", "reason", "words"),
    [
        ("damaged", [A], "LIBRARY_DAMAGED", "the file is damaged"),
        ("missing", [A, B], "LIBRARY_MISSING", "no entry for"),
    ],
)
def test_an_entry_that_one_rank_lacks_fails_the_birth_on_all_with_rank_and_reason(
    name: str, slots: list[str], reason: str, words: str, outcomes: list[dict[str, Outcome]]
) -> None:
    for rank, found in enumerate(outcomes):
        outcome = found[name]
        vetoes = outcome.of(BirthVetoed)
        assert [(veto.slot, veto.rank, veto.reason) for veto in vetoes] == [(slot, 1, reason) for slot in slots]
        why = [fault.what for fault in outcome.of(Fault)]
        assert len(why) == (len(slots) if rank == 1 else 0)
        assert all(words in what for what in why)
        assert stages(outcome, A) == [], "nothing of it happened"
        assert [slot for slot in (A, B) if any(w.startswith(f"esper_slots.{slot}.") for w in outcome.weights)] == (
            [B] if slots == [A] else []
        )


def test_a_rank_that_is_not_ready_keeps_the_seed_staged_on_all_until_it_is(outcomes: list[dict[str, Outcome]]) -> None:
    for found in outcomes:
        outcome = found["slow"]
        assert outcome.of(BirthVetoed) == []
        assert stages(outcome, A) == [(5, "GERMINATED")], "ordered at 2, not ready at 3 and 4"


def test_a_rank_that_stays_not_ready_is_named_and_the_seed_is_given_up_on_all(
    outcomes: list[dict[str, Outcome]],
) -> None:
    for rank, found in enumerate(outcomes):
        outcome = found["too slow"]
        assert [(veto.tick, veto.rank, veto.reason) for veto in outcome.of(BirthVetoed)] == [
            (5, 1, "NOT_READY after 3 ticks")
        ]
        assert stages(outcome, A) == []
        assert [("still being built" in fault.what) for fault in outcome.of(Fault)] == [True] * rank


def resumed(rank: int, run_dir: Path) -> tuple[Any, Any, bool, int]:
    """A run saved while a birth is staged, gone on with, and begun anew from that save."""
    run = config(enabled=True)
    run.checkpoint.every_ticks, run.checkpoint.keep = 1, 20
    found = []
    for group, step in enumerate((None, 6)):
        use_group(group)
        engine = make_engine(run, run_dir, attempt=group + 1)
        engine.begin(step)
        lead(engine)
        if step is not None:
            waits, at = B in engine.growth.waiting, engine.state.tick
        train_on(engine)
        engine.saver.finish({"step": engine.step, "tick": engine.state.tick, "epoch": 1}, 60.0)
        found.append(replica(engine))
        engine.growth.close()
        engine.world.close()
    return found[0], found[1], waits, at


def test_a_staged_birth_is_ordered_again_after_a_resume(tmp_path: Path) -> None:
    for whole, again, waits, tick in run_distributed(resumed, 2, tmp_path, groups=2):
        assert (waits, tick) == (True, 3)
        assert again == whole


def test_default_is_off() -> None:
    assert LibraryConfig().enabled is False
