"""Ranks that run unequal copies of the user's own code: refused at the start, or before the newborn is planted."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
import esper.worker
from esper.config.tree import write_config
from esper.kasmina.blueprints import blueprint
from esper.leyline.errors import EsperError, LockstepError
from esper.leyline.topology import Topology
from esper.tolaria.ranks.computed import Computation, describe_computed
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.handshake import shake_hands
from esper.tolaria.ranks.world import World
from tests.support.dist import run_distributed
from tests.support.sessions import EVERY, GATES, A, batch, loss, make, probe, train
from tests.support.tiny import act, custom_host, schedule, tiny_plain

NET = """from torch import nn
import stale_layers


def build(input_shape, classes):
    layers = [nn.Conv2d(1, 8, 3, padding=1), stale_layers.act(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(32, classes))
"""
LAYERS = "from torch import nn\n\n\ndef act():\n    return nn.ReLU()\n"


def work(rank: int, folder: Path) -> tuple[int, dict[str, Any]]:
    sys.path.insert(0, str(folder / ("old" if rank == 1 else "new")))
    code = esper.worker.run(folder / "RUN" / "config.yaml")
    return code, json.loads((folder / "RUN" / "STATUS.json").read_text()) if rank == 0 else {}


def start(folder: Path, stale: dict[str, str], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> str:
    """Starts a run whose rank 1 has other files; returns the status's message."""
    for name in ("new", "old"):
        (folder / name).mkdir()
        (folder / name / "stale_net.py").write_text(NET)
        (folder / name / "stale_layers.py").write_text(LAYERS)
    for name, text in stale.items():
        (folder / "old" / name).write_text(text)
    (folder / "RUN").mkdir()
    monkeypatch.syspath_prepend(str(folder / "new"))
    host = custom_host("stale_net:build", {"r0c0": "1"})
    plain = tiny_plain("cnn", run__dir=str(folder / "RUN"), trainer__steps=4, host=host, **settings)
    write_config(folder / "RUN" / "config.yaml", plain)
    (code, status), (other, _) = run_distributed(work, 2, folder)
    assert code == other
    assert (status["status"] == "done") == (code == 0)
    return str(status["message"])


def test_a_run_with_another_activation_on_one_rank_is_refused_by_source_and_by_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = start(tmp_path, {"stale_layers.py": LAYERS.replace("ReLU", "Tanh")}, monkeypatch)
    assert "ranks are unequal: code: rank 0 has stale_layers:" in message
    assert "the source of stale_layers is not the same on every host" in message
    for what in ("output", "gradients"):
        for mode in ("train", "eval"):
            assert f"{what} of the model in {mode}(): rank 0 has " in message
    assert "weights and inputs are equal, what is computed is not" in message


def test_a_changed_source_that_computes_the_same_is_refused_as_code_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = start(tmp_path, {"stale_net.py": NET + "# a line more\n"}, monkeypatch)
    assert message.startswith("ranks are unequal: code: rank 0 has stale_net:")
    assert message.endswith("; bring one copy of your code to all of them)")
    assert "in train()" not in message


def test_equal_sources_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(tmp_path, {}, monkeypatch) == ""


# sessions ------------------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """Computes by the rank that it is on, as a stale file would."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) if os.environ["RANK"] == "0" else torch.tanh(x)


def stale_loss(model: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    smoothing = 0.1 if os.environ["RANK"] == "1" else 0.0
    return F.cross_entropy(model(data[0]), data[1], reduction="none", label_smoothing=smoothing)


def plain_host(act_: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Conv2d(1, 4, 3, padding=1), act_, nn.Dropout(0.1)]
        layers += [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
        return nn.Sequential(*layers).double()


def begun(rank: int, case: str) -> str:
    try:
        if case == "host":
            make(plain_host(Gate()))
        elif case == "loss":
            make(plain_host(nn.ReLU()), loss=stale_loss)
        elif case == "restored":  # no example: the loss on a batch of the probe is what is compared
            grown = esper.attach(plain_host(Gate()), {A: "0"}, batch(0, 2)[0])
            grown.example = None
            optimizer = torch.optim.SGD(grown.model.parameters(), lr=0.1)
            esper.Session(grown, optimizer, loss=loss, probe=probe(), gates=GATES, controller="none")
    except EsperError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("case", "name"), [("host", "model"), ("loss", "loss"), ("restored", "loss")])
def test_a_session_whose_ranks_compute_otherwise_is_refused(case: str, name: str) -> None:
    texts = run_distributed(begun, 2, case)
    assert texts[0] == texts[1]
    assert f"output of the {name} in train(): rank 0 has " in texts[0]
    assert f"gradients of the {name} in eval(): rank 0 has " in texts[0]
    assert "weights:" not in texts[0]
    if case == "loss":
        assert "the model" not in texts[0].replace("the model's code", "")


# newborns ------------------------------------------------------------------------------------------------------------

STALE = schedule(act(1, A, "GERMINATE", blueprint="stale", ticks=2), act(3, A, "ADVANCE"))


def register_stale() -> None:
    @blueprint("stale", topology=Topology.FEATURE_MAP, parameters=lambda dim: dim, flops=lambda dim, positions: 0)
    class Stale(nn.Module):
        """A scale per channel of what differs between ranks."""

        def __init__(self, dim: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((dim, 1, 1), 0.01))

        def forward(self, x_BCHW: Tensor) -> Tensor:
            curve = torch.relu if os.environ["RANK"] != os.environ.get("STALE_RANK") else torch.tanh
            return curve(x_BCHW) * self.scale


def born(rank: int, stale: str) -> tuple[str, int, list[str]]:
    os.environ["STALE_RANK"] = stale
    register_stale()
    session = make(plain_host(nn.ReLU()), actions=STALE["actions"])
    try:
        train(session, range(4 * EVERY), 12)
    except LockstepError as error:
        text = str(error)
    else:
        text = ""
    return text, session.steps, sorted(n for n, _ in session.grown.model.named_parameters() if "seed" in n)


def test_a_newborn_that_computes_otherwise_on_a_rank_is_named_before_it_is_planted() -> None:
    found = run_distributed(born, 3, "2")
    assert {text for text, _, _ in found} == {
        "ranks parted before tick 2, step 4: slot r0c0 newborn differs on rank 2 (the new seed computes something else "
        "there: is it the same copy of the blueprint's code?)"
    }
    assert {steps for _, steps, _ in found} == {2 * EVERY}
    assert all(names == [] for _, _, names in found)
    assert {text for text, _, _ in run_distributed(born, 2, "none")} == {""}


def revived(rank: int, folder: Path, stale: str) -> str:
    os.environ["STALE_RANK"] = stale
    register_stale()
    if stale == "none":
        session = make(plain_host(nn.ReLU()), actions=STALE["actions"])
        train(session, range(3 * EVERY))
        session.save(folder / "s.pt")
        return "saved"
    try:
        esper.Session.restore(folder / "s.pt", lambda: plain_host(nn.ReLU()), loss=loss, probe=probe())
    except LockstepError as error:
        return str(error)
    return "restored"


def test_a_restored_seed_that_computes_otherwise_on_a_rank_is_named(tmp_path: Path) -> None:
    assert run_distributed(revived, 2, tmp_path, "none") == ["saved"] * 2
    texts = run_distributed(revived, 2, tmp_path, "1")
    assert texts[0] == texts[1]
    assert texts[0].startswith("ranks are unequal: gradients of the seed in r0c0 in train(): rank 0 has ")


# what is computed, by itself -----------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Never equals itself: a generator of its own, seeded by the rank."""

    def __init__(self, apart: float, size: float = 1e-3) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8).double()
        nn.init.constant_(self.linear.weight, 0.5)
        nn.init.zeros_(self.linear.bias)
        self.own = torch.Generator().manual_seed(int(os.environ["RANK"]))
        self.apart, self.size = apart * int(os.environ["RANK"]), size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x)
        return y, y + self.apart + self.size * torch.randn(y.shape, generator=self.own, dtype=y.dtype)


def compared(rank: int, apart: float) -> tuple[str, dict[str, str]]:
    world = World(WorldConfig(), ControlConfig())
    model, x = Noisy(apart), torch.ones(4, 8, dtype=torch.float64)
    fields = describe_computed(world, {"it": Computation(model, lambda: model(x))})
    try:
        shake_hands(world, fields)
    except LockstepError as error:
        return str(error), fields
    finally:
        world.close()
    return "", fields


def test_what_does_not_equal_itself_is_compared_within_its_own_difference() -> None:
    (text, fields), (_, other) = run_distributed(compared, 2, 0.0)
    assert text == ""
    assert fields == other
    assert "; output[1] within 0.0" in fields["output of it in train()"]
    (text, _), (again, _) = run_distributed(compared, 2, 1.0)
    assert text == again
    assert "output of it in train(): rank 0 has" in text
