"""Operators on a model that follows its record: outputs that do not jump, gates that leave, births without a trace."""

import gc
import itertools
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esper.accord.effects import Prepare, Register, Uproot
from esper.accord.lifecycle import SlotState
from esper.accord.state import RunState
from esper.config.tree import EsperConfig
from esper.kasmina.slots.confidence import confident
from esper.leyline.alpha import Curve, Operator, Ramp
from esper.leyline.commands import Command
from esper.leyline.stages import Op, Stage
from esper.tolaria.growth.growth import Growth
from esper.tolaria.training.engine import Engine
from tests.support.bitwise import bits
from tests.support.tiny import make_engine, tiny_config

SLOT = "r0c0"
VECTOR = "1,0.5,0,0.25"


def config() -> EsperConfig:
    return tiny_config("cnn", slots__channels={SLOT: VECTOR}, trainer__precision="fp64")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    made = make_engine(config(), tmp_path_factory.mktemp("operators"))
    made.begin(None)
    return made


def blending(engine: Engine, ramp: Ramp, step: int, *, stage: Stage = Stage.BLENDING, generation: int = 1) -> RunState:
    """A state in which the slot is on this ramp."""
    entry = SlotState(
        slot=SLOT,
        stage=stage,
        generation=generation,
        blueprint="conv_light",
        operator=ramp.operator,
        ramp=ramp,
        learn_step=0,
    )
    return replace(engine.state, step=step, slots=engine.terms.first_slots()).with_slots({SLOT: entry})


def path(operator: Operator, *, start: float, target: float, first: int = 0, last: int, fades: Operator | None) -> Ramp:
    return Ramp(
        start=start,
        target=target,
        first_step=first,
        last_step=last,
        curve=Curve.LINEAR,
        steepness=6.0,
        operator=operator,
        fades_from=fades,
    )


def plant(engine: Engine) -> None:
    seed = engine.growth.build(SLOT, "conv_light", 1)
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.mul_(5.0)  # away from near identity, or every operator would look alike
    engine.growth.plant(SLOT, seed)


def empty(engine: Engine) -> None:
    engine.owner.release(SLOT)
    engine.grown.slots[SLOT].uproot()
    engine.growth.follow(replace(engine.state, slots=engine.terms.first_slots()))


def output(engine: Engine) -> Tensor:
    x, _ = engine.evaluator.to_device(*engine.bundle.validation.fetch(torch.arange(8)))
    with torch.no_grad(), confident(engine.grown, x):
        found: Tensor = engine.grown.model.eval()(x)
    return found


STEPS = 40


@pytest.mark.parametrize(("old", "new"), list(itertools.permutations(Operator, 2)))
def test_the_output_does_not_jump_where_the_operator_switches(old: Operator, new: Operator, engine: Engine) -> None:
    """Weights stand still; what moves the output is the ramp alone, step by step, from what it was."""
    plant(engine)
    growth = engine.growth
    growth.follow(blending(engine, path(old, start=0.0, target=0.5, last=10, fades=None), 10))
    before = output(engine)
    state = blending(engine, path(new, start=0.5, target=0.75, first=10, last=10 + STEPS, fades=old), 10)
    growth.follow(state)
    seen = [output(engine)]
    torch.testing.assert_close(seen[0], before, rtol=0, atol=1e-15)
    for step in range(11, 10 + STEPS + 1):
        growth.set_alphas(state, step)
        seen.append(output(engine))
    moved = torch.stack([(b - a).abs().max() for a, b in itertools.pairwise(seen)])
    whole = (seen[-1] - seen[0]).abs().max()
    assert whole > 1e-4
    assert moved.max() < 5 * whole / STEPS, "no step moves it by more than a few times its share"
    growth.follow(replace(state, step=10 + STEPS))
    holder = engine.grown.slots[SLOT]
    assert (holder.operator, holder.fades_from) == (new, None)
    torch.testing.assert_close(output(engine), seen[-1], rtol=0, atol=1e-15)
    empty(engine)


def gate_names(engine: Engine) -> set[str]:
    return {name for name in engine.grown.model.state_dict() if ".gate." in name}


def test_a_gate_is_owned_learned_and_reduced_while_it_lives_and_then_gone(engine: Engine) -> None:
    plant(engine)
    growth, owner, holder = engine.growth, engine.owner, engine.grown.slots[SLOT]
    state = blending(engine, path(Operator.GATE, start=0.0, target=1.0, last=4, fades=None), 0)
    seeds_only = len(owner.optimizer.param_groups)
    growth.follow(state)
    names = gate_names(engine)
    assert names == {
        f"esper_slots.{SLOT}.gate.{part}" for part in ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
    }
    assert names <= set(owner.gradient_set())
    assert SLOT in owner.owned_slots()
    assert [group["owner"] for group in owner.optimizer.param_groups[seeds_only:]] == [SLOT] * 2
    assert holder.gate is not None
    born = {name: value.detach().clone() for name, value in holder.gate.named_parameters()}
    for step in range(4):  # at alpha 0, in between; never without a gradient
        growth.set_alphas(state, step)
        x, y = engine.evaluator.to_device(*engine.bundle.train.fetch(torch.arange(10)))
        loss, _ = engine.bundle.task.per_sample(engine.grown.model.train()(x), y)
        loss.mean().backward()
        assert all(p.grad is not None for p in holder.parameters())
        assert all(bool(p.grad.any()) == (step > 0) for p in holder.gate.parameters() if p.grad is not None)
        owner.set_lr(step, {SLOT: 0})
        owner.step()
    for name, value in holder.gate.named_parameters():
        assert not torch.equal(value, born[name]), name
    moments = owner.state_by_name()
    assert all(moments[name] for name in names)

    growth.set_alphas(state, 4)  # full alpha between two ticks: the gate still gets its gradient, which is zero
    owner.optimizer.zero_grad()
    loss, _ = engine.bundle.task.per_sample(engine.grown.model(x), y)
    loss.mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in holder.gate.parameters())
    full = output(engine)

    dead = weakref.ref(holder.gate), [weakref.ref(p) for p in holder.gate.parameters()]
    growth.follow(replace(state, step=4))
    assert not gate_names(engine)
    assert not any(".gate." in name for name in owner.gradient_set())
    assert len(owner.optimizer.param_groups) == seeds_only
    assert bits(output(engine), full), "it leaves without a jump"
    after = owner.state_by_name()
    assert not any(".gate." in name for name in after)
    assert set(after) == set(moments) - names
    assert all(torch.equal(after[n][k], moments[n][k]) for n in after for k in moments[n]), "others' moments stay"
    del loss, value  # the test's own hold on them
    gc.collect()
    assert dead[0]() is None
    assert not any(ref() is not None for ref in dead[1])
    empty(engine)


def resident() -> int:
    """Bytes of memory in use by this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(item), Tensor) for item in gc.get_objects())


def life(growth: Growth, generation: int, state: RunState) -> list[weakref.ref]:
    """Germinate, blend half-way under GATE, prune; weak references to what lived."""
    command = Command(slot=SLOT, op=Op.GERMINATE, blueprint="conv_light", operator=Operator.GATE)
    growth.perform([Prepare(SLOT, command, generation)])
    growth.perform([Register(SLOT)])
    growth.follow(state)
    holder = growth.grown.slots[SLOT]
    assert holder.seed is not None
    assert holder.gate is not None
    living = [weakref.ref(holder.seed), weakref.ref(holder.gate), *map(weakref.ref, holder.parameters())]
    growth.perform([Uproot(SLOT)])
    growth.follow(replace(state, slots=growth.terms.first_slots()))
    return living


@pytest.mark.parametrize("lives", [200, pytest.param(800, marks=pytest.mark.slow)])
def test_hundreds_of_lives_leave_no_tensor_behind(engine: Engine, lives: int) -> None:
    growth = engine.growth
    state = blending(engine, path(Operator.GATE, start=0.0, target=1.0, last=8, fades=None), 3)
    names, groups = set(engine.grown.model.state_dict()), len(engine.owner.optimizer.param_groups)
    for generation in range(1, 101):
        living = life(growth, generation, state)
    gc.collect()
    assert not any(ref() is not None for ref in living)
    counted, memory = tensors(), resident()
    for generation in range(101, 101 + lives):
        life(growth, generation, state)
    assert tensors() <= counted, "each life would leave one at least; what other tests left in this process may go"
    assert resident() - memory < lives * 10_486, "800 lives more cost less than 8 MiB"
    assert set(engine.grown.model.state_dict()) == names
    assert len(engine.owner.optimizer.param_groups) == groups
    assert not engine.owner.optimizer.state.keys() - {p for _, p in engine.grown.model.named_parameters()}
