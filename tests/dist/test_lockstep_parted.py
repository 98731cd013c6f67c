"""Ranks that have parted: every rank ends with the same error, which names tick, step, slot, field and rank.

Three ranks, so that the odd one out is a matter of majority. Each script breaks one thing on rank 1 (the controller's
on rank 0) while a seed is on its ramp; all scripts run in one launch.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.config.tree import EsperConfig
from esper.leyline.alpha import Operator
from esper.leyline.stages import Stage
from esper.tolaria.training.engine import Engine
from tests.support.dist import DEVICES, run_distributed
from tests.support.small_runs import Outcome, Script, before, play_all
from tests.support.tiny import act, schedule, tiny_config

A = "r0c0"
STEP, TICK = 14, 7  # a tick in which only live seeds are digested; the next full digest is at tick 9


def on_rank(rank: int, breaking: Any, *, method: str = "tick") -> Script:
    """``breaking(engine)`` on one rank, just before the tick (or the step) at STEP."""

    def script(engine: Engine) -> None:
        if engine.world.rank == rank:
            before(engine, method, lambda: breaking(engine), at_step=STEP)

    return script


def forge_record(engine: Engine, **changes: Any) -> None:
    engine.state = engine.state.with_slots({A: replace(engine.state.slot(A), **changes)})


def forge_ramp(engine: Engine) -> None:
    ramp = engine.state.slot(A).ramp
    assert ramp is not None
    forge_record(engine, ramp=replace(ramp, first_step=ramp.first_step + 1, last_step=ramp.last_step + 1))


def late_ramp(engine: Engine) -> None:
    own = engine.growth.set_alphas
    engine.growth.set_alphas = lambda state, step: own(state, max(0, step - 1))


def forge_alpha(engine: Engine) -> None:
    engine.grown.slots[A].alpha.fill_(0.5)


def forge_level(engine: Engine) -> None:
    engine.grown.slots[A]._level += 1e-9


def forge_seed(engine: Engine) -> None:
    with torch.no_grad():
        next(iter(engine.grown.slots[A].seed.parameters())).view(-1)[0].mul_(1.0 + 1e-6)


def forge_gate(engine: Engine) -> None:
    gate = engine.grown.slots[A].gate
    assert gate is not None
    with torch.no_grad():
        gate.get_parameter("outer.bias").mul_(1.0 + 1e-6)


def forge_operator(engine: Engine) -> None:
    engine.grown.slots[A].fades_from = Operator.ADD


def forge_host(engine: Engine) -> None:
    with torch.no_grad():
        engine.grown.model.get_parameter("head.bias")[0] += 1e-6


def lose_an_update(engine: Engine) -> None:
    own = engine.owner.optimizer.step

    def nothing(*args: Any, **kwargs: Any) -> None:
        engine.owner.optimizer.step = own

    engine.owner.optimizer.step = nothing


def count(by: int) -> Any:
    def miscount(engine: Engine) -> None:
        engine.step += by

    return miscount


def miscount_tick(engine: Engine) -> None:
    engine.state = replace(engine.state, tick=engine.state.tick + 1)


def forge_registry(engine: Engine) -> None:
    engine.lockstep.registry ^= 1


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("out of luck\nand more lines")


def break_measure(engine: Engine) -> None:
    engine.evaluator.part_sums = refuse


def break_probe(engine: Engine) -> None:
    engine.evaluator.probe_sums = refuse


def break_controller(engine: Engine) -> None:
    engine.controller.decide = refuse


PARTED = f"ranks parted before tick {TICK}, step {STEP}: "
RECORD = f"state differs on rank 1; slot {A} record differs on rank 1"
CLOCK = "step differs on rank 1; state differs on rank 1"  # the records of the slots are the same
PROBE = "rank {} failed in MEASURE: RuntimeError: out of luck"

# name -> (script, the error's text on every rank)
FAULTS: dict[str, tuple[Script, str]] = {
    "forged stage": (on_rank(1, lambda engine: forge_record(engine, stage=Stage.HOLDING)), PARTED + RECORD),
    "forged generation": (on_rank(1, lambda engine: forge_record(engine, generation=9)), PARTED + RECORD),
    "forged ramp": (on_rank(1, forge_ramp), PARTED + RECORD),
    "ramp one step late": (
        on_rank(1, late_ramp, method="train_step"),
        f"ranks parted before tick 8, step 16: slot {A} alpha differs on rank 1",
    ),
    "forged alpha": (on_rank(1, forge_alpha), PARTED + f"slot {A} alpha differs on rank 1"),
    "forged level": (on_rank(1, forge_level), PARTED + f"slot {A} alpha differs on rank 1"),
    "forged seed weight": (
        on_rank(1, forge_seed),
        PARTED + f"slot {A} weights differs on rank 1; what differs: seed.norm.weight (slot {A})",
    ),
    "forged gate weight": (
        on_rank(1, forge_gate),
        PARTED + f"slot {A} weights differs on rank 1; what differs: gate.outer.bias (slot {A})",
    ),
    "forged operator": (on_rank(1, forge_operator), PARTED + f"slot {A} alpha differs on rank 1"),
    "forged host weight": (
        on_rank(1, forge_host),
        "ranks parted before tick 9, step 18: parameters differs on rank 1; what differs: head.bias (host)",
    ),
    "lost update": (
        on_rank(1, lose_an_update, method="train_step"),
        f"ranks parted before tick 8, step 16: slot {A} weights differs on rank 1; what differs: seed.norm.weight "
        f"(slot {A}), seed.norm.bias (slot {A}), seed.conv.weight (slot {A}) and 6 more",
    ),
    "step counted twice": (on_rank(1, count(1)), PARTED + CLOCK),
    "step not counted": (on_rank(1, count(-1)), PARTED + CLOCK),
    "tick counted twice": (on_rank(1, miscount_tick), PARTED + "tick differs on rank 1; " + RECORD),
    "forged registry": (on_rank(1, forge_registry), PARTED + "registry differs on rank 1"),
    "exception in measure": (
        on_rank(1, break_measure),
        f"tick {TICK}, step {STEP}: rank 1 failed in MEASURE: RuntimeError: out of luck",
    ),
    "exception in a probe": (
        lambda engine: break_probe(engine) if engine.world.rank > 0 else None,
        f"tick 4, step 8: {PROBE.format(1)}; {PROBE.format(2)}",
    ),
    "exception in the controller": (
        on_rank(0, break_controller),
        f"tick {TICK}, step {STEP}: rank 0 failed in DECIDE: RuntimeError: out of luck",
    ),
    "no fault": (lambda engine: None, ""),
}


def config(device: str) -> EsperConfig:
    life = schedule(
        act(1, A, "GERMINATE", blueprint="conv_light", operator="GATE", ticks=6, curve="LINEAR"),
        act(3, A, "ADVANCE"),
        act(5, A, "ADVANCE"),
    )
    return tiny_config(
        "cnn",
        trainer__steps=22,
        trainer__batch=9,
        controller=life,
        control__digest_every=3,
        control__timeout_s=10.0,
        world__device=device,
    )


def play_faults(rank: int, run: EsperConfig, run_dir: Path) -> dict[str, Outcome]:
    return play_all(run, run_dir, {name: script for name, (script, _) in FAULTS.items()})


@pytest.fixture(scope="module", params=DEVICES)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Outcome]]:
    return run_distributed(
        play_faults,
        3,
        config(request.param),
        tmp_path_factory.mktemp("parted"),
        groups=len(FAULTS),
        device=request.param,
    )


@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_ends_with_the_same_named_outcome(name: str, outcomes: list[dict[str, Outcome]]) -> None:
    text = FAULTS[name][1]
    for rank, found in enumerate(outcomes):
        outcome = found[name]
        assert (outcome.error, outcome.text) == (("LockstepError" if text else ""), text), f"rank {rank}"
        if not text:
            assert (outcome.step, outcome.tick) == (22, 11)
            assert outcome.weights == outcomes[0][name].weights
