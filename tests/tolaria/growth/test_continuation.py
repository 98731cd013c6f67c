"""A continued copy is what the run itself would become; the run is left as it was."""

import copy
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.accord.config import GateConfig
from esper.accord.effects import Uproot
from esper.accord.evidence.continuing import steps_due
from esper.accord.evidence.lasting import COPIES, NAMES, SPENT, judge_lasting, marks_of
from esper.accord.state import Continuing, RunState
from esper.kasmina.hosts import registry
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.phases import Phase
from esper.leyline.stages import Stage
from esper.tolaria.growth.continuation import Base, Continuation, Copies, Lessons
from esper.tolaria.growth.lasting import lasting_sums
from esper.tolaria.training.engine import Engine
from tests.support.noisy_host import NoisyConfig, register_noisy
from tests.support.tiny import act, bits, make_engine, schedule, tiny_config

SLOT, FURTHER = "r0c0", 5


@pytest.fixture
def blended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Engine:
    """A run of a host with dropout and BatchNorm, one seed at full alpha, another one blending; twelve steps to go."""
    monkeypatch.setattr(registry, "HOSTS", dict(registry.HOSTS))
    register_noisy()
    births = [act(1, SLOT, "GERMINATE", blueprint="conv_light", ticks=1), act(2, "r1c0", "GERMINATE", ticks=20)]
    births[1]["blueprint"] = "conv_small"
    config = tiny_config(
        "cnn",
        host=NoisyConfig(),
        controller=schedule(*births, *(act(t, s, "ADVANCE") for t in (3, 4) for s in (SLOT, "r1c0"))),
        slots__incubation="immediate",
        trainer__steps=24,
        optim__clip_norm=0.05,
        optim__kind=getattr(request, "param", "adamw"),
    )
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    advance(engine, 12)
    assert engine.grown.slots[SLOT].level == 1.0
    assert 0 < engine.grown.slots["r1c0"].level < 1
    return engine


def advance(engine: Engine, until: int) -> None:
    while engine.step < until:
        engine.train_step()
        if engine.tick_due():
            engine.tick()


def everything(engine: Engine) -> dict[str, Any]:
    states = engine.owner.state_by_name()
    return {
        "weights": bits(engine.grown.model.state_dict().items()),
        "moments": bits((f"{n}.{k}", t) for n, entries in states.items() for k, t in entries.items()),
        "rates": [group["lr"] for group in engine.owner.optimizer.param_groups],
        "gradients": [name for name, p in engine.grown.model.named_parameters() if p.grad is not None],
        "training": [module.training for module in engine.grown.model.modules()],
        "rng": bits([("cpu", torch.get_rng_state())]),
    }


def lessons_of(engine: Engine, seed: int = 5) -> Lessons:
    """The run's own next steps, and its whole probe."""
    evaluator, task = engine.evaluator, engine.bundle.task
    first = engine.step

    def batch(further: int) -> tuple[Tensor, Tensor]:
        step = first + further
        epoch, _ = engine.plan.locate(step)
        return engine.bundle.train_batch(engine.plan.indices(step), seed=engine.settings.seed, epoch=epoch)

    def learn(grown: Grown, batch: tuple[Tensor, Tensor]) -> Tensor:
        return task.per_sample(grown.model(batch[0]), batch[1])[0]

    def judge(grown: Grown) -> Tensor:
        other, part = evaluator.of_network(grown), engine.bundle.probe
        with evaluating(grown.model):
            return other._losses(part, torch.arange(len(part)))[0]

    return Lessons(batch=batch, learn=learn, judge=judge, clusters=None, seed=seed)


def continued(engine: Engine, *, keep: bool, seed: int = 5) -> Tensor:
    """Losses at both marks of a copy in which the run takes its next steps, float64 [2, N]."""
    base = Base.take(engine.owner, engine.state, engine.step)
    course = Continuation(base, SLOT, lessons_of(engine, seed), FURTHER)
    course.advance(FURTHER if keep else 2 * FURTHER)
    return torch.stack(course.losses[0 if keep else 1])


@pytest.mark.parametrize("blended", ["adamw", "sgd"], indirect=True)
def test_the_copy_is_what_the_run_would_become_and_the_run_is_left_as_it_was(blended: Engine) -> None:
    blended.growth.set_alphas(blended.state, blended.step)
    before = everything(blended)
    kept, without = continued(blended, keep=True), continued(blended, keep=False)
    assert everything(blended) == before
    assert not torch.equal(kept[1], without[1])
    # The run itself, its alphas held and its streams seeded alike.
    torch.manual_seed(5)
    blended.growth.set_alphas = lambda *_: None  # type: ignore[method-assign]
    itself = []
    for index in range(FURTHER):
        blended.train_step()
        if index + 1 in marks_of(FURTHER):
            sums = blended.evaluator.part_sums(blended.bundle.probe)
            itself.append(sums["loss"] / sums["count"])
    assert kept.mean(1).tolist() == pytest.approx(itself, rel=1e-12)


def test_without_the_seed_it_is_the_run_whose_seed_was_pruned(blended: Engine) -> None:
    without = continued(blended, keep=False)
    blended.owner.release(SLOT)
    blended.grown.slots[SLOT].uproot()
    assert continued_same(blended) == pytest.approx(without.mean(1).tolist(), rel=1e-12)


def continued_same(engine: Engine) -> list[float]:
    losses = continued(engine, keep=True)  # nothing is left in the slot that could be kept
    return losses.mean(1).tolist()


def test_sums_and_judgement_are_the_closed_forms() -> None:
    generator = torch.Generator().manual_seed(3)
    n, help1, help2 = 400, 0.10, 0.08
    shared = torch.randn(n, generator=generator, dtype=torch.float64)
    orders = []
    for shift in (0.004, -0.004):
        without = torch.stack([shared, shared]) + 5
        kept = without - torch.tensor([[help1 + shift], [help2 - shift]], dtype=torch.float64) + 0.02 * shared
        orders.append((kept, without))
    whole = lasting_sums(orders)
    halves = [lasting_sums([(k[:, part], w[:, part]) for k, w in orders]) for part in (slice(0, 150), slice(150, n))]
    assert {name: halves[0][name] + halves[1][name] for name in NAMES} == pytest.approx(
        {name: whole[name] for name in NAMES}, rel=1e-9
    )
    found = judge_lasting(whole, tick=3, step=100, total=400, marks=(10, 20), ahead=60, se=1.64)
    assert found is not None
    d1, d2 = (sum((w - k)[m].mean().item() for k, w in orders) / 2 for m in (0, 1))
    assert (found.first, found.last) == pytest.approx((d1, d2))
    assert found.expected == pytest.approx(d2 * (d2 / d1) ** 4)
    both = torch.stack([(w - k) for k, w in orders]).mean(0)
    half = torch.tensor([0.004, -0.004], dtype=torch.float64)
    cov = torch.cov(both) / n + torch.outer(half, half)
    slope = torch.tensor([-4 / d1, 5 / d2], dtype=torch.float64)
    assert found.lower == pytest.approx(found.expected * math.exp(-1.64 * math.sqrt(slope @ cov @ slope)), rel=1e-9)


@pytest.mark.parametrize(("d1", "d2", "expected"), [(0.05, 0.06, 0.06), (-0.01, 0.02, -0.01), (0.03, -0.02, -0.02)])
def test_growing_help_is_not_extrapolated_and_harm_stays_harm(d1: float, d2: float, expected: float) -> None:
    n = 100
    sums = dict.fromkeys(NAMES, 0.0) | {"count": n, "sum1": n * d1, "sum2": n * d2}
    sums |= {"sq1": n * d1 * d1, "sq2": n * d2 * d2, "cross": n * d1 * d2}
    sums |= {"clusters": n, "size1": n * d1, "size2": n * d2, "size_sq": n}
    found = judge_lasting(sums, tick=3, step=100, total=400, marks=(10, 20), ahead=80, se=2.0)
    assert found is not None
    assert (found.expected, found.lower) == pytest.approx((expected, expected))


def test_an_error_over_clusters_is_that_of_their_means() -> None:
    generator = torch.Generator().manual_seed(4)
    means = 0.05 + 0.03 * torch.randn(40, generator=generator, dtype=torch.float64)
    d2 = means.repeat_interleave(5)
    losses = torch.zeros(2, 200, dtype=torch.float64)
    without = torch.stack([d2, d2])
    labels = torch.arange(40).repeat_interleave(5)
    sums = lasting_sums([(losses, without)] * 2, labels)
    found = judge_lasting(sums, tick=1, step=5, total=9, marks=(1, 2), ahead=2, se=1.0)
    assert found is not None
    assert found.clusters == 40
    relative = float(means.std() / math.sqrt(40) / means.mean())
    assert found.lower == pytest.approx(float(means.mean()) * math.exp(-relative), rel=1e-9)


def test_too_little_or_broken_evidence_is_none() -> None:
    sums = dict.fromkeys(NAMES, 1.0)
    ahead: dict[str, Any] = {"tick": 1, "step": 5, "total": 9, "marks": (1, 2), "ahead": 3, "se": 1.0}
    assert judge_lasting(sums, **ahead) is None
    assert judge_lasting(sums | {"clusters": 9.0, "cross": math.inf}, **ahead) is None
    losses = torch.ones(2, 5, dtype=torch.float64)
    broken = losses.clone()
    broken[1, 2] = math.nan
    assert lasting_sums([(losses, losses), (broken, losses)])["left_out"] == 1


def asked(engine: Engine) -> RunState:
    """The agreed state, in which the seed is in HOLDING and its continuation has been asked for."""
    entry = replace(engine.state.slot(SLOT), stage=Stage.HOLDING)
    wanted = Continuing(slot=SLOT, generation=entry.generation, tick=engine.state.tick)
    return replace(engine.state.with_slots({SLOT: entry}), continuing=wanted)


def take_all(engine: Engine, gates: GateConfig, state: RunState) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """All sums that this rank sends, added up, and what a checkpoint after each piece would hold."""
    total, saves = Counter[str](), []
    while state.continuing is not None and state.continuing.done < COPIES * gates.continue_steps:
        total.update(engine.evaluator.continued_sums(state, engine.owner, gates, engine.step))
        saves.append(engine.evaluator.copies.saved())
        done = steps_due(state.continuing, gates)
        state = replace(state, continuing=replace(state.continuing, done=done, step=engine.step))
    return dict(total), saves


@pytest.mark.parametrize("piece", [3, FURTHER])
def test_pieces_come_to_the_same_bits_as_the_whole_beside_a_network_that_goes_on(blended: Engine, piece: int) -> None:
    gates = GateConfig(continue_steps=FURTHER, continue_batch=6, continue_piece=4 * FURTHER)
    state, evaluator = asked(blended), blended.evaluator
    (whole, _), before = take_all(blended, gates, state), everything(blended)
    found, gates = Counter[str](), replace(gates, continue_piece=piece)
    step = blended.step
    assert state.continuing is not None
    for done in range(0, 4 * FURTHER, piece):
        if done:
            blended.train_step()
        if done == piece:
            blended.growth.perform([Uproot("r1c0")])  # what becomes of other seeds is none of its business
        now = replace(state, continuing=replace(state.continuing, done=done, step=step))
        found.update(evaluator.continued_sums(now, blended.owner, gates, blended.step))
        assert bool(evaluator.copies.saved()) == (done + piece < 4 * FURTHER)
    assert dict(found) == whole
    assert everything(blended) != before


@pytest.mark.parametrize("done", [3, 2 * FURTHER, 3 * FURTHER])
def test_taken_up_from_a_checkpoint_it_comes_to_the_same_bits(blended: Engine, done: int) -> None:
    gates = GateConfig(continue_steps=FURTHER, continue_batch=6, continue_piece=done)
    state, evaluator = asked(blended), blended.evaluator
    wanted, saves = take_all(blended, gates, state)
    first = evaluator.continued_sums(state, blended.owner, gates, blended.step)
    saved = copy.deepcopy(evaluator.copies.saved())
    assert saves[0].keys() == saved.keys()
    advance(blended, 14)
    evaluator.copies = Copies()
    evaluator.copies.rebuild(saved, blended.growth, "here")
    assert state.continuing is not None
    state = replace(state, continuing=replace(state.continuing, done=done, step=saved["step"]))
    found, (rest, _) = Counter[str](first), take_all(blended, gates, state)
    found.update(rest)
    assert dict(found) == wanted


def test_ranks_add_up_to_one_and_the_run_goes_on_as_if_nothing_had_been(blended: Engine) -> None:
    engine, gates = blended, GateConfig(continue_steps=FURTHER, continue_batch=6)
    evaluator = engine.evaluator

    def sums(rank: int, size: int) -> dict[str, float]:
        engine.evaluator = copy.copy(evaluator)
        engine.evaluator.world, engine.evaluator.copies = copy.copy(engine.world), Copies()
        engine.evaluator.world.rank, engine.evaluator.world.size = rank, size
        return take_all(engine, gates, asked(engine))[0]

    before = everything(engine)
    whole, parts = sums(0, 1), [sums(rank, 3) for rank in range(3)]
    assert everything(engine) == before
    size = len(engine.bundle.probe)
    assert whole["count"] == size
    assert [whole[name] for name in SPENT] == [2 * FURTHER * 6, 4 * size, 2 * FURTHER * 6, 4 * size]
    added = {name: sum(part[name] for part in parts) for name in NAMES}
    assert added == pytest.approx({name: whole[name] for name in NAMES}, rel=1e-5, abs=1e-5)


def test_an_error_of_the_copies_is_told_and_gives_no_evidence(
    blended: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("esper.tolaria.growth.continuation.copy_owner", no_room)
    found = blended.evaluator.continued_sums(asked(blended), blended.owner, GateConfig(), blended.step)
    assert found == {"nonfinite": 1.0}
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not be continued in copies (RuntimeError: out of memory); gates.baseline=standing does" in line


def test_copies_go_once_nothing_is_continued_any_more(blended: Engine) -> None:
    gates, evaluator = GateConfig(continue_steps=FURTHER, continue_batch=6, continue_piece=1), blended.evaluator
    evaluator.continued_sums(asked(blended), blended.owner, gates, blended.step)
    assert evaluator.copies.saved()
    assert evaluator.continued_sums(blended.state, blended.owner, gates, blended.step) == {}
    assert not evaluator.copies.saved()


def test_a_seed_that_learns_in_shadows_stands_still_in_the_copies(blended: Engine) -> None:
    engine, other = blended, "r1c0"
    before = continued(engine, keep=True)
    engine.grown.slots[other].phase = Phase.OFF
    off = continued(engine, keep=True)
    assert torch.isfinite(off).all()
    assert not torch.equal(off, before)
    engine.owner.set_learning(other, False)
    assert torch.equal(continued(engine, keep=True), off)
