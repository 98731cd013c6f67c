"""Parts of a user's loop unlike most: they work, are saved and restored, or are refused at construction by name."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.leyline.errors import ConfigError, LockstepError
from tests.support.dist import run_distributed
from tests.support.odd_hosts import (
    SHAPE,
    Accelerated,
    Bytes,
    Expanded,
    Passing,
    Ragged,
    TimmLike,
    counting,
    ragged,
)
from tests.support.sessions import GATES, adamw, batch, loss, replica, scheduled, train
from tests.support.tiny import act
from tests.support.working_seeds import grow_all

X = batch(0, 4, dtype=torch.float32)[0]


def life(slot: str, blueprint: str) -> dict[str, Any]:
    germinate = act(1, slot, "GERMINATE", blueprint=blueprint, ticks=1)
    return scheduled([germinate, *(act(tick, slot, "ADVANCE") for tick in (3, 4, 6)), act(7, slot, "FOSSILIZE")])


def start(model: nn.Module, site: str, blueprint: str, **more: Any) -> esper.Session:
    """A session with a seed that becomes part of the network."""
    data = [batch(-1 - index, 8, dtype=torch.float32) for index in range(8)]
    optimizer = more.pop("optimizer", adamw)(model)
    scheduler = more.pop("scheduler", None)
    settings = {"loss": loss, "probe": data, "gates": GATES, "every": 2, "control": {"digest_every": 1}, **more}
    grown = esper.attach(model, {"r0c0": site}, settings.pop("example", X))
    made = None if scheduler is None else scheduler(optimizer)
    return esper.Session(grown, optimizer, controller=life("r0c0", blueprint), scheduler=made, **settings)


def seeded(build: Any) -> nn.Module:
    torch.manual_seed(5)
    return build()


def live(rank: int, folder: Any, name: str) -> tuple[Any, Any]:
    """Trains half, saves, goes on; restores and goes on: both replicas."""
    build, site, blueprint = HOSTS[name]
    session = start(seeded(build), site, blueprint)
    train(session, range(11))
    session.save(folder / f"{name}.pt")
    train(session, range(11, 20))
    wanted = replica(session), extra_of(session)
    session.close()
    data = [batch(-1 - index, 8, dtype=torch.float32) for index in range(8)]
    again = esper.Session.restore(folder / f"{name}.pt", lambda: seeded(build), loss=loss, probe=data)
    train(again, range(11, 20))
    got = replica(again), extra_of(again)
    again.close()
    return wanted, got


def extra_of(session: esper.Session) -> str:
    state = session.grown.model.state_dict()
    return repr({name: value for name, value in state.items() if name.endswith("_extra_state")})


HOSTS = {"extra": (counting, "2", "mlp"), "expanded": (Expanded, "conv", "conv_light")}


@pytest.mark.parametrize("name", HOSTS)
def test_extra_state_and_expanded_buffers_live_through_growth_and_restore_on_two_ranks(name, tmp_path) -> None:
    for wanted, got in run_distributed(live, 2, tmp_path, name):
        assert got == wanted
        assert name != "extra" or "'calls': " in wanted[1]


def test_ranks_with_unequal_extra_state_are_told() -> None:
    for said in run_distributed(part_by_extra_state, 2):
        assert re.search("ranks are unequal: weights", said), said


def part_by_extra_state(rank: int) -> str:
    model = seeded(counting)
    model[1].calls = rank
    try:
        start(model, "2", "mlp").close()
    except LockstepError as error:
        return str(error)
    return "nothing"


def test_nested_tensors_are_batches_and_evidence() -> None:
    def packed(index: int) -> Any:
        x, y = batch(index, 8, dtype=torch.float32)
        return ragged(x), y

    session = start(
        seeded(Ragged), "inner", "mlp_small", example=ragged(X), probe=[packed(-1 - index) for index in range(8)]
    )
    for index in range(20):
        session.loss(packed(index)).backward()
        session.step()
    assert session.state.slots[0].stage.name == "FOSSILIZED"


def test_a_scheduler_of_timms_shape_counts_updates_and_epochs_and_never_sees_seeds(tmp_path) -> None:
    def sgd(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    session = start(seeded(Expanded), "conv", "conv_light", optimizer=sgd, scheduler=TimmLike)
    data = [batch(index, 8, dtype=torch.float32) for index in range(6)]
    for epoch in range(3):
        for number, one in enumerate(session.epoch(data)):
            session.loss(one).backward()
            session.step()
            assert session.optimizer.param_groups[0]["lr"] == 0.1 * 0.5**epoch / (1 + 6 * epoch + number + 1)
    assert session.state.slots[0].stage.name == "FOSSILIZED"
    session.save(tmp_path / "s.pt")
    probe = [batch(-1 - index, 8, dtype=torch.float32) for index in range(8)]
    made: list[TimmLike] = []

    def build(optimizer: torch.optim.Optimizer) -> TimmLike:
        made.append(TimmLike(optimizer))
        return made[0]

    again = esper.Session.restore(tmp_path / "s.pt", Expanded, scheduler=build, loss=loss, probe=probe)
    assert (made[0].epoch, made[0].updates) == (3, 18)
    for one in (session, again):
        train(one, range(20, 24))
    assert replica(again) == replica(session)


class NeedsEpoch(TimmLike):
    step_update = None  # type: ignore[assignment]


class PlateauLRScheduler(TimmLike):
    """Named as timm's, which needs a metric."""


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"scheduler": NeedsEpoch}, r"^scheduler = NeedsEpoch: its step\(\) does not go .*missing.*'epoch'.*timm's$"),
        ({"scheduler": PlateauLRScheduler}, r"^scheduler = PlateauLRScheduler: its step needs a metric"),
        (
            {"optimizer": lambda model: Accelerated(adamw(model))},
            r"^optimizer = Accelerated: it stands for another optimizer; pass the AdamW itself \(its attribute optim",
        ),
        (
            {"optimizer": lambda model: Passing(adamw(model))},
            r"^optimizer = Passing: it stands for another optimizer; pass the AdamW itself \(its attribute base\)$",
        ),
        ({"optimizer": lambda model: object()}, r"^optimizer = object: expected a torch\.optim\.Optimizer$"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(more, text) -> None:
    with pytest.raises(ConfigError, match=text):
        start(seeded(Expanded), "conv", "conv_light", **more)


def test_extra_state_that_cannot_be_saved_and_sparse_gradients_are_refused_at_construction() -> None:
    with pytest.raises(ConfigError, match=r"module '1' \(Bytes\): its get_extra_state\(\) holds a bytes"):
        start(nn.Sequential(nn.Flatten(), Bytes(36, 8), nn.ReLU(), nn.Linear(8, 3)), "2", "mlp")
    words = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Flatten(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ConfigError, match=r"module '0' \(Embedding\) makes sparse gradients, .* sparse=False"):
        start(words, "3", "mlp", example=torch.zeros(2, 2, dtype=torch.long))


class Functional(nn.Module):
    """Sparse gradients that no module tells of."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        words = (x[:, 0, 0] > 0).long()
        return self.head(self.inner(nn.functional.embedding(words, self.table, sparse=True).mean(1)))


def test_sparse_gradients_that_show_in_the_first_step_are_named() -> None:
    session = start(Functional(), "inner", "mlp", optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    session.loss(batch(0, 8, dtype=torch.float32)).backward()
    with pytest.raises(ConfigError, match=r"the gradient of table is sparse, and cannot be judged"):
        session.step()


def test_the_real_timm() -> None:
    try:
        import timm.scheduler as timm
    except Exception as error:  # a torchvision built for another torch fails with more than an ImportError
        pytest.skip(f"timm does not import here: {type(error).__name__}: {error}")
    session = start(seeded(Expanded), "conv", "conv_light", scheduler=lambda o: timm.CosineLRScheduler(o, t_initial=4))
    train(session, range(6))
    session.close()


def test_the_real_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate does not import here")
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(ConfigError, match=r"^optimizer = AcceleratedOptimizer: .* pass the AdamW itself"):
        start(seeded(Expanded), "conv", "conv_light", optimizer=lambda m: accelerator.prepare(adamw(m)))


def test_the_real_accelerate_in_mixed_precision() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate does not import here")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(seeded(Expanded))
    grown = esper.attach(model, {"r0c0": "conv"}, torch.zeros(2, *SHAPE))
    grow_all(grown)
    with pytest.raises(ConfigError, match=r"the forward of the model was replaced .* keep_fp32_wrapper=False"):
        grown.export()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert isinstance(grown.export(), nn.Module)


@pytest.mark.filterwarnings("ignore")
def test_the_real_lightning_fabric() -> None:
    fabric = pytest.importorskip("lightning_fabric", reason="Lightning Fabric does not import here")
    parts = fabric.Fabric(accelerator="cpu", devices=1)
    model = seeded(Expanded)
    whole, optimizer = parts.setup(model, adamw(model))
    with pytest.raises(ConfigError, match=r"is a _FabricModule of Lightning: .*itself .*_original_module"):
        esper.attach(whole, {"r0c0": "_original_module.conv"}, torch.zeros(2, *SHAPE))
    with pytest.raises(ConfigError, match=r"^optimizer = FabricAdamW: .* itself \(its attribute _optimizer"):
        start(model, "conv", "conv_light", optimizer=lambda m: optimizer)


def test_a_parallel_wrapper_inside_the_model_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.DataParallel(nn.Linear(36, 8)), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ConfigError, match=r"^1 is a DataParallel: attach to the model inside, before it is wrapped"):
        esper.attach(model, {"r0c0": "2"}, torch.zeros(2, *SHAPE))


def test_wrappers_of_models_are_named_where_their_libraries_are_absent() -> None:
    wrapper = type("_FabricModule", (nn.Module,), {"__module__": "lightning_fabric.wrappers"})()
    wrapper._original_module = seeded(Expanded)
    with pytest.raises(ConfigError, match=r"the model is a _FabricModule of Lightning: .* attribute _original_module"):
        esper.attach(wrapper, {"r0c0": "_original_module.conv"}, X)
    model = seeded(Expanded)
    grown = esper.attach(model, {"r0c0": "conv"}, X)
    model.head._original_forward = model.head.forward
    with pytest.raises(ConfigError, match="the forward of head was replaced on the object, as accelerate does"):
        grown.export()
