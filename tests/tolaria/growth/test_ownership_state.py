"""Learning rates against torch's own schedulers; optimizer state by name, over growth and over a file."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from esper.kasmina.slots.grown import HOST
from esper.kasmina.slots.sites import CONTAINER
from esper.leyline.errors import CheckpointError
from esper.tolaria.growth.config import Schedule
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.growth.policy import lr_shape
from tests.support.parameter_owners import (
    ADAMW,
    KINDS,
    STEPS,
    birth,
    equal,
    grown_host,
    moments,
    train,
    values,
)

# learning rates ---------------------------------------------------------------------------------------------------


def scheduler_says(schedule: Schedule, steps: int, final: float) -> list[float]:
    """Multiples of the peak by torch's own schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    decay = math.ceil(ADAMW.decay_share * STEPS)
    schedulers = torch.optim.lr_scheduler
    make = {
        Schedule.WSD: lambda: schedulers.SequentialLR(
            optimizer,
            [schedulers.ConstantLR(optimizer, factor=1.0), schedulers.LinearLR(optimizer, 1.0, final, decay)],
            milestones=[steps - decay],
        ),
        Schedule.CONSTANT: lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        Schedule.COSINE: lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=final),
        Schedule.LINEAR: lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, final, steps),
    }
    scheduler = make[schedule]()
    found = []
    for _ in range(steps + 1):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


# Plateau's rate follows what is measured: tests/tolaria/training/test_patience.py.
@pytest.mark.parametrize("schedule", [schedule for schedule in Schedule if schedule is not Schedule.PLATEAU])
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_the_hosts_learning_rate_is_a_linear_warm_up_and_then_torchs_schedule(schedule, warmup, final):
    config = replace(ADAMW, schedule=schedule, warmup_steps=warmup, final_lr_fraction=final)
    found = [lr_shape(config, step, STEPS) for step in range(STEPS + 1)]
    assert found[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert found[warmup:] == pytest.approx(scheduler_says(schedule, STEPS - warmup, final), abs=1e-12)
    assert found[warmup] == pytest.approx(1.0)
    assert lr_shape(config, STEPS + 100, STEPS) == pytest.approx(found[-1])


def test_a_seed_warms_up_from_the_first_step_in_which_it_learns_and_then_follows_the_host():
    config = replace(ADAMW, schedule=Schedule.LINEAR, seed_lr_scale=3.0, seed_warmup_steps=4)
    grown = grown_host()
    owner = ParameterOwner(grown, config, STEPS)
    birth(grown, owner, "r0c0")
    for step in (0, 9, 10, 11, 12, 13, 14, 39):
        host = owner.set_lr(step, {"r0c0": 10 if step >= 10 else None})
        rates = {group["owner"]: group["lr"] for group in owner.optimizer.param_groups}
        assert rates[HOST] == host == pytest.approx(0.01 * (0.1 + 0.9 * (1 - step / STEPS)))
        warm = min(1.0, (step - 10 + 1) / 4) if step >= 10 else 0.25
        assert rates["r0c0"] == pytest.approx(3.0 * host * warm)
    owner.config = replace(config, seed_warmup_steps=0)
    assert owner.set_lr(10, {"r0c0": 10}) * 3.0 == pytest.approx(owner.optimizer.param_groups[-1]["lr"])


# saving -----------------------------------------------------------------------------------------------------------


@KINDS
def test_state_by_name_is_the_same_whatever_the_order_of_birth_and_goes_on_bit_for_bit(config):
    grown = grown_host()
    owner = ParameterOwner(grown, config, STEPS)
    birth(grown, owner, "r1c0")
    train(grown, owner, range(4))
    birth(grown, owner, "r0c0")  # stands before r1c0 and behind it in age
    train(grown, owner, range(4, 8))
    saved, weights = copy.deepcopy(owner.state_by_name()), copy.deepcopy(grown.model.state_dict())

    again = grown_host()
    restored = ParameterOwner(again, config, STEPS)
    for slot in ("r0c0", "r1c0"):
        birth(again, restored, slot)
    again.model.load_state_dict(weights)
    restored.load_by_name(saved)
    assert equal(moments(restored), moments(owner))
    # every moment lies with the parameter of its name, not of its place
    for name, parameter in again.model.named_parameters():
        for key, value in restored.optimizer.state[parameter].items():
            assert torch.equal(torch.as_tensor(value), saved[name][key])
    train(grown, owner, range(8, 12))
    train(again, restored, range(8, 12))
    assert equal(values(again), values(grown))
    assert equal(moments(restored), moments(owner))


def test_a_seed_between_old_layers_does_not_take_its_neighbours_moments():
    grown = grown_host()
    owner = ParameterOwner(grown, ADAMW, STEPS)
    birth(grown, owner, "r1c0")
    train(grown, owner, range(4))
    before = moments(owner)
    birth(grown, owner, "r0c0")
    saved = owner.state_by_name()
    assert saved[f"{CONTAINER}.r0c0.seed.weight"] == {}
    owner.load_by_name(saved)
    assert equal(moments(owner), before)


def test_saved_state_is_a_copy_and_so_is_what_was_loaded():
    grown = grown_host()
    owner = ParameterOwner(grown, ADAMW, STEPS)
    train(grown, owner, range(2))
    saved = owner.state_by_name()
    kept = {name: {key: t.clone() for key, t in entry.items()} for name, entry in saved.items()}
    train(grown, owner, range(2, 4))
    assert all(equal(saved[name], kept[name]) for name in kept)
    owner.load_by_name(saved)
    train(grown, owner, range(2, 4))
    assert all(equal(saved[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: s.pop("scale"), r"optimizer state: missing \['scale'\], unknown none"),
        (lambda s: s.update(ghost={}), r"optimizer state: missing none, unknown \['ghost'\]"),
        (
            lambda s: s["scale"].update(exp_avg=torch.zeros(4)),
            r"optimizer state exp_avg of scale: \(4,\) for a parameter \(3,\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_that_names_it_and_changes_nothing(spoil, said):
    grown = grown_host()
    owner = ParameterOwner(grown, ADAMW, STEPS)
    train(grown, owner, range(2))
    before = moments(owner)
    state = owner.state_by_name()
    spoil(state)
    with pytest.raises(CheckpointError, match=said):
        owner.load_by_name(state)
    assert equal(moments(owner), before)
