"""session.ema: the recurrence by hand over a life, torch's AveragedModel without one, saved and restored to the bit."""

from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper.leyline.errors import CheckpointError, ConfigError, LoopError
from tests.support.averages import Weights, assert_averages, averaged, weights_of
from tests.support.sessions import LIFE, LIFE_STEPS, A, B, batch, host, loss, make, probe, replica, stages, train
from tests.support.tiny import act, bits

DECAY = 0.8
GATED = [
    action | {"operator": "GATE"} if action["slot"] == A and action["op"] == "GERMINATE" else action for action in LIFE
]


def averages(session: esper.Session) -> dict[str, torch.Tensor]:
    average = session._loop.average
    assert average is not None
    return average.averages


def recorded(session: esper.Session, steps: range) -> list[tuple[Weights, bool]]:
    """Trains; what the weights are after each step."""
    noted = []
    for step in steps:
        train(session, [step])
        noted.append((weights_of(session.grown.model), True))
    return noted


@pytest.mark.parametrize("actions", [LIFE, GATED], ids=["ADD", "GATE"])
def test_through_births_ramps_and_a_prune_it_is_the_recurrence_by_name(actions: list[dict[str, Any]]) -> None:
    session = make(actions=actions)
    start = weights_of(session.grown.model)
    session.ema(DECAY)
    steps: list[tuple[Weights, bool]] = []
    names = set()
    for step in range(LIFE_STEPS):
        steps += recorded(session, range(step, step + 1))
        assert_averages(averages(session), averaged(DECAY, start, steps), tolerance=1e-12)
        names |= set(averages(session))
    assert (A, "FOSSILIZED") in stages(session)
    assert (B, "PRUNED") in stages(session)
    assert any(name.startswith(f"esper_slots.{B}.seed") for name in names)
    assert any(name.startswith(f"esper_slots.{A}.gate") for name in names) == (actions is GATED)
    assert not any(f".{B}." in name or ".gate." in name for name in averages(session))


def test_a_slot_that_grows_again_begins_with_its_own_newborn() -> None:
    again = [
        act(1, B, "GERMINATE", blueprint="norm", ticks=1),
        act(3, B, "PRUNE", ticks=0),
        act(8, B, "GERMINATE", blueprint="norm", ticks=1),
    ]
    session = make(actions=again)
    start = weights_of(session.grown.model)
    session.ema(DECAY)
    steps = recorded(session, range(22))
    assert stages(session).count((B, "GERMINATED")) == 2
    assert_averages(averages(session), averaged(DECAY, start, steps), tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_growth_it_is_torchs_to_the_bit(dtype: torch.dtype) -> None:
    session = make(host(dtype=dtype), actions=())
    theirs = AveragedModel(session.grown.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(session.grown.model)  # its first update copies
    ema = session.ema(0.9)
    for step in range(20):
        train(session, [step])
        theirs.update_parameters(session.grown.model)
    assert bits(averages(session).items()) == bits(theirs.module.named_parameters())
    x = batch(77, dtype=dtype)[0]
    with ema.applied(), torch.no_grad():
        assert torch.equal(session.model(x), theirs(x))


def test_half_precision_weights_have_averages_in_float32() -> None:
    """At a decay of 0.999 an average in bfloat16 would not move at all."""
    session = make(host(dtype=torch.bfloat16), actions=())
    start = weights_of(session.grown.model)
    ema = session.ema(0.999)
    steps = recorded(session, range(12))
    assert {average.dtype for average in averages(session).values()} == {torch.float32}
    assert_averages(averages(session), averaged(0.999, start, steps), tolerance=1e-6)
    assert ema.state_dict()["0.weight"].dtype is torch.bfloat16


def test_a_skipped_step_does_not_count() -> None:
    session = make(actions=())
    start = weights_of(session.grown.model)
    session.ema(DECAY)
    steps = recorded(session, range(3))
    for bad in (True, False, True):
        found = session.loss(batch(9))
        found.backward()
        if bad:
            next(session.grown.model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
        report = session.step()
        assert report.skipped is bad
        steps.append((weights_of(session.grown.model), not bad))
    assert_averages(averages(session), averaged(DECAY, start, steps), tolerance=1e-12)


def test_applied_computes_with_the_average_and_leaves_no_trace() -> None:
    plain, session = make(), make()
    ema = session.ema(DECAY)
    x = batch(5)[0]
    for step in range(LIFE_STEPS):
        train(plain, [step])
        train(session, [step])
        wanted = torch.func.functional_call(session.grown.model, averages(session), x)
        before = bits(session.grown.model.state_dict().items())
        with ema.applied(), torch.no_grad():
            with ema.applied():
                assert torch.equal(session.model(x), wanted)
            assert torch.equal(session.model(x), wanted), "the inner block does not end the outer one"
            assert float(session.loss(batch(5))) > 0
        assert bits(session.grown.model.state_dict().items()) == before
    with pytest.raises(ZeroDivisionError), ema.applied():
        raise ZeroDivisionError
    assert replica(session) == replica(plain), "training knows nothing of it"


def test_what_would_train_or_save_the_average_is_refused_by_name(tmp_path) -> None:
    session = make(actions=())
    ema = session.ema(DECAY)
    train(session, range(2))
    state = session.state_dict()
    calls = [
        lambda: session.loss(batch(1)),
        session.step,
        lambda: next(iter(session.epoch([batch(1)]))),
        session.accumulate().__enter__,
        lambda: session.save(tmp_path / "s.pt"),
        lambda: session.load_state_dict(state),
        lambda: session.to(torch.float32),
    ]
    with ema.applied():
        for call in calls:
            with pytest.raises(LoopError, match=r"within ema\.applied\(\) .*call this after the block"):
                call()
    session.loss(batch(1)).backward()
    between = r"ema\.applied\(\) between session\.loss\(batch\) and session\.step\(\)"
    with pytest.raises(LoopError, match=between), ema.applied():
        raise AssertionError
    session.step()


def test_one_average_asked_for_wrongly_is_refused() -> None:
    session = make(actions=())
    with pytest.raises(LoopError, match=r"export\(ema=True\) without an average; call session\.ema\(decay\)"):
        session.export(ema=True)
    for decay in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"ema: decay = .*: must be > 0 and < 1, such as 0\.999"):
            session.ema(decay)
    session.ema(0.9)
    session.ema(0.9)
    with pytest.raises(ConfigError, match=r"already keeps an average with 0\.9.*ask for session\.ema\(0\.9\)"):
        session.ema(0.99)


def test_an_export_of_the_average_computes_the_average() -> None:
    session = make()
    ema = session.ema(DECAY)
    train(session, range(LIFE_STEPS))
    x = batch(5)[0]
    with ema.applied(), torch.no_grad():
        wanted = session.model(x)
    live = session.export()(x)
    for plain in (ema.export(fold=False), session.export(fold=False, ema=True)):
        assert not any("esper" in type(module).__module__ for module in plain.modules())
        assert torch.equal(plain(x), wanted)
        assert not torch.allclose(plain(x), live)
    torch.testing.assert_close(session.export(ema=True)(x), wanted)


# saving -------------------------------------------------------------------------------------------------------------


CUTS = [0, 5, 9, 14, 21]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A life that is saved at each cut: the folder of its files, its averages and what it comes to."""
    folder = tmp_path_factory.mktemp("whole")
    session = make(actions=GATED)
    session.ema(DECAY)
    for cut, after in zip(CUTS, [*CUTS[1:], LIFE_STEPS], strict=True):
        session.save(folder / f"{cut}.pt")
        train(session, range(cut, after))
    return folder, bits(averages(session).items()), replica(session)


@pytest.mark.parametrize("asked", [True, False], ids=["asked for again", "by the file"])
@pytest.mark.parametrize("cut", CUTS)
def test_a_restore_goes_on_bit_for_bit(cut: int, asked: bool, whole) -> None:
    folder, wanted, state = whole
    again = esper.Session.restore(folder / f"{cut}.pt", host, loss=loss, probe=probe())
    if asked:
        again.ema(DECAY)
    train(again, range(cut, LIFE_STEPS))
    assert bits(averages(again).items()) == wanted
    assert replica(again) == state


def test_in_place_what_has_grown_since_leaves_the_average() -> None:
    session = make()
    ema = session.ema(DECAY)
    train(session, range(3))
    state, before = session.state_dict(), bits(averages(session).items())
    train(session, range(3, 15))
    after = bits(averages(session).items())
    assert set(after) > set(before)
    session.load_state_dict(state)
    assert bits(averages(session).items()) == before
    train(session, range(3, 15))
    assert bits(averages(session).items()) == after
    with ema.applied():
        assert bits(session.grown.model.named_parameters()) == after, "float64 here: the averages to the bit"


def test_files_with_and_without_an_average_are_told_apart() -> None:
    session = make(actions=())
    train(session, range(2))
    without = session.state_dict()
    session.ema(DECAY)
    with pytest.raises(CheckpointError, match=r"state: saved before session\.ema\(0\.8\) began, so it has no average"):
        session.load_state_dict(without)
    saved = session.state_dict()
    other = make(actions=())
    other.ema(0.5)
    with pytest.raises(CheckpointError, match=r"its average has the decay 0\.8, this session's 0\.5"):
        other.load_state_dict(saved)
    del saved["ema"]["averages"]["0.weight"]
    with pytest.raises(CheckpointError, match=r"ema: missing \['0\.weight'\], unknown nothing"):
        session.load_state_dict(saved)


def test_a_cast_takes_the_average_along() -> None:
    session = make(host(dtype=torch.float32), actions=())
    session.ema(DECAY)
    train(session, range(4))
    single = {name: average.clone() for name, average in averages(session).items()}
    session.to(torch.float64)
    assert_averages(averages(session), {name: value.double() for name, value in single.items()}, tolerance=0.0)
    assert {average.dtype for average in averages(session).values()} == {torch.float64}
