"""Guards of environments and of learning a policy that no other test makes fire."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from esper.leyline.errors import CheckpointError, ConfigError, EsperError
from esper.simic.ppo.rollout import read_observation
from esper.simic.ppo.saves import FORMAT, load, load_shared
from esper.simic.probes.registry import make_probe
from esper.tamiyo.policy.options import OPTIONS
from tests.simic.env.test_vector import RECALL, environment, waiting
from tests.support.policies import Idle, training_of
from tests.support.refusals import fails

CPU = torch.device("cpu")


def moved() -> None:
    state = make_probe("one_action", 2).state_dict()
    make_probe("one_action", 3).load_state_dict(state)


def of_another_number(folder: Path) -> None:
    torch.save({"format": FORMAT, "ranks": 1}, folder / "shared.pt")
    ranks: Any = SimpleNamespace(size=2, rank=0)
    load(folder, ranks)


class Lost(Idle):
    """Its rewards are none."""

    def step(self, actions: Any) -> Any:
        seen, rewards, *rest = super().step(actions)
        return seen, np.full_like(rewards, np.nan), *rest


def learn(env: Any, spare: bool) -> None:
    training = training_of(env, updates=1, hidden=8, width=16, seed=9, plan={"folder": None, "save_every": 100})
    if spare:
        training.agent.spare = nn.Parameter(torch.zeros(1))
    training.run(should_stop=lambda: False, after_update=lambda update: None)


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda tmp: make_probe("maze", 1),
            ConfigError,
            r"^env\.name = 'maze': no such environment; there are one_a",
        ),
        (lambda tmp: replace(OPTIONS, ops=OPTIONS.ops[1:]), ValueError, "^options: the first op must be WAIT, and no"),
        (
            lambda tmp: replace(OPTIONS, targets=(2.0,)),
            ValueError,
            r"^options: ticks .* must be 0 to 10000, targets \(2\.0,\) 0 to 1$",
        ),
        (lambda tmp: moved(), CheckpointError, r"^saved with 2 environments, this has 3$"),
        (
            lambda tmp: read_observation({"x": np.zeros(2)}, CPU),
            EsperError,
            r"^observation 'x': float64; environments give float32, int64 or bool arrays$",
        ),
        (
            lambda tmp: load_shared(tmp),
            CheckpointError,
            r"shared\.pt: not there; the checkpoint is incomplete, remove its folder$",
        ),
        (of_another_number, CheckpointError, r"saved by 1 ranks, these are 2; start as many as before$"),
        (lambda tmp: learn(Lost(4), spare=False), EsperError, r"^environment 0: reward nan after 1 steps$"),
        (lambda tmp: learn(Idle(4), spare=True), EsperError, r"^parameter spare: no gradient; a head that no decision"),
    ],
)
def test_environments_and_saves(call: Callable[[Path], Any], kind: type[Exception], text: str, tmp_path: Path) -> None:
    fails(lambda: call(tmp_path), kind, text)


def test_an_environment_that_has_not_begun() -> None:
    env = environment(1, (RECALL,))
    fails(lambda: env.step(waiting(env)), EsperError, "^step before reset$")
    fails(lambda: env.reset(options={"task": 1}), EsperError, "^reset options task: this environment has none$")
    env.close()
