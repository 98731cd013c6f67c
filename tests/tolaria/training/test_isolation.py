"""While seeds only incubate, the host's run is bitwise that without seeds: weights, moments, statistics, randomness.

One process. Two runs of one config differ in the controller alone: nobody, or a schedule that plants a seed in every
slot and sets it learning, without ever blending it in.
"""

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.config.tree import EsperConfig
from esper.kasmina.blueprints import registry as catalogue
from esper.kasmina.hosts import registry
from esper.kasmina.slots.grown import Grown
from esper.leyline.plain import to_plain
from esper.leyline.stages import Stage
from esper.leyline.topology import Topology
from esper.tolaria.lockstep.buffers import running_statistics
from esper.tolaria.training.engine import Engine
from tests.support.noisy_host import NoisyConfig, register_noisy
from tests.support.tiny import act, bits, make_engine, schedule, tiny_config

STEPS = 16


@pytest.fixture(autouse=True)
def _noisy_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "HOSTS", dict(registry.HOSTS))
    register_noisy()


SEEDS = {
    "noisy": {"r0c0": "depthwise", "r1c0": "conv_small"},
    "cnn": {"r0c0": "conv_light", "r0c1": "attention", "r1c0": "bottleneck"},
    "gpt": {"r0c0": "mlp_small", "r1c0": "attention"},
}


def config_of(host: str, optimizer: str, incubation: str, **settings: Any) -> EsperConfig:
    common = {
        "trainer__steps": STEPS,
        "trainer__accumulate": 2,
        "optim__kind": optimizer,
        "optim__clip_norm": 0.004,
        "optim__weight_decay": 0.01,
        "slots__incubation": incubation,
        **settings,
    }
    if host == "noisy":
        return tiny_config("cnn", host=NoisyConfig(), **common)
    return tiny_config(host, **common)


def planted(host: str) -> dict[str, Any]:
    """Births one tick apart, so that each is registered while the others learn; then learning for good."""
    actions = []
    for index, (slot, blueprint) in enumerate(SEEDS[host].items()):
        actions.append(act(1 + index, slot, "GERMINATE", blueprint=blueprint, ticks=1))
        actions.append(act(3 + index, slot, "ADVANCE"))
    return schedule(*actions)


class Watched:
    """One engine, and what its owner of parameters said of each step."""

    def __init__(self, config: EsperConfig, run_dir: Path) -> None:
        self.engine = make_engine(config, run_dir)
        self.engine.begin(None)
        self.norms: list[dict[str, float]] = []
        step = self.engine.owner.step

        def noting() -> Any:
            report = step()
            self.norms.append(report.norms)
            return report

        self.engine.owner.step = noting  # type: ignore[method-assign]

    def train(self, until: int) -> Engine:
        while self.engine.step < until:
            self.engine.train_step()
            if self.engine.tick_due():
                self.engine.tick()
        return self.engine


def host_of(engine: Engine) -> dict[str, Any]:
    """Every bit of the host and of what it draws from, and the numbers that were agreed about it."""
    model = engine.grown.model

    def of_host(pairs: Any) -> list[tuple[str, Tensor]]:
        return [(name, tensor) for name, tensor in pairs if not name.startswith("esper_slots")]

    moments = [
        (f"{name}.{key}", tensor)
        for name, entries in engine.owner.state_by_name().items()
        for key, tensor in entries.items()
    ]
    assert len(of_host(moments)) >= len(of_host(model.named_parameters()))
    agreed = {key: value for key, value in to_plain(engine.state).items() if key.startswith(("train", "valid", "host"))}
    return {
        "weights": bits(of_host(model.named_parameters())),
        "moments": bits(of_host(moments)),
        "statistics": bits(of_host(model.named_buffers())),
        "rng": bits([("cpu", torch.get_rng_state())]),
        "agreed": agreed,
    }


@functools.cache
def host_alone(host: str, optimizer: str, incubation: str) -> dict[str, Any]:
    """`host_of` a run without seeds."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a last line may still be written
        return host_of(Watched(config_of(host, optimizer, incubation), Path(folder)).train(STEPS))


@pytest.mark.parametrize("incubation", ["shadow", "ste"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("host", SEEDS)
def test_incubating_seeds_leave_no_trace_in_the_host(
    host: str, optimizer: str, incubation: str, tmp_path: Path
) -> None:
    wanted = host_alone(host, optimizer, incubation)
    config = config_of(host, optimizer, incubation, controller=planted(host))
    grown = Watched(config, tmp_path / "grown")
    engine = grown.train(8)
    early = bits(engine.grown.slots["r0c0"].state_dict().items())
    found = host_of(grown.train(STEPS))
    assert found == wanted
    # And the comparison was about something: seeds learned in every slot, and every owner was clipped.
    assert {entry.stage for entry in engine.state.slots} == {Stage.TRAINING}
    assert early != bits(engine.grown.slots["r0c0"].state_dict().items())
    limit = config.optim.clip_norm
    assert limit is not None
    assert all(norms["host"] > limit for norms in grown.norms)
    for slot in SEEDS[host]:
        assert any(norms.get(slot, 0.0) > limit for norms in grown.norms), slot
    if host == "noisy":
        assert all(buffer.abs().sum() > 0 for buffer in running_statistics(engine.grown.model))


@pytest.mark.parametrize("incubation", ["shadow", "ste"])
@pytest.mark.parametrize(("at", "stage"), [(5, Stage.GERMINATED), (13, Stage.TRAINING)])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_broken_incubating_seed_leaves_no_trace_either(
    value: float, at: int, stage: Stage, incubation: str, tmp_path: Path
) -> None:
    """A learning one is quarantined at the next tick, one that waits does not pass G1; no host step is skipped."""
    wanted = host_alone("noisy", "adamw", incubation)
    grown = Watched(config_of("noisy", "adamw", incubation, controller=planted("noisy")), tmp_path / "grown")
    engine = grown.train(at)
    seed = engine.grown.slots["r0c0"].seed
    assert seed is not None
    assert engine.state.slot("r0c0").stage is stage
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.fill_(value)
    engine = grown.train(STEPS)
    assert host_of(engine) == wanted
    seen = [line.target for line in engine.state.slot("r0c0").history]
    if stage is Stage.TRAINING:
        assert Stage.PRUNED in seen
    else:
        assert seen == [Stage.GERMINATED]
    assert engine.state.slot("r1c0").stage is Stage.TRAINING, "the seed beside it went on"


def test_the_shadow_forward_draws_the_numbers_of_the_host_s_own(tmp_path: Path) -> None:
    """The seed learns from the very network that was trained: same dropout, this seed at full alpha, all else fixed."""
    config = config_of("noisy", "sgd", "shadow", trainer__accumulate=1, controller=planted("noisy"))
    watched = Watched(config, tmp_path)
    engine = watched.train(12)
    assert {entry.stage for entry in engine.state.slots} == {Stage.TRAINING}
    twin, start = copy.deepcopy(engine.grown.model), torch.get_rng_state()
    found: dict[str, Tensor] = {}
    step = engine.owner.step

    def caught() -> Any:
        for name, parameter in engine.grown.owner_parameters()["r0c0"]:
            assert parameter.grad is not None
            found[name] = parameter.grad.clone()
        return step()

    engine.owner.step = caught  # type: ignore[method-assign]
    indices = engine.plan.indices(engine.step)
    engine.train_step()

    x, y = engine.bundle.train.fetch(indices)
    grown = Grown(twin, engine.grown.sites)
    torch.set_rng_state(start)
    with grown.override({"r0c0": 1.0}):
        nn.functional.cross_entropy(twin(x), y).backward()
    wanted = {name: parameter.grad for name, parameter in grown.owner_parameters()["r0c0"]}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("incubation", ["shadow", "ste"])
def test_a_seed_that_draws_random_numbers_does_not_move_the_host_s(
    incubation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's own blueprint with dropout: in its staging, its learning and its looks."""
    monkeypatch.setattr(catalogue, "_REGISTRY", dict(catalogue._REGISTRY))

    @catalogue.blueprint(
        "dropping", topology=Topology.FEATURE_MAP, parameters=lambda dim: dim, flops=lambda dim, positions: 0
    )
    class Dropping(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((dim, 1, 1), 0.1))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain * nn.functional.dropout(x, 0.5, self.training)

    wanted = host_of(Watched(config_of("noisy", "adamw", incubation), tmp_path / "alone").train(STEPS))
    actions = [act(1, "r0c0", "GERMINATE", blueprint="dropping", ticks=1), act(3, "r0c0", "ADVANCE")]
    config = config_of("noisy", "adamw", incubation, controller=schedule(*actions))
    engine = Watched(config, tmp_path / "grown").train(STEPS)
    assert engine.state.slot("r0c0").stage is Stage.TRAINING
    seed = engine.grown.slots["r0c0"].seed
    assert isinstance(seed, Dropping)
    assert bool((seed.gain != 0.1).any())
    assert host_of(engine) == wanted


def test_a_blended_seed_does_change_the_host(tmp_path: Path) -> None:
    """The comparison above would notice."""
    alone = Watched(config_of("noisy", "adamw", "shadow"), tmp_path / "alone").train(STEPS)
    wanted = host_of(alone)
    actions = [*planted("noisy")["actions"], act(5, "r0c0", "ADVANCE")]
    config = config_of("noisy", "adamw", "shadow", controller=schedule(*actions))
    found = host_of(Watched(config, tmp_path / "grown").train(STEPS))
    for part in ("weights", "moments", "statistics"):
        assert found[part] != wanted[part]
