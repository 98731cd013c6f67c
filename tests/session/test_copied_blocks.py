"""A session with copies of the host's blocks: saved in their midst and restored without an example, it goes on."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import esper
from tests.support.block_hosts import Stack
from tests.support.sessions import GATES, scheduled
from tests.support.tiny import act, bits

LIFE = (
    act(1, "r0c0", "GERMINATE", blueprint="copy", ticks=2),
    act(2, "r1c0", "GERMINATE", blueprint="copy", ticks=1),
    *(act(tick, slot, "ADVANCE") for tick in (4, 5, 8) for slot in ("r0c0", "r1c0")),
    act(9, "r0c0", "FOSSILIZE"),
)


def build() -> nn.Module:
    torch.manual_seed(3)
    return Stack().double()


def loss(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(model(data[0]), data[1], reduction="none")


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step + 100)
    return torch.randn(8, 8, generator=generator).double(), torch.randint(3, (8,), generator=generator)


def train(session: esper.Session, steps: range) -> None:
    for step in steps:
        session.loss(batch(step)).backward()
        session.step()


def test_saved_in_their_midst_a_session_goes_on_alike(tmp_path: Path) -> None:
    def begin() -> esper.Session:
        model = build()
        grown = esper.attach(model, r"blocks\.\d+", batch(0)[0])
        return esper.Session(
            grown,
            torch.optim.AdamW(model.parameters(), lr=0.01),
            controller=scheduled(LIFE),
            loss=loss,
            probe=[batch(-step) for step in range(1, 9)],
            gates=GATES,
            slots={"incubation": "immediate", "max_live": None, "blocks": ["copy"]},
            every=2,
        )

    calm = begin()
    train(calm, range(24))
    for at in (3, 13):  # staged and not entered, and in the midst of the ramps
        cut = begin()
        train(cut, range(at))
        cut.save(tmp_path / f"{at}")
        restored = esper.Session.restore(
            tmp_path / f"{at}", build, loss=loss, probe=[batch(-step) for step in range(1, 9)]
        )
        train(restored, range(at, 24))
        assert bits(restored.grown.model.state_dict().items()) == bits(calm.grown.model.state_dict().items()), at
    assert calm.grown.slots["r0c0"].seed is not None
