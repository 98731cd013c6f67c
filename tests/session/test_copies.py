"""A copy of a session's model that does not grow with it is named where it was made; anything else is left in peace."""

import copy
import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import esper
from esper.kasmina.export import export
from esper.leyline.events import Fault
from tests.support.sessions import GATES, LIFE, LIFE_STEPS, A, B, adamw, host, loss, make, of, probe, stages, train

GIVEN = [(4, f"{A} was given a seed"), (8, f"{B} was given a seed"), (18, f"{B} lost its seed")]


def named(session: esper.Session) -> list[tuple[int, str]]:
    """Step and text of each event about a copy."""
    return [
        (event.step, event.what) for event in of(session, Fault) if "copies of" in event.what or "a copy" in event.what
    ]


def test_an_averaged_model_is_named_at_each_change_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    session = make()
    averaged = AveragedModel(session.grown.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    line = 1 + copy_line("averaged = AveragedModel")
    for step in range(LIFE_STEPS):
        train(session, [step])
        if step < 3:
            averaged.update_parameters(session.grown.model)
    found = named(session)
    assert [step for step, _ in found] == [step for step, _ in GIVEN]
    for (_, text), (_, change) in zip(found, GIVEN, strict=True):
        start = f"a copy of the model has not followed it, made at {__file__}:{line}: {change}; "
        assert text.startswith(start)
        assert "use session.ema(decay) (trainer.ema in the trainer), or make the copy anew" in text
    lines = [line for line in capsys.readouterr().err.splitlines() if "copy" in line]
    assert lines == [f"esper: {text}" for _, text in found]


def test_a_gate_that_comes_and_goes_is_a_change_too() -> None:
    gated = [
        {**action, "operator": "GATE"} if action["op"] == "GERMINATE" else action
        for action in LIFE
        if action["slot"] == A
    ]
    session = make(actions=gated)
    train(session, range(5))
    kept = copy.deepcopy(session.grown.model)
    train(session, range(5, LIFE_STEPS))
    found = [text.partition(": ")[2].partition(";")[0] for _, text in named(session)]
    assert found == [f"{A} was given a gate", f"{A} lost its gate"]
    del kept


def copy_line(text: str) -> int:
    """Index of the line of this file that begins so."""
    with open(__file__) as file:
        return next(index for index, line in enumerate(file) if line.strip().startswith(text))


def copies(session: esper.Session) -> dict[str, Any]:
    return {
        "deepcopy": lambda: copy.deepcopy(session.grown.model),
        "the handle": lambda: copy.deepcopy(session.grown),
        "a part with sites": lambda: copy.deepcopy(nn.ModuleList([session.grown.model[3]])),  # type: ignore[index]
        "a copy of a copy that is gone": lambda: copy.deepcopy(copy.deepcopy(session.grown.model)),
        "in a list": lambda: copy.deepcopy([session.grown.model, 1]),
    }


@pytest.mark.parametrize(
    "kind", ["deepcopy", "the handle", "a part with sites", "a copy of a copy that is gone", "in a list"]
)
def test_every_kind_of_copy_is_named(kind: str) -> None:
    session = make()
    kept = copies(session)[kind]()
    train(session, range(4))
    assert len(named(session)) == 1
    del kept


def test_copies_from_one_line_are_one_event() -> None:
    session = make()
    kept = [copy.deepcopy(session.grown.model) for _ in range(3)]
    train(session, range(4))
    ((_, text),) = named(session)
    assert text.startswith("3 copies of the model have not followed it, made at ")
    del kept


def test_a_copy_that_is_gone_is_not_named() -> None:
    session = make()
    twin = copy.deepcopy(session.grown.model)
    twin.circle = [twin]  # type: ignore[assignment]
    gc.disable()  # the watch itself sees that it is gone
    try:
        del twin
        train(session, range(4))
    finally:
        gc.enable()
    assert stages(session) == [(A, "GERMINATED")]
    assert named(session) == []


def test_what_esper_copies_itself_is_not_named() -> None:
    session = make()
    plain = session.export()
    exported = export(session.grown)
    train(session, range(4))
    kept = session.grown.export(partial=True), session.state_dict(), session.ema(0.9).export()
    train(session, range(4, LIFE_STEPS))
    assert named(session) == []
    del plain, exported, kept


def test_a_pickle_registers_nowhere_and_comes_back_whole() -> None:
    session = make()
    twin = pickle.loads(pickle.dumps(session.grown.model))
    train(session, range(4))
    assert named(session) == []
    assert set(twin.state_dict()) < set(session.grown.model.state_dict())


def test_a_copy_that_grows_by_itself_is_a_model_of_its_own() -> None:
    first = make()
    twin = copy.deepcopy(first.grown)
    settings = {"loss": loss, "probe": probe(), "controller": "none", "gates": GATES}
    second = esper.Session(twin, adamw(twin.model), **settings)
    train(first, range(4))
    assert stages(first) == [(A, "GERMINATED")]
    assert named(first) == named(second) == []


def test_a_compiled_model_has_no_copy() -> None:
    model = host(dtype=torch.float32)
    session = make(model)
    compiled = torch.compile(model, backend="eager")
    x = torch.zeros(2, 1, 6, 6)
    compiled(x)
    train(session, range(4))
    compiled(x)
    assert named(session) == []
