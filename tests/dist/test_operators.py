"""Lives under every operator on several ranks: one network after every tick, that of one rank, resumed to the bit.

Three slots at once: MULTIPLY that becomes GATE mid-life, GATE that becomes ADD and then MULTIPLY, CONFIDENCE that
becomes CHANNEL; a TRAINING seed beside them, whose shadow forwards must not be counted. Batches are ragged over
ranks and accumulation windows, so that stand-ins occur, which must not be counted either.
"""

import math
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.config.tree import EsperConfig
from esper.kasmina.slots.slot import SeedSlot
from esper.leyline.events import CommandRefused, RampCommitted
from esper.leyline.plain import to_plain
from esper.tolaria.training.engine import Engine
from tests.dist.test_equality import same_numbers, same_tensors
from tests.support.dist import run_distributed
from tests.support.tiny import act, events, make_engine, replica, schedule, tiny_config

A, B, C = "r0c0", "r0c1", "r1c0"
LIVES = schedule(
    act(1, A, "GERMINATE", blueprint="conv_light", operator="MULTIPLY", target=0.5, ticks=2),
    act(1, B, "GERMINATE", blueprint="norm", operator="GATE", target=0.75, ticks=3, curve="LINEAR"),
    act(1, C, "GERMINATE", blueprint="conv_light", operator="CONFIDENCE", target=0.5, ticks=2),
    *(act(3, slot, "ADVANCE") for slot in (A, B, C)),
    act(4, A, "ADVANCE"),
    act(5, B, "ADVANCE"),  # A is blended, C still in its shadow
    act(6, C, "ADVANCE"),
    act(8, A, "SET_ALPHA_TARGET", target=1.0, ticks=4, operator="GATE"),
    act(9, B, "SET_ALPHA_TARGET", target=0.5, ticks=2, operator="ADD"),
    act(10, C, "SET_ALPHA_TARGET", target=0.75, ticks=2, operator="CHANNEL"),
    act(12, B, "SET_ALPHA_TARGET", target=1.0, ticks=2, operator="MULTIPLY", curve="SIGMOID"),
    act(13, A, "ADVANCE"),
    act(13, C, "PRUNE", ticks=2),
    act(15, B, "ADVANCE"),
    act(16, A, "FOSSILIZE"),
    act(16, B, "FOSSILIZE"),
)
RAMPS = [
    (4, A, "MULTIPLY", None),
    (5, B, "GATE", None),
    (6, C, "CONFIDENCE", None),
    (8, A, "GATE", "MULTIPLY"),
    (9, B, "ADD", "GATE"),
    (10, C, "CHANNEL", "CONFIDENCE"),
    (12, B, "MULTIPLY", "ADD"),
    (13, C, "CHANNEL", None),
]
TICKS, EVERY, BATCH = 18, 2, 5
GATED = {A: range(8, 12), B: range(5, 11)}  # ticks after which the slot has a gate


def config_of() -> EsperConfig:
    return tiny_config(
        "cnn",
        controller=LIVES,
        trainer__steps=EVERY * TICKS,
        trainer__batch=BATCH,
        trainer__accumulate=2,
        trainer__precision="fp64",
        control__every=EVERY,
        control__digest_every=1,
        optim__kind="adamw",
        checkpoint__every_ticks=1,
        checkpoint__keep=100,
        slots__channels={C: "0,0.25,0.5,0.75,1,0,0.5,1"},
    )


class ByHand:
    """g_eff of one slot's training samples, from what its gate said in each forward of training, and alpha then."""

    def __init__(self, holder: SeedSlot) -> None:
        self.holder = holder
        self.found: list[float] = []
        self.weights: list[float] = []

    def heard(self, module: Any, args: Any, g: torch.Tensor) -> None:
        if torch.is_grad_enabled() and self.holder.overridden is None and self.weights:
            a = self.holder.level
            kept = [float(x) for x, w in zip(g.detach().flatten(), self.weights, strict=True) if w]
            self.found += [x + (1.0 - x) * a for x in kept]
            self.weights = []  # a shadow forward follows with the same gate and is no training


def listen(engine: Engine) -> dict[str, ByHand]:
    """Notes g of every gate, and which samples of a training forward count, as the plan of batches says."""
    ears = {slot: ByHand(holder) for slot, holder in engine.grown.slots.items()}
    forward = engine._loss

    def noted(x: Any, y: Any, weights: torch.Tensor, scale: float) -> torch.Tensor:
        for slot, ear in ears.items():
            ear.weights = weights.tolist()
            gate = engine.grown.slots[slot].gate
            if gate is not None and not gate._forward_hooks:
                gate.register_forward_hook(ear.heard)
        loss = forward(x, y, weights, scale)
        for ear in ears.values():
            ear.weights = []
        return loss

    engine._loss = noted  # type: ignore[method-assign]
    return ears


def live(rank: int, config: EsperConfig, run_dir: Path, resume: int | None) -> dict[str, Any]:
    engine = make_engine(config, run_dir, attempt=1 if resume is None else 2)
    engine.begin(resume)
    ears = listen(engine)
    ticks: dict[int, Any] = {}
    numbers: dict[int, Any] = {}
    heard: dict[int, dict[str, list[float]]] = defaultdict(dict)
    while engine.step < engine.terms.total_steps:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
            tick = engine.state.tick
            ticks[tick] = replica(engine)
            for slot, ear in ears.items():
                heard[tick][slot], ear.found = ear.found, []
            tensors = {name: t.detach().clone() for name, t in engine.grown.model.state_dict().items()}
            numbers[tick] = (tensors, to_plain(engine.state))
    engine.finish()
    sink = events(engine)
    return {
        "ticks": ticks,
        "numbers": numbers,
        "heard": dict(heard),
        "refused": [event.reason for event in sink.of(CommandRefused)],
        "ramps": [(e.tick, e.slot, e.operator, e.fades_from) for e in sink.of(RampCommitted)],
        "store": [engine.saver.store.load(step, "state.pt") for step in engine.saver.store.steps()],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The run on two ranks, its folder and what each rank saw."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_dir.mkdir()
    return run_dir, run_distributed(live, 2, config_of(), run_dir, None)


def test_after_every_tick_both_ranks_are_one_network(whole: tuple[Path, list[Any]]) -> None:
    first, second = whole[1]
    assert first["refused"] == []
    assert first["ramps"] == RAMPS
    assert len(first["ticks"]) == TICKS
    for tick in first["ticks"]:
        for what, mine in first["ticks"][tick].items():
            assert mine == second["ticks"][tick][what], f"tick {tick}: {what} differs"
        gates = {name.split(".")[1] for name in first["ticks"][tick]["parameters"] if ".gate." in name}
        assert gates == {slot for slot, ticks in GATED.items() if tick in ticks}, tick
        moments = {name.split(".")[1] for name in first["ticks"][tick]["moments"] if ".gate." in name}
        assert moments <= gates
    weights = [first["ticks"][tick]["parameters"][f"esper_slots.{A}.gate.inner.weight"] for tick in GATED[A]]
    assert len(set(weights)) == len(GATED[A]), "the gate learns from its second step on"


def test_gate_statistics_are_those_counted_by_hand_over_both_ranks(whole: tuple[Path, list[Any]]) -> None:
    first, second = whole[1]
    seen = 0
    for tick, (_, state) in first["numbers"].items():
        for entry in state["slots"]:
            g = first["heard"][tick][entry["slot"]] + second["heard"][tick][entry["slot"]]
            if not g:
                continue
            seen += 1
            mean = math.fsum(g) / len(g)
            assert len(g) == entry["gate_mean"]["n"] == EVERY * BATCH, "each sample once, no stand-in, no shadow"
            assert entry["gate_mean"]["value"] == pytest.approx(mean, rel=1e-6)  # alpha is a float32
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in g) / (len(g) - 1))
            assert entry["gate_std"]["value"] == pytest.approx(deviation, rel=1e-5)
    assert seen == sum(map(len, GATED.values()))
    confidence = {tick: state["slots"][2]["gate_mean"] for tick, (_, state) in first["numbers"].items()}
    assert [tick for tick, reading in confidence.items() if reading["value"] is not None] == list(range(7, 13))
    assert all(confidence[tick]["n"] == EVERY * BATCH for tick in range(7, 13))


def test_two_ranks_train_what_one_rank_trains(whole: tuple[Path, list[Any]], tmp_path: Path) -> None:
    (alone,) = run_distributed(live, 1, config_of(), tmp_path, None)
    found = whole[1][0]
    assert alone["ramps"] == found["ramps"]
    for tick, (tensors, state) in alone["numbers"].items():
        same_tensors(found["numbers"][tick][0], tensors)
        other = found["numbers"][tick][1]
        assert other["flops"] >= state["flops"], "what both ranks repeat is charged twice"
        same_numbers(other | {"flops": state["flops"]}, state, f"tick {tick}")


def test_a_checkpoint_holds_a_gate_exactly_while_it_lives(whole: tuple[Path, list[Any]]) -> None:
    saved = whole[1][0]["store"]
    assert {payload["run_state"]["tick"] for payload in saved} == set(range(1, TICKS + 1))
    for payload in saved:
        tick = payload["run_state"]["tick"]
        for part in ("model", "optimizer"):
            gates = {name.split(".")[1] for name in payload[part] if ".gate." in name}
            assert gates == {slot for slot, ticks in GATED.items() if tick in ticks}, (tick, part)
        assert not any("alpha" in name or "fade" in name or "channels" in name for name in payload["model"])


# In the middle of GATE's first ramp and of two cross-fades; on the last step of A's ramp; while CONFIDENCE is blended.
@pytest.mark.parametrize("tick", [7, pytest.param(10, marks=pytest.mark.slow), 12])
def test_a_run_resumed_in_a_ramp_is_the_one_that_was_not(
    tick: int, whole: tuple[Path, list[Any]], tmp_path: Path
) -> None:
    run_dir, wanted = whole
    shutil.copytree(run_dir, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name.rpartition("-")[2].partition(".")[0]) > EVERY * tick:
            shutil.rmtree(path)
    found = run_distributed(live, 2, config_of(), tmp_path / "run", EVERY * tick)
    for rank in range(2):
        assert list(found[rank]["ticks"]) == list(range(tick + 1, TICKS + 1))
        for later, seen in found[rank]["ticks"].items():
            for what, value in seen.items():
                assert value == wanted[rank]["ticks"][later][what], f"tick {later}: {what} differs on rank {rank}"
