"""Exported models on disk: loaded and run where there is no esper, whole or not there at all."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.export import writing
from esper.kasmina.export.exporter import export
from esper.kasmina.export.program import _free_sizes
from esper.kasmina.export.writing import save_exported
from esper.kasmina.hosts import GPTConfig, ResNet20Config, build_host
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import ConfigError, ExportError
from tests.kasmina.test_any_model import CASES, normed, pair
from tests.support.bitwise import bits
from tests.support.dist import ROOT
from tests.support.working_seeds import grow_all, without_esper

RUN = """
import sys, torch
try:
    import esper
    raise SystemExit("esper is here")
except ImportError:
    pass
outputs = {}
for folder, (name, batches) in torch.load("inputs.pt").items():
    if name == "program.pt2":
        module = torch.export.load(f"{folder}/{name}").module()
    else:
        module = torch.load(f"{folder}/{name}", weights_only=False)
    outputs[folder] = [module(x) for x in batches]
torch.save(outputs, "outputs.pt")
print(sorted(name for name in sys.modules if name.startswith(("esper.", "tests"))))
"""


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / writing.TOPOLOGY).read_text())
    return found


def grown_host(kind: str) -> tuple[Grown, Tensor]:
    torch.manual_seed(3)
    if kind == "gpt":
        host = build_host(GPTConfig(layers=2, heads=2, dim=16, block=12, sites=["block", "mlp"]), (8,), 24)
        example = torch.arange(24).view(3, 8)
        names = {"r0c0": "attention", "r0c2": "lora", "r1c0": "norm", "r1c2": "mlp"}
    else:
        host = build_host(ResNet20Config(width=4), (3, 8, 8), 5)
        example = torch.randn(3, 3, 8, 8)
        names = {"r0c0": "attention", "r1c0": "conv_small", "r2c0": "norm"}
    grown = attach(host, {point.slot: point.module for point in host.injection_points()}, example)
    return grow_all(grown, blueprints=names), example


@pytest.mark.parametrize("some", [("tied", "pickled"), pytest.param(("gpt", "resnet20"), marks=pytest.mark.slow)])
def test_exported_models_run_where_there_is_no_esper(some, tmp_path, monkeypatch):
    """Hosts of ours, one of the user's own class, and one that is pickled; other batch sizes than the example's too."""
    tied, _ = pair(CASES["tied"])
    normal = (grow_all(attach(normed(), "1|4|7", torch.ones(3, 2, 6, 6))), torch.randn(3, 2, 6, 6))
    models = {
        "gpt": grown_host("gpt"),
        "resnet20": grown_host("resnet20"),
        "tied": (grow_all(tied), CASES["tied"].example),
        "pickled": normal,
    }
    models = {name: models[name] for name in some}
    inputs: dict[str, Any] = {}
    for name, (grown, example) in models.items():
        if name == "pickled":
            monkeypatch.setattr(writing, "write_program", refuse)
        folder = save_exported(export(grown), tmp_path / name)
        record, file = record_of(folder), writing.PICKLE if name == "pickled" else writing.PROGRAM
        assert record["batch"] == "any"
        assert record["needs"] == ["torch"]
        assert record["torch_export_refused"] == ("RuntimeError: not today" if name == "pickled" else None)
        assert sorted(os.listdir(folder)) == sorted([writing.WEIGHTS, file, writing.TOPOLOGY])
        inputs[name] = (file, [example, torch.cat([example, example.flip(0)]), example[:1]])
    torch.save(inputs, tmp_path / "inputs.pt")
    assert without_esper(RUN, tmp_path).strip() == "[]"
    outputs = torch.load(tmp_path / "outputs.pt")
    with torch.no_grad():
        for name, (grown, _) in models.items():
            for got, x in zip(outputs[name], inputs[name][1], strict=True):
                assert torch.allclose(got, grown.model.eval()(x), atol=1e-5), name


def refuse(*args: Any) -> str:
    raise RuntimeError("not today")


def test_the_record_says_what_grew_and_what_the_files_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "write_program", refuse)
    grown, _ = grown_host("gpt")
    folder = save_exported(export(grown), tmp_path / "out", {"made_by": "a test"})
    record = record_of(folder)
    assert record["about"] == {"made_by": "a test"}
    assert record["inputs"] == {"args": [{"dtype": "int64", "shape": [3, 8]}], "kwargs": {}}
    assert record["outputs"] == [{"dtype": "float32", "shape": [3, 8, 24]}]
    ways = {slot["slot"]: (slot["seed"], slot["way"], slot["where"]) for slot in record["slots"]}
    assert ways == {
        "r0c0": ("SelfAttention", "MODULE", "grown.r0c0"),
        "r0c2": ("LowRank", "FOLDED", "blocks.0.down"),
        "r1c0": ("NormSequence", "MODULE", "grown.r1c0"),
        "r1c2": ("MLP", "MODULE", "grown.r1c2"),
    }
    assert sorted(record["files"]) == [writing.WEIGHTS, writing.PICKLE]
    for name, entry in record["files"].items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_weights_come_back_from_safetensors_by_the_key_map(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "write_program", refuse)
    grown, example = grown_host("gpt")
    exported = export(grown, fold=False)
    folder = save_exported(exported, tmp_path / "out")
    record = record_of(folder)
    assert record["tied"] == {"head.weight": "tokens.weight"}
    tensors = load_file(folder / writing.WEIGHTS)
    state = tensors | {name: tensors[first] for name, first in record["tied"].items()}
    for key, value in grown.model.state_dict().items():
        assert bits(state[record["keys"][key]], value), key
    with torch.no_grad():
        for parameter in exported.module.parameters():
            parameter.zero_()
    exported.module.load_state_dict(state, strict=True)
    assert bits(exported.module(example), grown.model.eval()(example))


class Branching(nn.Module):
    """torch.export takes no branch on values."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) if x.sum() > 100 else self.two(-self.one(x))


def branching() -> Grown:
    torch.manual_seed(0)
    return grow_all(attach(Branching(), {"r0c0": "one"}, torch.randn(3, 4)))


def test_what_torch_export_refuses_is_pickled_and_says_so(tmp_path):
    grown = branching()
    folder = save_exported(export(grown), tmp_path / "out")
    record = record_of(folder)
    assert sorted(record["files"]) == [writing.WEIGHTS, writing.PICKLE]
    assert "data-dependent" in record["torch_export_refused"]
    assert record["needs"] == ["tests", "torch"]
    assert "load only what you trust" in record["load"][writing.PICKLE]
    x = torch.randn(5, 4)
    again = torch.load(folder / writing.PICKLE, weights_only=False)
    assert bits(again(x), export(grown).module(x))


def test_a_module_that_neither_can_write_is_refused_with_both_reasons(tmp_path):
    grown = branching()
    grown.model.note = lambda: None
    with pytest.raises(
        ConfigError, match=r"neither torch\.export \(.*data-dependent.*\) nor pickle \(.*lambda.*\) can"
    ):
        save_exported(export(grown), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_pickle_that_names_esper_is_never_left(tmp_path):
    grown = branching()
    grown.model.note = Grown
    with pytest.raises(ExportError, match=r"the module still needs esper\.kasmina\.slots\.grown"):
        save_exported(export(grown), tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_program_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    grown, _ = pair(CASES["tied"])
    exported = export(grow_all(grown))
    real = torch.export.export

    def other(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            module.body.weight.mul_(2)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", other)
    folder = save_exported(exported, tmp_path / "out")
    assert record_of(folder)["torch_export_refused"].startswith("export moved output 0 by")


@pytest.mark.parametrize("fails", ["save_file", "_sync_and_hash", "sync"])
def test_a_write_that_fails_leaves_nothing(fails, tmp_path, monkeypatch):
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, fails, full)
    monkeypatch.setattr(writing, "write_program", lambda *args: [])
    grown, _ = pair(CASES["tied"])
    with pytest.raises(OSError, match="No space left"):
        save_exported(export(grow_all(grown)), tmp_path / "deep" / "out")
    assert not (tmp_path / "deep" / "out").exists()
    assert os.listdir(tmp_path / "deep") == []


def test_a_folder_that_holds_something_is_left_alone_and_an_empty_one_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "write_program", lambda *args: [])
    grown, _ = pair(CASES["tied"])
    exported = export(grow_all(grown))
    (tmp_path / "out").mkdir()
    save_exported(exported, tmp_path / "out")
    before = sorted(os.listdir(tmp_path / "out"))
    with pytest.raises(FileExistsError, match="exists already; name a new folder"):
        save_exported(exported, tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == before
    assert os.listdir(tmp_path) == ["out"]


def test_one_sample_is_a_batch_of_one_for_good(tmp_path):
    torch.manual_seed(0)
    grown = grow_all(attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {"r0c0": "0"}, torch.randn(1, 4)))
    assert record_of(save_exported(export(grown), tmp_path / "out"))["batch"] == "1"


def test_the_example_in_the_docs_runs_as_it_stands(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    grown, _ = pair(CASES["sequential with BatchNorm and dropout"])
    world: dict[str, Any] = {"grown": grow_all(grown)}
    monkeypatch.chdir(tmp_path)
    exec(code, world)
    x = torch.randn(4, 2, 6, 6)
    with torch.no_grad():
        expected = grown.model.eval()(x)
        assert torch.allclose(world["plain"](x), expected, atol=1e-5)
        assert torch.allclose(world["program"](x), expected, atol=1e-5)
    assert world["folder"] == tmp_path / "exported"


@pytest.mark.parametrize("seed", ["attention", "mlp"])
def test_a_program_is_free_in_length_as_in_batch_up_to_what_its_host_takes(seed, tmp_path):
    torch.manual_seed(3)
    host = build_host(GPTConfig(layers=1, heads=2, dim=16, block=12), (8,), 24)
    grown = grow_all(attach(host, {"r0c0": "blocks.0"}, torch.arange(24).view(3, 8)), blueprints={"r0c0": seed})
    exported = export(grown)
    record = record_of(folder := save_exported(exported, tmp_path / "out"))
    assert record["batch"] == "any"
    assert record["free"] == [
        {"sizes": ["args[0], axis 0"], "least": 1, "most": None},
        {"sizes": ["args[0], axis 1"], "least": 1, "most": 12},
    ]
    program = torch.export.load(folder / writing.PROGRAM).module()
    with torch.no_grad():
        for shape in ((3, 8), (5, 12), (1, 1), (2, 5)):
            x = torch.randint(24, shape)
            assert torch.allclose(program(x), exported.module(x), atol=1e-6), shape
            assert torch.allclose(program(x), host.eval()(x), atol=1e-6), shape
    with pytest.raises(Exception, match="12"):
        program(torch.zeros(1, 13, dtype=torch.int64))


def test_only_what_a_model_leaves_open_is_free(tmp_path):
    """Pooling leaves height and width open; a Linear over all positions fixes them."""
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    free = {}
    for name, body in (("pooled", pooled), ("fixed", fixed)):
        grown = grow_all(attach(Around(body), "body.1", torch.randn(2, 3, 6, 6)))
        record = record_of(save_exported(export(grown), tmp_path / name))
        assert record["batch"] == "any"
        free[name] = [size["sizes"] for size in record["free"]]
    assert free["pooled"] == [["args[0], axis 0"], ["args[0], axis 2"], ["args[0], axis 3"]]
    assert free["fixed"] == [["args[0], axis 0"]]


class Around(nn.Module):
    """Calls its body; with a mask, keeps those positions."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y: Tensor = self.body(x)
        return y if mask is None else y * mask[..., None]


def test_sizes_that_belong_together_are_told_together_and_a_length_written_down_stays(tmp_path):
    x, mask = torch.randn(2, 7, 6), torch.ones(2, 7)
    body = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
    grown = grow_all(attach(Around(body), "body.1", {"x": x, "mask": mask}, layout="BTC"))
    record = record_of(save_exported(export(grown), tmp_path / "two"))
    assert [size["sizes"] for size in record["free"]] == [
        ["kwargs['x'], axis 0", "kwargs['mask'], axis 0"],
        ["kwargs['x'], axis 1", "kwargs['mask'], axis 1"],
    ]
    fixed = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (7, 1)), nn.Flatten(1, 2), nn.ReLU())
    grown = grow_all(attach(Around(fixed), "body.3", x))
    record = record_of(save_exported(export(grown), tmp_path / "fixed"))
    assert (record["batch"], [size["sizes"] for size in record["free"]]) == ("any", [["args[0], axis 0"]])


class Doubled(nn.Module):
    """Takes one input twice as long as the other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.view(-1, 2) + y[:, None]


def test_a_size_that_is_a_formula_of_another_is_not_told_as_free() -> None:
    n, inputs = torch.export.Dim("n", min=2, max=64), (torch.ones(8), torch.ones(4))
    program = torch.export.export(Doubled(), inputs, dynamic_shapes={"x": {0: 2 * n}, "y": {0: n}})
    with pytest.raises(ExportError, match=r"^the size of axis 0 of input .* is 2\*"):
        _free_sizes(program, (inputs, {}))
