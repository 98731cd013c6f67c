"""What an optimizer step with empty slots costs beyond the same step written by hand, in operators counted.

Wall time of small differences drowns in noise; the number of operators dispatched does not.
"""

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper.kasmina.slots.grown import HOST
from esper.leyline.alpha import Curve, Operator, Ramp
from esper.leyline.stages import Stage
from esper.tolaria.training.engine import Engine
from tests.support.tiny import make_engine, tiny_config


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(step: Callable[[], Any]) -> Counter[str]:
    step()  # the first optimizer step makes its state
    with Operators() as operators:
        step()
    return operators.seen


def by_hand(engine: Engine, network: nn.Module | None = None) -> Callable[[], None]:
    model = network or engine.fresh().model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    bundle, task, plan = engine.bundle, engine.bundle.task, engine.plan

    def step() -> None:
        x, y = bundle.train_batch(plan.indices(0), seed=0, epoch=0)
        loss, correct = task.per_sample(model(x), y)
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        (loss.detach().sum().item(), correct.sum().item())

    return step


def started(tmp_path: Path, **settings: Any) -> Engine:
    engine = make_engine(tiny_config("cnn", **settings), tmp_path)
    engine.begin(None)
    return engine


def test_empty_slots_add_no_operator_and_bookkeeping_adds_few(tmp_path: Path) -> None:
    three = started(tmp_path / "three")
    one = started(tmp_path / "one", slots__ids=["r0c0"])
    assert len(three.grown.slots) == 3
    ours, theirs = counted(three.train_step), counted(by_hand(three))
    assert ours == counted(one.train_step), "the number of empty slots makes no difference"
    heavy = [name for name in ours if any(word in name for word in ("conv", "norm_backward", "addmm", "mm."))]
    assert heavy
    assert {name: ours[name] for name in heavy} == {name: theirs[name] for name in heavy}
    extra = sum(ours.values()) - sum(theirs.values())
    assert 0 <= extra <= 40, (extra, ours - theirs)


class CNNByHand(nn.Module):
    """The tiny CNN with three seeds at half alpha, as somebody would write it who wanted this graph and no other."""

    def __init__(self, host: Any, seeds: list[nn.Module]) -> None:
        super().__init__()
        self.host, self.seeds = host, nn.ModuleList(seeds)

    def forward(self, x: Tensor) -> Tensor:
        for layer, seed in zip((self.host.stages[0], self.host.pools[0], self.host.stages[1]), self.seeds):
            x = layer(x)
            x = x + 0.5 * seed(x)
        return self.host.head(x.mean(dim=(2, 3)))


def blend_three(engine: Engine) -> nn.Module:
    """Plants a seed at half alpha in each of three slots; returns the same network by hand."""
    rest = {"first_step": 0, "last_step": 0, "curve": Curve.LINEAR, "steepness": 6.0, "operator": Operator.ADD}
    seeds, changed = [], {}
    for entry in engine.state.slots:
        seed = engine.growth.build(entry.slot, "conv_light", 1)
        seeds.append(copy.deepcopy(seed))
        engine.growth.plant(entry.slot, seed)
        changed[entry.slot] = replace(
            entry,
            stage=Stage.BLENDING,
            generation=1,
            blueprint="conv_light",
            operator=Operator.ADD,
            learn_step=0,
            curve=Curve.LINEAR,
            ramp=Ramp(start=0.5, target=0.5, **rest),
            finite=True,
            owned=True,
        )
    engine.state = engine.state.with_slots(changed)
    engine.growth.follow(engine.state)
    return CNNByHand(engine.fresh().model, seeds)


def test_blended_seeds_run_the_kernels_of_the_same_graph_written_by_hand_and_no_more(tmp_path: Path) -> None:
    engine = started(tmp_path)
    network = blend_three(engine)
    ours, theirs = counted(engine.train_step), counted(by_hand(engine, network))
    for word in ("convolution", "group_norm", "silu", "addmm", "mm.", "max_pool"):
        kernels = [name for name in theirs if word in name]
        assert kernels, word
        assert {name: ours[name] for name in kernels} == {name: theirs[name] for name in kernels}
    assert sum(ours.values()) - sum(theirs.values()) <= 40, ours - theirs


def test_gradient_health_costs_a_few_operators_a_tick_and_none_in_the_steps_between(tmp_path: Path) -> None:
    engine = started(tmp_path, optim__health_every=10)
    owner, often = engine.owner, started(tmp_path / "often", optim__health_every=1)
    engine.train_step()
    owner.health.take()
    with Operators() as sampled:
        engine.train_step()
    with Operators() as between:
        engine.train_step()
    added = sum(sampled.seen.values()) - sum(between.seen.values())
    tensors = sum(p.requires_grad for p in engine.grown.model.parameters())
    assert 0 < added <= tensors + 25, sampled.seen - between.seen
    assert not set(sampled.seen) & {"aten._local_scalar_dense.default"} - set(between.seen)
    for _ in range(2):
        often.train_step()
    assert often.owner.health.take()[HOST].health_steps == 2
