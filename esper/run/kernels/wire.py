"""What goes to the process that compiles ahead: plain data, and the shape of a batch in place of the data."""

from typing import Any

import torch
from torch import Tensor


def describe_batch(example: Any) -> Any:
    """Shapes, strides and dtypes of a batch that may be nested in lists, tuples and dicts, as plain data.

    Raises:
        ValueError: it holds something else.
    """
    if isinstance(example, Tensor):
        dtype = str(example.dtype).removeprefix("torch.")
        return {"shape": list(example.shape), "stride": list(example.stride()), "dtype": dtype}
    if isinstance(example, dict) and all(isinstance(key, str) for key in example):
        return {"dict": {key: describe_batch(value) for key, value in example.items()}}
    if type(example) in (list, tuple):
        return {type(example).__name__: [describe_batch(value) for value in example]}
    if example is None or isinstance(example, bool | int | float | str):
        return {"value": example}
    raise ValueError(f"a batch with a {type(example).__name__} in it cannot be described")


def make_batch(plain: Any, device: torch.device) -> Any:
    """Makes a batch of zeros of such shapes, strides and dtypes."""
    if "shape" in plain:
        dtype = getattr(torch, plain["dtype"])
        return torch.empty_strided(plain["shape"], plain["stride"], dtype=dtype, device=device).zero_()
    if "dict" in plain:
        return {key: make_batch(value, device) for key, value in plain["dict"].items()}
    if "list" in plain:
        return [make_batch(value, device) for value in plain["list"]]
    if "tuple" in plain:
        return tuple(make_batch(value, device) for value in plain["tuple"])
    return plain["value"]
