"""The feature is found in what modules return, and goes back into a container of the same type."""

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.kasmina.axes.feature import place_of, put, take, tensors_in

X, Y = torch.randn(2, 3), torch.randn(2, 3)
IDS = torch.arange(2)
Named = collections.namedtuple("Named", ["hidden", "extra"])


@dataclasses.dataclass(frozen=True)
class Frozen:
    loss: Tensor | None
    hidden: Tensor
    extra: Any


class Output(collections.OrderedDict):
    """Like the outputs of transformers: mapping and attributes at once."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


def fields(output: Any) -> list[Any]:
    if dataclasses.is_dataclass(output):
        return [getattr(output, field.name) for field in dataclasses.fields(output)]
    return list(output.values()) if isinstance(output, dict) else list(output)


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ((X, (Y, Y)), 0),
        ((X, Y), 0),
        ((IDS, X), 1),
        ([X, "rest"], 0),
        (Named(X, "rest"), 0),
        (torch.return_types.max((X, IDS)), 0),
        ({"ids": IDS, "hidden": X}, "hidden"),
        (Output(hidden=X, past="cache"), "hidden"),
        (Frozen(None, X, Y), "hidden"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int | str) else None,
)
def test_a_container_keeps_its_type_and_everything_beside_the_feature(output, place):
    assert place_of(output) == place
    assert take(output, place) is X
    before = fields(output)
    new = torch.zeros(2, 3)
    rebuilt = put(output, place, new)
    assert type(rebuilt) is type(output)
    assert rebuilt is not output
    assert take(rebuilt, place) is new
    assert [a is b for a, b in zip(fields(output), before, strict=True)] == [True] * len(before), "input was changed"
    beside = [(a, b) for a, b in zip(fields(rebuilt), before, strict=True) if b is not X]
    assert all(a is b for a, b in beside)
    assert len(beside) == len(before) - 1


def test_an_attribute_of_a_model_output_follows_its_item():
    new = torch.zeros(2, 3)
    rebuilt = put(Output(hidden=X, past="cache"), "hidden", new)
    assert rebuilt.hidden is rebuilt["hidden"] is new


def test_a_tensor_is_its_own_feature():
    assert place_of(X) is None
    assert take(X, None) is X
    assert put(X, None, Y) is Y


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (None, "returns NoneType, need a tensor"),
        ("text", "returns str, need a tensor"),
        ((), "returns tuple, need a tensor"),
        ((IDS, None), "returns tuple of Tensor, NoneType, need a tensor, or a container that holds a float tensor"),
        (((X, Y), Y, X), r"returns tuple with float tensors at \[1, 2\]; need a single one, or one that comes first"),
    ],
)
def test_an_output_without_a_clear_feature_says_what_it_is(output, said):
    with pytest.raises(ValueError, match=said):
        place_of(output)


@pytest.mark.parametrize(("output", "place"), [((), 0), ("abc", 0), ({"a": X}, "b"), (None, "hidden")])
def test_a_place_that_is_gone_holds_nothing(output, place):
    assert take(output, place) is None


def test_all_tensors_are_found_in_nested_containers():
    found = list(tensors_in({"a": (X, [Y]), "b": Frozen(None, IDS, {"c": X}), "d": "text"}))
    assert [id(t) for t in found] == [id(t) for t in (X, Y, IDS, X)]
