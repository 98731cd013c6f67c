"""Measuring forwards against plain loops over samples; sums over ranks do not depend on how samples were sharded."""

import contextlib
import copy
import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.accord.config import GateConfig
from esper.accord.evidence.sums import ClusterSums, reading_of
from esper.accord.lifecycle import ProbeRequest
from esper.kasmina.attach import attach
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.slots.slot import Phase
from esper.tolaria.data.clusters import Clusters
from esper.tolaria.data.hashing import seeded_order
from esper.tolaria.data.parts import ImagePart, make_bundle
from esper.tolaria.data.sampler import draw
from esper.tolaria.data.task import Task
from esper.tolaria.lockstep.buffers import average_running_statistics, running_statistics
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World
from esper.tolaria.training.config import Precision
from esper.tolaria.training.evaluate import Evaluator, evaluating
from esper.tolaria.training.precision import autocast, dtype_of

SEED = 11
GATES = GateConfig()
REQUEST = ProbeRequest(look=1, shares=2, alpha=0.75, aim="G2", draw="1")


class Host(nn.Module):
    """Everything whose behaviour differs between train() and eval()."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x))).mean((2, 3)))


def part(n: int, seed: int) -> ImagePart:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return ImagePart(images, torch.randint(5, (n,), generator=generator), [120.0], [60.0])


BUNDLE = make_bundle(
    name="random",
    task=Task.CLASSIFICATION,
    input_shape=(1, 4, 4),
    classes=5,
    record={},
    parts={name: part(n, n) for name, n in (("train", 8), ("validation", 23), ("probe", 29), ("test", 10))},
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def grown_host(dtype: torch.dtype = torch.float64):
    torch.manual_seed(2)
    model = Host().to(dtype)
    with torch.no_grad():
        model.norm.running_mean.uniform_(-1, 1)
        model.norm.running_var.uniform_(0.5, 2)
    grown = attach(model, {"r0c0": "conv"}, BUNDLE.example().to(dtype))
    key = birth_key(1, "r0c0", 1)
    site = grown.sites["r0c0"]
    grown.slots["r0c0"].plant(
        build_seed("conv_light", dim=4, topology=site.topology, key=key, dtype=dtype, device="cpu")
    )
    return grown


def evaluator(grown, rank: int = 0, size: int = 1, *, batch: int = 4, seed: int = SEED, precision=Precision.FP64):
    """As rank ``rank`` of ``size`` would measure: its world is asked for its place only."""
    world = World(WorldConfig(), ControlConfig())
    world.rank, world.size = rank, size
    return Evaluator(grown, BUNDLE, world, precision=precision, batch=batch, seed=seed)


def losses_one_by_one(grown, samples, indices, alpha: float | None = None) -> list[float]:
    """Plain cross-entropy, one sample at a time, in eval()."""
    grown.model.eval()
    found = []
    with torch.no_grad(), grown.override({} if alpha is None else {"r0c0": alpha}):
        for index in indices:
            x, y = samples.fetch(torch.tensor([index]))
            found.append(F.cross_entropy(grown.model(x.double()), y).item())
    grown.model.train()
    return found


@contextlib.contextmanager
def statistics_by_hand(grown, alpha: float, draw_key: str, size: int = 4):
    """Within the block the norm has mean and variance over the training part, averaged over batches of ``size``."""
    norm, kept = grown.model.norm, copy.deepcopy(grown.model.norm.state_dict())
    chosen = draw(8, 8, "statistics", SEED, "r0c0", draw_key, 1)
    with torch.no_grad(), grown.override({"r0c0": alpha}):
        features = [grown.model.conv(BUNDLE.train.fetch(chosen[i : i + size])[0].double()) for i in range(0, 8, size)]
        norm.running_mean.copy_(torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0))
        norm.running_var.copy_(torch.stack([f.transpose(0, 1).flatten(1).var(1) for f in features]).mean(0))
    yield
    norm.load_state_dict(kept)


def total(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: math.fsum(one[name] for one in parts) for name in parts[0]}


def test_part_sums_are_those_of_a_plain_loop():
    grown = grown_host()
    losses = losses_one_by_one(grown, BUNDLE.validation, range(23))
    x, y = BUNDLE.validation.fetch(torch.arange(23))
    hits = (grown.model.eval()(x.double()).argmax(1) == y).sum().item()
    sums = evaluator(grown).part_sums(BUNDLE.validation)
    assert sums == {
        "loss": pytest.approx(math.fsum(losses), abs=1e-10),
        "loss_sq": pytest.approx(math.fsum(loss * loss for loss in losses), abs=1e-10),
        "correct": hits,
        "correct_sq": hits,
        "count": 23.0,
    }
    assert 0 < hits < 23


@pytest.mark.parametrize("size", [2, 3, 7, 23, 30])
@pytest.mark.parametrize("batch", [1, 5])
def test_sums_over_ranks_do_not_depend_on_the_sharding(size, batch):
    grown = grown_host()
    alone = evaluator(grown, batch=23).part_sums(BUNDLE.validation)
    shares = [evaluator(grown, rank, size, batch=batch).part_sums(BUNDLE.validation) for rank in range(size)]
    assert total(shares) == pytest.approx(alone, abs=1e-10)
    counts = [share["count"] for share in shares]
    assert max(counts) - min(counts) <= 1


def test_validation_soon_after_a_ramp_has_statistics_of_its_own():
    grown, own = grown_host(), evaluator(grown_host())
    before = own.validation_sums()
    anew, again = own.validation_sums(8), own.validation_sums(4096)
    chosen = draw(8, 8, "statistics", SEED, "validation")
    with torch.no_grad():
        features = [grown.model.conv(BUNDLE.train.fetch(chosen[i : i + 4])[0].double()) for i in (0, 4)]
        grown.model.norm.running_mean.copy_(torch.stack([f.mean((0, 2, 3)) for f in features]).mean(0))
        grown.model.norm.running_var.copy_(torch.stack([f.transpose(0, 1).flatten(1).var(1) for f in features]).mean(0))
    by_hand = math.fsum(losses_one_by_one(grown, BUNDLE.validation, range(23)))
    assert anew == again
    assert anew["loss"] == pytest.approx(by_hand, abs=1e-10)
    assert abs(before["loss"] - by_hand) > 1e-3
    assert own.validation_sums() == before


def test_a_rank_without_samples_sends_zeros():
    sums = evaluator(grown_host(), 29, 30).part_sums(BUNDLE.validation)
    assert set(sums.values()) == {0.0}


def test_probe_sums_are_paired_differences_of_the_loss():
    grown = grown_host()
    chosen = seeded_order(29, "probe", SEED, "r0c0", REQUEST.draw)[:15].tolist()
    with statistics_by_hand(grown, 0.0, REQUEST.draw):
        without = losses_one_by_one(grown, BUNDLE.probe, chosen, alpha=0.0)
    with statistics_by_hand(grown, 0.75, REQUEST.draw):
        within = losses_one_by_one(grown, BUNDLE.probe, chosen, alpha=0.75)
    differences = [a - b for a, b in zip(without, within)]
    assert statistics.pstdev(differences) > 1e-4
    sums = evaluator(grown).probe_sums("r0c0", REQUEST, GATES)
    first, second, third = (pytest.approx(math.fsum(d**power for d in differences), abs=1e-10) for power in (1, 2, 3))
    assert sums == {
        **dict.fromkeys(("clusters", "count", "size_sq", "size_cube"), 15),
        **dict.fromkeys(("total", "cross", "cross_size"), first),
        **dict.fromkeys(("total_sq", "cross_sq"), second),
        "total_cube": third,
        "left_out": 0,
    }
    reading = reading_of(ClusterSums.read(sums, ""), tick=1, min_samples=2)
    middle, spread = statistics.fmean(differences), statistics.pstdev(differences)
    skew = statistics.fmean([(d - middle) ** 3 for d in differences]) / spread**3
    assert reading.skew == pytest.approx(skew, rel=1e-6)
    assert reading.value == pytest.approx(statistics.fmean(differences), abs=1e-12)
    assert reading.se == pytest.approx(statistics.stdev(differences) / math.sqrt(15), rel=1e-9)


@pytest.mark.parametrize("size", [2, 3, 15, 25])
def test_the_samples_of_a_probe_do_not_depend_on_the_sharding(size):
    grown = grown_host()
    alone = evaluator(grown, batch=3).probe_sums("r0c0", REQUEST, GATES)
    shares = [evaluator(grown, rank, size, batch=3).probe_sums("r0c0", REQUEST, GATES) for rank in range(size)]
    assert total(shares) == pytest.approx(alone, abs=1e-10)


def test_looks_of_a_life_share_nothing_and_each_life_and_run_has_its_own():
    grown = grown_host()  # batches of 8 take running statistics from the whole training part at once
    second, other = replace(REQUEST, look=2), replace(REQUEST, draw="2")
    sums = [
        evaluator(grown, batch=8).probe_sums("r0c0", REQUEST, GATES),
        evaluator(grown, batch=8).probe_sums("r0c0", REQUEST, GATES),
        evaluator(grown, batch=8).probe_sums("r0c0", second, GATES),
        evaluator(grown, batch=8).probe_sums("r0c0", other, GATES),
        evaluator(grown, batch=8, seed=SEED + 1).probe_sums("r0c0", REQUEST, GATES),
    ]
    assert sums[0] == sums[1]
    assert len({one["total"] for one in sums}) == 4
    whole = evaluator(grown, batch=8).probe_sums("r0c0", replace(REQUEST, shares=1), GATES)
    assert whole["count"] == 29
    assert total([sums[0], sums[2]]) == pytest.approx(whole, abs=1e-10), "two halves are the whole, each sample once"


def test_a_cluster_is_on_one_rank_and_in_one_look():
    grown, labels = grown_host(), torch.tensor([7, 7, 7, -1, -1, *range(100, 124)])
    own = evaluator(grown, batch=8)
    own.bundle = replace(BUNDLE, probe_clusters=Clusters(29, labels))
    whole = own.probe_sums("r0c0", replace(REQUEST, shares=1), GATES)
    assert (whole["clusters"], whole["count"], whole["size_sq"]) == (26, 29, 9 + 4 + 24)
    parts = []
    for look, rank in itertools.product((1, 2, 3), range(4)):
        own = evaluator(grown, rank, 4, batch=8)
        own.bundle = replace(BUNDLE, probe_clusters=Clusters(29, labels))
        parts.append(own.probe_sums("r0c0", replace(REQUEST, look=look, shares=3), GATES))
    assert total(parts) == pytest.approx(whole, abs=1e-10), "sums over clusters add up only where none was split"


def test_a_probe_looks_at_the_asked_alpha_whatever_the_seed_does_in_training():
    grown = grown_host()
    expected = evaluator(grown).probe_sums("r0c0", REQUEST, GATES)
    grown.slots["r0c0"].phase = Phase.BLEND
    grown.slots["r0c0"].set_alpha(0.25)
    assert evaluator(grown).probe_sums("r0c0", REQUEST, GATES) == expected
    assert grown.slots["r0c0"].overridden is None
    assert grown.slots["r0c0"].level == 0.25


def test_a_broken_seed_has_every_sample_left_out_and_counted():
    grown = grown_host()
    with torch.no_grad():
        next(grown.slots["r0c0"].seed.parameters()).fill_(math.nan)
    sums = evaluator(grown).probe_sums("r0c0", REQUEST, GATES)
    assert {name: value for name, value in sums.items() if value} == {"left_out": 15}


def test_measuring_leaves_weights_statistics_gradients_flags_and_random_stream_alone():
    grown = grown_host()
    grown.model.drop.eval()
    before = {name: tensor.clone() for name, tensor in grown.model.state_dict().items()}
    state = torch.get_rng_state()
    own = evaluator(grown)
    own.part_sums(BUNDLE.validation)
    own.probe_sums("r0c0", REQUEST, GATES)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in grown.model.state_dict().items())
    assert all(parameter.grad is None for parameter in grown.model.parameters())
    assert grown.model.norm.training
    assert not grown.model.drop.training


def test_evaluating_restores_each_modules_own_flag_also_after_an_error():
    model = Host()
    model.norm.eval()
    model.head.eval()
    flags = [module.training for module in model.modules()]
    assert len(set(flags)) == 2

    def broken() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()


def test_running_statistics_are_the_hosts_float_buffers():
    grown = grown_host()
    norm = grown.model.norm
    found = running_statistics(grown.model)
    assert [id(buffer) for buffer in found] == [id(norm.running_mean), id(norm.running_var)]
    before = [buffer.clone() for buffer in found]
    average_running_statistics(grown.model, World(WorldConfig(), ControlConfig()))
    assert all(torch.equal(a, b) for a, b in zip(before, found))


@pytest.mark.parametrize(
    ("precision", "parameters", "compute"),
    [
        (Precision.FP32, torch.float32, torch.float32),
        (Precision.FP64, torch.float64, torch.float64),
        (Precision.BF16, torch.float32, torch.bfloat16),
    ],
)
def test_number_formats(precision, parameters, compute):
    assert dtype_of(precision) is parameters
    x = torch.randn(2, 2, dtype=parameters)
    with autocast(precision, torch.device("cpu")):
        assert (x @ x).dtype is compute
    grown = grown_host(parameters)
    own = evaluator(grown, precision=precision)
    assert own.to_device(*BUNDLE.probe.fetch(torch.arange(3)))[0].dtype is parameters
    assert own.part_sums(BUNDLE.validation)["count"] == 23


def test_channels_last_is_a_memory_format_and_nothing_else():
    grown = grown_host()
    plain, last = evaluator(grown), evaluator(grown)
    last.format = torch.channels_last
    x = torch.randn(4, 3, 5, 5)
    (a, _), (b, _) = plain.to_device(x, x), last.to_device(x, x)
    assert a.is_contiguous()
    assert b.is_contiguous(memory_format=torch.channels_last)
    assert not b.is_contiguous()
    assert torch.equal(a, b)
    for name, value in plain.part_sums(BUNDLE.validation).items():
        assert last.part_sums(BUNDLE.validation)[name] == pytest.approx(value, rel=1e-9)
