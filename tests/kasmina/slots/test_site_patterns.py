"""Sites by pattern, inputs by keyword, and the package's own door to attach."""

import sys
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import esper
from esper.kasmina.attach import attach
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import Phase
from esper.leyline.errors import ConfigError
from tests.support.patience import run_patiently
from tests.support.stateful_model import IMAGES, images, seed_for


class Backwards(nn.Module):
    """Runs its blocks in another order than they were registered."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return self.head(x if scale is None else x * scale)


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def test_a_pattern_names_slots_in_the_order_of_execution():
    grown = attach(Backwards(12), sites=r"blocks\.\d+", example=X)
    assert list(grown.sites) == [f"r{row}c0" for row in range(12)]
    assert [site.module for site in grown.sites.values()] == [f"blocks.{11 - row}" for row in range(12)]


def test_a_pattern_matches_whole_names():
    assert [s.module for s in attach(images(), r"blocks\.\d", IMAGES).sites.values()] == ["blocks.0", "blocks.1"]
    assert [s.module for s in attach(images(), r"norm|blocks\.1", IMAGES).sites.values()] == ["norm", "blocks.1"]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"locks\.\d+", "matches no module's whole name; did you mean blocks.0, blocks.1"),
        (r"block\.\d+", "matches no module's whole name; did you mean blocks.0, blocks.1"),
        ("encoder.layer", "matches no module's whole name; it has stem, norm, drop, blocks, blocks.0"),
        ("", "matches no module's whole name"),
        ("blocks.(", "not a regular expression (missing ), unterminated subpattern at position 7)"),
        ("blocks.*", "site 'blocks' of sites = 'blocks.*' fired 0 times in one train() forward, need exactly once"),
    ],
)
def test_a_pattern_that_does_not_serve_is_one_line_and_leaves_nothing_behind(pattern, said):
    model = images()
    with pytest.raises(ConfigError) as caught:
        attach(model, pattern, IMAGES)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hasattr(model, CONTAINER)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


# inputs ------------------------------------------------------------------------------------------------------------

SCALE = torch.tensor(2.0)
INPUTS = pytest.mark.parametrize(
    ("args", "kwargs"), [((X,), {}), ((X, SCALE), {}), ((), {"x": X, "scale": SCALE})], ids=["one", "tuple", "keywords"]
)


@INPUTS
def test_an_example_is_an_input_a_tuple_or_keywords(args: tuple[Any, ...], kwargs: dict[str, Any]):
    example = kwargs or (args if len(args) > 1 else args[0])
    host = Backwards()
    expected = host(*args, **kwargs)
    grown = attach(host, r"blocks\.\d", example)
    assert torch.equal(host(*args, **kwargs), expected)
    host.blocks[0].bias.requires_grad_(False)
    host.head = nn.Linear(4, 2)
    assert grown.parameters_without_gradient(*args, **kwargs) == []


@INPUTS
def test_incubation_takes_what_the_model_takes_and_reaches_the_seed_alone(args, kwargs):
    torch.manual_seed(0)
    grown = attach(Backwards(), r"blocks\.\d", X)
    grown.slots["r1c0"].plant(nn.Linear(4, 4))
    loss = grown.incubate("r1c0", *args, **kwargs).square().sum()
    loss.backward()
    with grown.override({"r1c0": 1.0}):
        assert torch.equal(grown.model(*args, **kwargs).square().sum(), loss)
    reached = {name for name, p in grown.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {f"{CONTAINER}.r1c0.seed.weight", f"{CONTAINER}.r1c0.seed.bias"}


# looking -----------------------------------------------------------------------------------------------------------


def test_status_shows_every_slot_as_it_stands(capsys):
    grown = attach(images(), {"r0c0": "norm", "r0c1": "blocks.0", "r1c0": "blocks.1"}, IMAGES)
    grown.slots["r0c1"].plant(seed_for(grown, "r0c1"))
    grown.slots["r0c1"].phase = Phase.BLEND
    grown.slots["r0c1"].set_alpha(0.25)
    console = Console(width=120, record=True)
    table = grown.status(console)
    rows = [list(column.cells) for column in table.columns]
    lines = list(zip(*rows, strict=True))
    assert [column.header for column in table.columns] == [
        "slot",
        "site",
        "layout",
        "dim",
        "phase",
        "alpha",
        "parameters",
    ]
    assert lines[0] == ("r0c0", "norm", "BCHW", "4", "empty", "-", "-")
    assert lines[1] == ("r0c1", "blocks.0", "BCHW", "6", "blend", "0.250", str(grown.seed_parameters("r0c1")))
    assert "Images: 3 slots" in console.export_text()
    capsys.readouterr()
    with grown.disabled():
        table = grown.status()
    assert list(table.columns[4].cells)[1] == "blend (override)"
    assert list(table.columns[5].cells)[1] == "0.000"
    assert "r0c1" in capsys.readouterr().out


def test_attach_is_at_the_door_of_the_package():
    assert esper.attach is attach
    with pytest.raises(AttributeError, match="module 'esper' has no attribute 'attacj'"):
        esper.attacj  # noqa: B018


@pytest.mark.parametrize("module", ["esper", "esper.leyline", "esper.leyline.legality"])
def test_the_contracts_load_without_torch(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'numpy', 'rich', 'esper.kasmina'}} & set(sys.modules)))"
    done = run_patiently([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
