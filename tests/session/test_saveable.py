"""What a session can save: numpy's numbers as numbers; anything else is refused when the session is made."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esper
from esper.leyline.errors import ConfigError
from tests.support.sessions import host, loss, make, probe, replica, train


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=np.logspace(-3, -1, 3)[1], weight_decay=np.float32(0.125))  # type: ignore[arg-type]

    def schedule(made: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(made, lambda step: np.cos(step / 10) ** 2)

    def build() -> esper.Session:
        return make(
            optimizer=optimizer,
            scheduler=schedule,
            actions=(),
            every=np.int64(2),
            seed_lr_scale=np.float64(1.0),
        )

    session = build()
    train(session, range(4))
    session.save(tmp_path / "x.pt")
    restored = esper.Session.restore(
        tmp_path / "x.pt", host, optimizer=optimizer, scheduler=schedule, loss=loss, probe=probe()
    )
    for one in (session, restored):
        train(one, range(4, 8))
    assert replica(restored) == replica(session)
    assert type(torch.load(tmp_path / "x.pt", weights_only=True)["optimizer"]["groups"][0]["options"]["lr"]) is float


class Mine:
    name = "mine"

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state

    def decide(self, observation: Any) -> list[Any]:
        return []

    def state_dict(self) -> dict[str, Any]:
        if "error" in self.state:
            raise KeyError("error")
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = dict(state)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"controller": Mine({"seen": {"r0c0"}})}, r"^controller\.seen: a set cannot be saved"),
        ({"controller": Mine({"error": 1})}, r"a state_dict\(\) fails, so session\.save would: KeyError"),
        ({"optimizer": lambda model: torch.optim.SGD([{"params": model.parameters(), "tag": {1}}])}, "tag: a set"),
    ],
)
def test_what_cannot_be_saved_is_said_when_the_session_is_made(more: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make(**more)
