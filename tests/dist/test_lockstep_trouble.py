"""Trouble that a run survives, or ends from, alike on every rank: failed births, non-finite losses and seeds.

One rank alone is hit (rank 1, unless said otherwise); what follows is agreed. All scripts run in one launch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.config.tree import EsperConfig
from esper.kasmina.blueprints import blueprint
from esper.leyline.commands import Command
from esper.leyline.events import BirthVetoed, Fault, StageChanged, StepSkipped
from esper.leyline.stages import Op
from esper.leyline.topology import Topology
from esper.tolaria.training.engine import Engine
from tests.support.dist import DEVICES, run_distributed
from tests.support.small_runs import Commands, Outcome, Script, before, play, play_all
from tests.support.tiny import bits, tiny_config

A, B = "r0c0", "r1c0"
armed: list[Callable[[nn.Module], None]] = []  # what befalls the next brittle seed in this process


def register_brittle() -> None:
    @blueprint("brittle", topology=Topology.FEATURE_MAP, parameters=lambda dim: dim, flops=lambda dim, positions: 0)
    class Brittle(nn.Module):
        """A scale per channel; its constructor does what a test has armed it with."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((dim, 1, 1), 0.1))
            for act in armed:
                act(self)

        def forward(self, x_BCHW: Tensor) -> Tensor:
            return x_BCHW * self.scale


def grow(slot: str, name: str, *, at: int, ticks: int = 1) -> dict[int, list[Command]]:
    """GERMINATE at one tick, TRAINING two later, BLENDING two after that."""
    return {
        at: [Command(slot=slot, op=Op.GERMINATE, blueprint=name, ticks=ticks)],
        at + 2: [Command(slot=slot, op=Op.ADVANCE)],
        at + 4: [Command(slot=slot, op=Op.ADVANCE)],
    }


def lead(engine: Engine, *plans: dict[int, list[Command]]) -> None:
    if engine.world.rank == 0:
        due: dict[int, list[Command]] = {}
        for plan in plans:
            for tick, commands in plan.items():
                due.setdefault(tick, []).extend(commands)
        engine.controller = Commands(due)


# births -------------------------------------------------------------------------------------------------------------


def fail_to_build(error: Exception | None, *, rank: int) -> Script:
    """``rank`` cannot build its brittle seed (it raises, or holds Inf); another slot is planted meanwhile, and the
    same slot afterwards."""

    def act(seed: nn.Module) -> None:
        if error is not None:
            raise error
        with torch.no_grad():
            next(seed.parameters()).fill_(torch.inf)

    def script(engine: Engine) -> None:
        retry = {5: [Command(slot=A, op=Op.GERMINATE, blueprint="brittle", ticks=1)]}
        birth = {2: [Command(slot=A, op=Op.GERMINATE, blueprint="brittle", ticks=1)]}
        lead(engine, birth, retry, grow(B, "norm", at=1))
        armed.clear()
        if engine.world.rank == rank:
            before(engine, "tick", lambda: armed.append(act), at_step=4)
            before(engine, "train_step", armed.clear, at_step=6)

    return script


# losses -------------------------------------------------------------------------------------------------------------


def spoil_batches(steps: range, *, rank: int = 1) -> Script:
    """One rank's training samples are not numbers in these steps, while one seed trains and one blends."""

    def script(engine: Engine) -> None:
        lead(engine, grow(A, "conv_light", at=1, ticks=2), grow(B, "norm", at=4))
        own = engine._loss

        def loss(x: Tensor, y: Tensor, weights: Tensor, scale: float) -> Tensor:
            engine.notes[f"weights at {engine.step}"] = bits(engine.grown.model.named_parameters())
            return own(x * torch.nan if engine.world.rank == rank and engine.step in steps else x, y, weights, scale)

        engine._loss = loss

    return script


# seeds --------------------------------------------------------------------------------------------------------------


def spoil_training_gradient(engine: Engine) -> None:
    """One rank's gradient of a TRAINING seed is not a number."""
    lead(engine, {tick: [c for c in plan if tick < 5] for tick, plan in grow(A, "conv_light", at=1).items()})

    def spoil() -> None:
        seed = engine.grown.slots[A].seed
        assert seed is not None
        next(seed.parameters()).register_hook(lambda gradient: gradient * torch.nan)

    if engine.world.rank == 1:
        before(engine, "train_step", spoil, at_step=9)


def spoil_training_weights(engine: Engine) -> None:
    """A TRAINING seed blows up on all ranks."""
    lead(engine, {tick: [c for c in plan if tick < 5] for tick, plan in grow(A, "conv_light", at=1).items()})

    def spoil() -> None:
        seed = engine.grown.slots[A].seed
        assert seed is not None
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.fill_(torch.inf)

    before(engine, "train_step", spoil, at_step=9)


def spoil_blending_output(engine: Engine) -> None:
    """A BLENDING seed gives NaN for one rank's training samples; an older one blends too."""
    lead(engine, grow(A, "conv_light", at=1, ticks=2), grow(B, "norm", at=2))

    def spoil() -> None:
        seed = engine.grown.slots[B].seed
        assert seed is not None
        seed.register_forward_hook(
            lambda module, args, output: output * torch.nan if torch.is_grad_enabled() else output
        )

    if engine.world.rank == 1:
        before(engine, "train_step", spoil, at_step=17)


SCRIPTS: dict[str, Script] = {
    "no seeds": lambda engine: None,
    "build fails": fail_to_build(RuntimeError("no kernel for this device"), rank=1),
    "build fails on rank 0": fail_to_build(ValueError("odd"), rank=0),
    "out of memory": fail_to_build(torch.OutOfMemoryError("CUDA out of memory"), rank=1),
    "host out of memory": fail_to_build(MemoryError(), rank=1),
    "not finite at birth": fail_to_build(None, rank=1),
    "one bad batch": spoil_batches(range(15, 16)),
    "bad batches": spoil_batches(range(15, 100)),
    "bad batches on rank 0": spoil_batches(range(15, 100), rank=0),
    "training seed, gradient": spoil_training_gradient,
    "training seed, weights": spoil_training_weights,
    "blending seed": spoil_blending_output,
}
RANKS = 2


def config(device: str, **settings: Any) -> EsperConfig:
    return tiny_config(
        "cnn",
        trainer__steps=26,
        trainer__max_skips=2,
        trainer__max_consecutive=7,
        control__digest_every=2,
        control__timeout_s=10.0,
        world__device=device,
        governor__enabled=False,
        **{"control__every": 2, **settings},
    )


def play_trouble(rank: int, run: EsperConfig, run_dir: Path) -> dict[str, Outcome]:
    register_brittle()
    return play_all(run, run_dir, SCRIPTS)


@pytest.fixture(scope="module", params=DEVICES)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    return run_distributed(
        play_trouble,
        RANKS,
        config(request.param),
        tmp_path_factory.mktemp("trouble"),
        groups=len(SCRIPTS),
        device=request.param,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_ends_alike_on_every_rank(name: str, outcomes: list[dict[str, Outcome]]) -> None:
    mine, *others = (found[name] for found in outcomes)
    for other in others:
        assert (other.error, other.text, other.step, other.tick) == (mine.error, mine.text, mine.step, mine.tick)
        assert other.weights == mine.weights
        assert other.notes == mine.notes
        for kind in (BirthVetoed, StageChanged, StepSkipped):
            assert [str(event) for event in other.of(kind)] == [str(event) for event in mine.of(kind)]
    if not name.startswith("bad batches"):
        assert (mine.error, mine.step, mine.tick >= 13) == ("", 26, True)


@pytest.mark.parametrize(
    ("name", "rank", "reason", "words"),
    [
        ("build fails", 1, "BUILD_FAILED", "RuntimeError: no kernel for this device"),
        ("build fails on rank 0", 0, "BUILD_FAILED", "ValueError"),
        ("out of memory", 1, "OUT_OF_MEMORY", "OutOfMemoryError: CUDA out of memory"),
        ("host out of memory", 1, "OUT_OF_MEMORY", "MemoryError"),
        ("not finite at birth", 1, "NONFINITE_AT_BIRTH", "brittle is not finite at birth"),
    ],
)
def test_a_seed_that_one_rank_cannot_hold_is_discarded_on_all(
    name: str, rank: int, reason: str, words: str, outcomes: list[dict[str, Outcome]]
) -> None:
    for other, found in enumerate(outcomes):
        outcome = found[name]
        [veto] = outcome.of(BirthVetoed)
        assert (veto.slot, veto.blueprint, veto.rank, veto.reason, veto.tick) == (A, "brittle", rank, reason, 3)
        why = [fault.what for fault in outcome.of(Fault)]
        assert len(why) == (1 if other == rank else 0), "the rank itself says why, in words"
        assert all(words in what for what in why)
        # The neighbour's birth went on, and the same blueprint was planted in the same slot at the second attempt.
        assert stages(outcome, B) == [(2, "GERMINATED"), (3, "TRAINING"), (5, "BLENDING")]
        assert stages(outcome, A) == [(6, "GERMINATED")]
        assert any(weight.startswith(f"esper_slots.{A}.seed") for weight in outcome.weights)


def stages(outcome: Outcome, slot: str) -> list[tuple[int, str]]:
    return [(event.tick, event.target.name) for event in outcome.of(StageChanged) if event.slot == slot]


def quarantined(outcome: Outcome) -> list[tuple[int, int, str, str]]:
    changes = [event for event in outcome.of(StageChanged) if event.cause == "QUARANTINE"]
    return [(event.tick, event.step, event.slot, event.source.name) for event in changes]


def host(outcome: Outcome) -> dict[str, str]:
    return {name: digest for name, digest in outcome.weights.items() if not name.startswith("esper_slots.")}


def test_a_loss_that_is_not_finite_skips_the_step_on_all_and_blames_no_seed(outcomes: list[dict[str, Outcome]]) -> None:
    outcome = outcomes[0]["one bad batch"]
    [skipped] = outcome.of(StepSkipped)
    assert (skipped.count, skipped.ranks, skipped.first_step, skipped.tick) == (1, (1,), 15, 8)
    weights = {step: outcome.notes[f"weights at {step}"] for step in (14, 15, 16, 17)}
    seeds = [slot for slot in (A, B) if any(name.startswith(f"esper_slots.{slot}.") for name in weights[15])]
    assert seeds == [A, B], "both seeds were alive"
    assert weights[15] == weights[16], "the step was skipped, for the seeds too"
    assert weights[14] != weights[15]
    assert weights[16] != weights[17]
    assert quarantined(outcome) == []
    assert stages(outcome, A)[-1] == (5, "BLENDING")
    assert stages(outcome, B)[-1] == (8, "BLENDING")


@pytest.mark.parametrize(("name", "rank"), [("bad batches", 1), ("bad batches on rank 0", 0)])
def test_many_skipped_steps_in_a_row_end_the_run_and_name_the_rank(
    name: str, rank: int, outcomes: list[dict[str, Outcome]]
) -> None:
    outcome = outcomes[0][name]
    assert outcome.error == "DivergedError"
    assert outcome.text.startswith("diverged: 7 optimizer steps in a row had a non-finite host gradient")
    assert f"the loss was not finite on rank {rank};" in outcome.text
    assert outcome.step == 15 + 7
    skips = outcome.of(StepSkipped)
    assert {event.ranks for event in skips} == {(rank,)}
    assert sum(event.count for event in skips) == 7
    # After max_skips = 2 in a row a tick comes at once, out of turn, and the newest blending seed goes; then the other.
    assert quarantined(outcome) == [(9, 17, B, "BLENDING"), (10, 19, A, "BLENDING")]
    skipped_at = [outcome.notes[f"weights at {step}"] for step in (15, 16)]
    assert skipped_at[0] == skipped_at[1]


@pytest.mark.parametrize("name", ["training seed, gradient", "training seed, weights"])
def test_a_broken_training_seed_leaves_the_host_untouched(name: str, outcomes: list[dict[str, Outcome]]) -> None:
    outcome = outcomes[0][name]
    assert quarantined(outcome) == [(5, 10, A, "TRAINING")]
    assert outcome.of(StepSkipped) == []
    assert host(outcome) == host(outcomes[0]["no seeds"])
    assert host(outcome) == outcome.weights, "nothing of the seed is left"


def test_a_broken_blending_seed_is_pruned_at_a_tick_out_of_turn(outcomes: list[dict[str, Outcome]]) -> None:
    outcome = outcomes[0]["blending seed"]
    assert stages(outcome, B)[:3] == [(3, "GERMINATED"), (4, "TRAINING"), (6, "BLENDING")]
    # Broken from step 17 on: a tick at 18, as usual; at 19, after two skipped steps in a row, one at once.
    assert [(event.tick, event.step, event.count, event.ranks) for event in outcome.of(StepSkipped)] == [
        (9, 18, 1, (1,)),
        (10, 19, 1, (1,)),
    ]
    assert quarantined(outcome) == [(10, 19, B, "BLENDING")]
    assert stages(outcome, A)[-1] == (5, "BLENDING"), "the older seed lives on"
    assert host(outcome) != host(outcomes[0]["no seeds"])


# judged on the device -----------------------------------------------------------------------------------------------

LATE = ("no seeds", "one bad batch", "bad batches", "training seed, gradient", "blending seed")
SELDOM = "bad batches, ticks eight steps apart"


def play_late(rank: int, run: EsperConfig, run_dir: Path) -> dict[str, Outcome]:
    found = play_all(run, run_dir, {name: SCRIPTS[name] for name in LATE})
    seldom = config("cpu", optim__fused=True, control__every=8)
    return {**found, SELDOM: play(seldom, run_dir / "seldom", SCRIPTS["bad batches"], group=len(LATE))}


@pytest.fixture(scope="module")
def late_outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    run = config("cpu", optim__fused=True)
    return run_distributed(play_late, RANKS, run, tmp_path_factory.mktemp("late"), groups=len(LATE) + 1)


@pytest.mark.parametrize("name", [*LATE, SELDOM])
def test_judged_on_the_device_it_ends_alike_on_every_rank(name: str, late_outcomes: list[dict[str, Outcome]]) -> None:
    mine, other = (found[name] for found in late_outcomes)
    assert (other.error, other.text, other.step, other.tick) == (mine.error, mine.text, mine.step, mine.tick)
    assert (other.weights, other.notes) == (mine.weights, mine.notes)
    for kind in (StageChanged, StepSkipped):
        assert [str(event) for event in other.of(kind)] == [str(event) for event in mine.of(kind)]


def test_judged_on_the_device_what_is_broken_is_left_out_as_ever(late_outcomes: list[dict[str, Outcome]]) -> None:
    found = late_outcomes[0]
    once = found["one bad batch"]
    [skipped] = once.of(StepSkipped)
    assert (skipped.count, skipped.ranks, skipped.first_step, skipped.tick) == (1, (1,), 15, 8)
    assert once.notes["weights at 15"] == once.notes["weights at 16"]
    assert once.notes["weights at 16"] != once.notes["weights at 17"]
    broken = found["training seed, gradient"]
    assert quarantined(broken) == [(5, 10, A, "TRAINING")]
    assert broken.of(StepSkipped) == []
    assert host(broken) == host(found["no seeds"]) == broken.weights
    assert quarantined(found["blending seed"])[0][2:] == (B, "BLENDING")


def test_judged_on_the_device_a_row_of_skipped_steps_is_seen_one_step_later(
    late_outcomes: list[dict[str, Outcome]],
) -> None:
    """Steps from 15 on are skipped. Two in a row since the last tick bring one at once, when the second is known."""
    row = late_outcomes[0][SELDOM]
    assert [(event.step, event.count) for event in row.of(StepSkipped)] == [(16, 1), (18, 2), (20, 2), (22, 2)]
    assert (row.error, row.step) == ("DivergedError", 22)
    assert row.text.startswith("diverged: 7 optimizer steps in a row had a non-finite host gradient")
