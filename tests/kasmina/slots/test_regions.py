"""Regions: what may be compiled whole, how often it is, and what becomes of it when it cannot be."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.compiler import Compiler
from esper.kasmina.hosts import CNNConfig, GPTConfig, build_host
from esper.kasmina.kernels.rehearsing import resize_batch
from esper.kasmina.slots.regions import Region, choose_regions, compile_failures, region_of, strip
from esper.leyline.errors import ConfigError


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.one.in_features:
            raise ValueError("another width")
        return x + self.two(torch.tanh(self.one(x)))


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no such instruction")


def region(width: int = 4, backend: Any = "eager", **more: Any) -> tuple[Block, Region]:
    torch.manual_seed(width)
    block = Block(width)
    block.forward = Region(block, "forward", backend, **more)  # type: ignore[method-assign,assignment]
    return block, block.forward


def test_fourteen_widths_of_one_class_are_compiled_once_each_whatever_the_batch():
    torch._dynamo.utils.counters.clear()
    for width in range(1, 15):
        block, compiled = region(width)
        for size in (5, 40):
            x = torch.randn(size, width)
            assert torch.equal(block(x), Block.forward(block, x))
        assert (compiled.graphs, compiled.failure) == (1, None)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 14
    assert not torch._dynamo.utils.counters["graph_break"]


def test_three_graphs_serve_every_combination_of_flags():
    block, compiled = region()
    x = torch.randn(3, 4)
    leaf = x.clone().requires_grad_()
    parameters = dict(block.named_parameters())
    block(x).sum().backward()
    assert compiled.graphs == 1
    with torch.no_grad():
        block(x), block(leaf)
    assert compiled.graphs == 2
    frozen = {name: nn.Parameter(p.detach(), requires_grad=False) for name, p in parameters.items()}
    assert not torch.func.functional_call(block, frozen, (x,)).requires_grad
    assert compiled.graphs == 2, "nothing wants a gradient: that is a measurement"
    torch.func.functional_call(block, frozen, (leaf,)).sum().backward()
    assert compiled.graphs == 3
    block.requires_grad_(False)
    block(leaf).sum().backward()
    block(x)
    with torch.no_grad():
        block(x)
    assert compiled.graphs == 3
    assert all(parameters[name] is p for name, p in block.named_parameters()), "twins were taken away again"
    assert leaf.grad is not None


def test_the_limit_and_a_failed_compile_degrade_with_a_reason_and_the_same_numbers():
    block, compiled = region(limit=1)
    x = torch.randn(3, 4)
    block(x)
    with torch.no_grad():
        assert torch.equal(block(x), Block.forward(block, x))
    assert compiled.failure is not None
    assert compiled.failure.startswith("FailOnRecompileLimitHit")
    block, compiled = region(backend=broken)
    assert torch.equal(block(x), Block.forward(block, x))
    assert compiled.failure is not None
    assert "no such instruction" in compiled.failure
    assert "\n" not in compiled.failure
    block, compiled = region(backend=broken)
    compiled.strict = True
    with pytest.raises(compile_failures(), match="no such instruction"):
        block(x)


def test_an_error_of_the_module_s_own_is_no_failed_compile():
    block, compiled = region()
    for _ in range(2):
        with pytest.raises(ValueError, match="another width"):
            block(torch.randn(3, 5))
    assert compiled.failure is None
    block(torch.randn(3, 4))
    assert compiled.graphs == 1


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_casts_and_keys(twin):
    block, compiled = region()
    x = torch.randn(3, 4)
    expected = block(x)
    assert set(block.state_dict()) == set(Block(4).state_dict())
    copied = twin(block)
    mine = region_of(copied)
    assert mine is not None
    assert mine is not compiled
    assert mine.owner is copied
    assert torch.equal(copied(x), expected)
    assert (mine.graphs, compiled.graphs) == (1, 1)
    copied.double()
    assert torch.allclose(copied(x.double()), expected.double())
    with torch.no_grad():
        copied.two.bias.add_(1)
    assert torch.equal(block(x), expected)
    assert region_of(strip(copied)) is None
    assert torch.allclose(copied(x.double()), expected.double() + 1)


def test_regions_are_the_largest_parts_without_a_site_inside():
    cnn = build_host(CNNConfig(widths=[4, 8]), (1, 8, 8), 10)
    names = {name for name, _ in cnn.named_modules()}
    assert list(choose_regions(cnn, {"stages.0", "pools.0"}, names)) == ["stages.0", "stages.1"]
    gpt = build_host(GPTConfig(layers=2, heads=2, dim=16, block=16), (16,), 64)
    names = {name for name, _ in gpt.named_modules()}
    assert list(choose_regions(gpt, {"blocks.0", "blocks.1"}, names)) == ["blocks.0", "blocks.1"]
    assert list(choose_regions(gpt, {"blocks.0.project"}, names)) == ["blocks.1"], "its parts are single kernels"
    nested = nn.Sequential(nn.Sequential(Block(4), Block(4)), nn.Sequential(Block(4)))
    names = {name for name, _ in nested.named_modules()}
    assert list(choose_regions(nested, {"0.0"}, names)) == ["0.0", "0.1", "1"]
    assert list(choose_regions(nested, {"0.0"}, names - {"1"})) == ["0.0", "0.1", "1.0"], "1 itself is never called"


def test_a_rehearsal_leaves_no_trace_and_makes_every_graph_of_a_run():
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, part in {"a": Block(4), "norm": nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()), "b": Block(4)}.items():
        model.add_module(name, part)
    holder = nn.Module()
    holder.body = model
    holder.forward = lambda x: holder.body(x)  # type: ignore[method-assign]
    x = torch.randn(6, 4)
    grown = attach(holder, {"r0c0": "body.a"}, x)
    before = {name: tensor.clone() for name, tensor in holder.state_dict().items()}
    state = torch.get_rng_state()
    compiler = Compiler(grown, "eager", train_sizes=(6, 4), eval_sizes=(9,))
    compiler.host(x)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in holder.state_dict().items())
    assert all(p.grad is None for p in holder.parameters())
    assert all(module.training for module in holder.modules())
    assert {name: r.graphs for name, r in compiler.regions.items()} == {"body.a": 2, "body.norm": 4, "body.b": 3}
    grown.slots["r0c0"].plant(nn.Linear(4, 4))
    holder(x).sum().backward()
    grown.incubate("r0c0", x).sum().backward()
    with torch.no_grad():
        holder.eval()(torch.randn(9, 4))
    assert {name: r.graphs for name, r in compiler.regions.items()} == {"body.a": 2, "body.norm": 4, "body.b": 3}


def test_a_host_that_cannot_be_compiled_is_one_clear_line():
    model = nn.Sequential(Block(4), nn.Sequential(Block(4)))
    holder = nn.Module()
    holder.body = model
    holder.forward = lambda x: holder.body(x)  # type: ignore[method-assign]
    grown = attach(holder, {"r0c0": "body.0"}, torch.randn(3, 4))
    with pytest.raises(ConfigError, match=r"the host cannot be compiled: .*no such instruction.*set trainer\.compile"):
        Compiler(grown, broken, train_sizes=(3,), eval_sizes=(3,)).host(torch.randn(3, 4))


def test_sized_examples_keep_their_layout():
    image = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4).to(memory_format=torch.channels_last)
    five = resize_batch((image, {"mask": torch.ones(2, 7)}), 5)
    assert five[0].shape == (5, 3, 4, 4)
    assert five[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(five[0][4], image[0])
    assert five[1]["mask"].shape == (5, 7)
