"""A loss scaler, per owner: torch's own loop where only the host overflows, no skipped step where a slot does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.slots.sites import CONTAINER
from esper.leyline.stages import Stage
from esper.tolaria.growth.guard import PATIENCE
from tests.support.sessions import A, B, adamw, batch, host, loss, make, probe, replica, train
from tests.support.tiny import act, bits

INCUBATE = [act(1, A, "GERMINATE", blueprint="conv_light", ticks=1), act(3, A, "ADVANCE")]


def scaler(**options: Any) -> Any:
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, "growth_interval": 5, **options})


def of_host(model: nn.Module) -> dict[str, str]:
    return {name: value for name, value in bits(model.named_parameters()).items() if not name.startswith(CONTAINER)}


def spoil(parameter: nn.Parameter, session_steps: Any, at: range) -> None:
    parameter.register_hook(lambda grad: grad * torch.inf if session_steps() in at else grad)


def test_a_power_of_two_changes_no_bit_and_the_loss_reads_as_it_is():
    plain, scaled = make(), make(scaler=scaler())
    losses = train(plain, range(16)), train(scaled, range(16))
    assert losses[0] == losses[1]
    assert scaled._loop.adopted.scaler.get_scale() == 1024.0 * 2**3
    assert bits(scaled.grown.model.named_parameters()) == bits(plain.grown.model.named_parameters())
    assert scaled.state == plain.state


def test_a_host_that_overflows_is_torch_s_own_loop():
    model, theirs, scales = host(), scaler(), []
    optimizer = adamw(model)
    count = [0]
    spoil(model[0].weight, lambda: count[0], range(3, 5))
    for step in range(12):
        theirs.scale(loss(model, batch(step))[0].mean()).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        scales.append(theirs.get_scale())
        count[0] += 1

    ours = scaler()
    session, found = make(scaler=ours, actions=()), []
    spoil(session.grown.model[0].weight, lambda: session.steps, range(3, 5))
    for step in range(12):
        train(session, [step])
        found.append(ours.get_scale())
    assert found == scales
    assert ours.state_dict() == theirs.state_dict()
    assert of_host(session.grown.model) == of_host(model)
    assert session.steps == 12


@pytest.mark.parametrize("steps", [2, 6])
def test_an_overflow_in_a_slot_never_skips_the_hosts_step(steps: int):
    plain = make(actions=(), scaler=scaler())
    ours = scaler(growth_interval=1000)
    session = make(actions=INCUBATE, scaler=ours, every=8)
    train(session, range(26))
    assert session.state.slot(A).stage is Stage.TRAINING
    seed = session.grown.slots[A].seed
    assert seed is not None
    spoil(next(seed.parameters()), lambda: session.steps, range(26, 26 + steps))
    reports, scales = [], []

    def noting() -> Any:
        report = own()
        reports.append(report)
        scales.append(ours.get_scale())
        return report

    own, session.step = session.step, noting  # type: ignore[method-assign]
    train(session, range(26, 34))
    train(plain, range(34))
    assert not any(report.skipped for report in reports)
    assert of_host(session.grown.model) == of_host(plain.grown.model)
    lowered = min(steps, PATIENCE)
    assert scales[:steps] == [1024.0 / 2 ** min(1 + i, PATIENCE) for i in range(steps)]
    assert scales[-1] == 1024.0 / 2**lowered
    broken = [report.broken for report in reports]
    assert broken == [(A,) if PATIENCE <= i < steps else () for i in range(8)]
    assert (session.state.slot(A).stage is Stage.PRUNED) == (steps > PATIENCE), (
        "quarantined only when it is no overflow"
    )


def test_the_scaler_is_saved_and_demanded(tmp_path):
    session = make(scaler=scaler())
    train(session, range(13))
    session.save(tmp_path / "s.pt")
    with pytest.raises(esper.leyline.errors.CheckpointError, match="it has a scaler and the session has none"):
        esper.Session.restore(tmp_path / "s.pt", host, loss=loss, probe=probe())
    again = esper.Session.restore(tmp_path / "s.pt", host, loss=loss, probe=probe(), scaler=scaler())
    for one in (session, again):
        train(one, range(13, 22))
    assert again._loop.adopted.scaler.state_dict() == session._loop.adopted.scaler.state_dict()
    assert replica(again) == replica(session)


def test_overflows_in_a_row_are_counted_over_a_save(tmp_path):
    """The slot is quarantined as soon as it would have been without the save."""
    session = make(actions=INCUBATE, scaler=scaler(), every=8)
    train(session, range(26))

    def broken(one: esper.Session, steps: range) -> None:
        spoil(next(one.grown.slots[A].seed.parameters()), lambda: one.steps, steps)
        train(one, steps)

    broken(session, range(26, 29))
    session.save(tmp_path / "s.pt")
    assert session._loop.adopted.overflows == {A: 3}
    again = esper.Session.restore(tmp_path / "s.pt", host, loss=loss, probe=probe(), scaler=scaler())
    assert again._loop.adopted.overflows == {A: 3}
    for one in (session, again):
        broken(one, range(29, 32))
        assert one.state.slot(A).stage is Stage.PRUNED
    assert again._loop.adopted.scaler.state_dict() == session._loop.adopted.scaler.state_dict()
    assert replica(again) == replica(session)


def test_a_scaler_that_is_switched_off_is_none():
    session = make(scaler=scaler(enabled=False))
    value = session.loss(batch(0))
    value.backward()
    grad = session.grown.model[0].weight.grad
    assert isinstance(grad, Tensor)
    wanted = host()
    loss(wanted, batch(0))[0].mean().backward()
    assert torch.equal(grad, wanted[0].weight.grad)
    assert B in session.grown.slots
