"""Steps that do not come to their end: dropped whole, and the run goes on as if they had never begun."""

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.leyline.errors import ConfigError, LoopError
from esper.leyline.events import TickDone
from tests.support.sessions import EVERY, LIFE, LIFE_STEPS, batch, host, make, of, replica, train

STEPS = 12
STOP = 7  # the step that is interrupted: in the middle of a window between ticks, with a seed in flight


def lived(**more: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    session = make(host(dropout=0.3), **more)
    train(session, range(STEPS))
    return replica(session)


def interrupt(session: esper.Session, at: str) -> None:
    """Begins step `STOP` and leaves it by Ctrl-C."""
    layer = session.grown.model[7]

    def strike(*call: Any) -> None:
        raise KeyboardInterrupt

    if at == "forward":
        hook = layer.register_forward_hook(strike)
    elif at == "backward":
        hook = session.grown.model[0].weight.register_hook(strike)
    try:
        value = session.loss(batch(STOP))
        if at != "loss":
            value.backward()
    except KeyboardInterrupt:
        assert at in ("forward", "backward")
    if at in ("forward", "backward"):
        hook.remove()


PLACES = ["forward", "backward", "after backward"]


@pytest.mark.parametrize("at", PLACES)
def test_a_discarded_step_leaves_no_trace(at: str) -> None:
    wanted = lived()
    torch.manual_seed(5)
    session = make(host(dropout=0.3))
    train(session, range(STOP))
    interrupt(session, at)
    session.discard()
    assert all(parameter.grad is None for parameter in session.grown.model.parameters())
    train(session, range(STOP, STEPS))
    assert replica(session) == wanted


@pytest.mark.parametrize("at", PLACES)
def test_a_save_in_the_middle_of_a_step_is_the_last_whole_step(at: str, tmp_path: Any) -> None:
    wanted = lived()
    torch.manual_seed(5)
    session = make(host(dropout=0.3))
    train(session, range(STOP))
    interrupt(session, at)
    session.save(tmp_path / "x.pt")
    if at != "forward":  # whose loss nobody has
        with pytest.raises(LoopError, match="a save has dropped the step under way"):
            session.step()
    made = make(host(dropout=0.3))
    made.load_state_dict(made_state(tmp_path))
    train(made, range(STOP, STEPS))
    assert replica(made) == wanted


def made_state(folder: Any) -> dict[str, Any]:
    payload = torch.load(folder / "x.pt", weights_only=True)
    payload.pop("sha256")
    return payload


def test_a_state_is_loaded_over_a_step_under_way() -> None:
    session = make()
    train(session, range(STOP))
    state = session.state_dict()
    train(session, range(STOP, STOP + 3))
    session.loss(batch(20)).backward()
    session.load_state_dict(state)
    train(session, range(STOP, STEPS))
    once = make()
    train(once, range(STEPS))
    assert replica(session) == replica(once)


def test_what_an_interruption_tore_is_said_until_a_load_mends_it() -> None:
    session = make(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
    train(session, range(4))
    state = session.state_dict()
    session.loss(batch(4)).backward()

    def strike(*call: Any) -> None:
        raise KeyboardInterrupt

    hook = session.optimizer.register_step_post_hook(strike)
    with pytest.raises(KeyboardInterrupt):
        session.step()
    hook.remove()
    for call in (session.discard, session.state_dict, session.step, lambda: session.loss(batch(5))):
        with pytest.raises(LoopError, match=r"session\.step\(\) was interrupted \(KeyboardInterrupt.*load_state_dict"):
            call()
    session.load_state_dict(state)
    train(session, range(4, 8))


def test_a_step_after_an_interrupted_backward_is_refused() -> None:
    session = make(actions=())
    value = session.loss(batch(0))

    def strike(*call: Any) -> None:
        raise KeyboardInterrupt

    hook = session.grown.model[0].weight.register_hook(strike)
    with pytest.raises(KeyboardInterrupt):
        value.backward()
    hook.remove()
    assert session.grown.model[7].weight.grad is not None, "nothing had been reached: this test would see nothing"
    with pytest.raises(LoopError, match=r"a backward that was interrupted; call session\.discard\(\) first"):
        session.step()
    session.discard()
    train(session, [0])


# windows --------------------------------------------------------------------------------------------------------------


def test_an_error_that_leaves_a_window_drops_it_whole() -> None:
    wanted, session = make(actions=()), make(actions=())
    for one in (wanted, session):
        train(one, range(3))
    with contextlib.suppress(RuntimeError), session.accumulate():
        session.loss(batch(50)).backward()
        raise RuntimeError("out of memory")
    for one in (wanted, session):
        train(one, range(3, 3 + 2 * EVERY))
    assert replica(session) == replica(wanted)


def test_an_error_in_a_later_block_drops_the_earlier_ones_too() -> None:
    wanted, session = make(actions=()), make(actions=())
    with session.accumulate():
        session.loss(batch(50)).backward()
    with contextlib.suppress(KeyboardInterrupt), session.accumulate():
        session.loss(batch(51)).backward()
        raise KeyboardInterrupt
    for one in (wanted, session):
        train(one, range(2 * EVERY))
    assert replica(session) == replica(wanted)


# epochs ---------------------------------------------------------------------------------------------------------------


def test_an_epoch_that_is_left_early_is_an_epoch() -> None:
    session = make(
        actions=(),
        every=0,
        scheduler_per="epoch",
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
    )
    rates = []
    for _ in range(3):
        for index, one in enumerate(session.epoch([batch(step) for step in range(8)])):
            rates.append(session.optimizer.param_groups[0]["lr"])
            session.loss(one).backward()
            session.step()
            if index == 2:
                break
    assert rates == [0.1] * 3 + [0.05] * 3 + [0.025] * 3
    session.state_dict()  # the last one has ended by now
    assert session.optimizer.param_groups[0]["lr"] == 0.0125
    assert [event.step for event in of(session, TickDone)] == [3, 6, 9]


def test_an_error_at_the_end_of_an_epoch_left_early_is_not_lost() -> None:
    class Failing(torch.optim.lr_scheduler.LambdaLR):
        def step(self, epoch: Any = None) -> None:
            if getattr(self, "began", False):
                raise RuntimeError("no rate")
            self.began = True
            super().step(epoch)

    session = make(actions=(), scheduler_per="epoch", scheduler=lambda optimizer: Failing(optimizer, lambda epoch: 1.0))
    for one in session.epoch([batch(0), batch(1)]):
        session.loss(one).backward()
        session.step()
        break
    with pytest.raises(RuntimeError, match="no rate"):
        session.loss(batch(2))


# the model that a loss is given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["the bare model", "the session's", "a method", "the bare model besides"])
def test_a_loss_that_calls_another_model_is_named_at_the_first_loss(who: str) -> None:
    model, sessions = host(), []

    def other(given: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        called = {
            "the bare model": lambda x: model(x),
            "the session's": lambda x: sessions[0].model(x),
            "a method": lambda x: given.forward(x),
            "the bare model besides": lambda x: given(x) + model(x),
        }[who]
        return F.cross_entropy(called(data[0]), data[1], reduction="none")

    sessions.append(make(model, loss=other))
    with pytest.raises(ConfigError, match=r"past the one" if "besides" in who else r"did not call the model"):
        sessions[0].loss(batch(0))


def test_a_target_without_gradients_may_come_from_the_model_itself() -> None:
    model = host()

    def distilled(given: Any, data: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            target = model(data[0])
        return (given(data[0]) - target).square().mean(1)

    train(make(model, loss=distilled), range(3))


# what learns ----------------------------------------------------------------------------------------------------------


def test_a_changed_requires_grad_is_named_at_the_next_step() -> None:
    model = host()
    model[0].requires_grad_(False)
    session = make(model, actions=())
    train(session, range(3))
    before = model[0].weight.clone()
    model[0].requires_grad_(True)
    with pytest.raises(LoopError, match=r"requires_grad of 0\.bias, 0\.weight was changed.*session\.discard\(\)"):
        train(session, [3])
    session.discard()
    train(session, range(3, 6))
    assert not torch.equal(model[0].weight, before)


@pytest.mark.parametrize("incubation", ["shadow", "ste", "immediate"])
@pytest.mark.parametrize("empty", [True, False])
def test_a_frozen_host_grows(incubation: str, empty: bool) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": [] if empty else list(model.parameters())}], lr=0.01)

    model = host().requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    session = make(model, optimizer=optimizer, actions=LIFE[:4], slots={"incubation": incubation, "max_live": None})
    births: dict[str, Tensor] = {}
    for step in range(LIFE_STEPS):
        train(session, [step])
        for name, parameter in session.grown.model.named_parameters():
            if "esper" in name:
                births.setdefault(name, parameter.detach().clone())
    assert all(map(torch.equal, before, [p for name, p in model.named_parameters() if "esper" not in name]))
    now = dict(session.grown.model.named_parameters())
    assert any(not torch.equal(births[name], now[name]) for name in births)
    state = session.state_dict()
    session.load_state_dict(state)
    train(session, [LIFE_STEPS])
