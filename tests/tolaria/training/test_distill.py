"""A teacher's term in the loss: closed forms, gradients against plain torch, and what must not notice it."""

import copy
import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.config.strict import as_plain
from esper.config.tree import EsperConfig, write_config
from esper.kasmina.hosts import registry
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import CheckpointError, ConfigError
from esper.leyline.stages import Stage
from esper.run.teacher import build_teacher
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data import load_data
from esper.tolaria.training.config import Precision
from esper.tolaria.training.distill import DistillConfig, feature_loss, soft_target_loss
from esper.tolaria.training.engine import Engine
from esper.tolaria.training.precision import dtype_of
from esper.tolaria.training.result import rebuild_checkpoint
from tests.support.dist import run_distributed
from tests.support.killed_runs import live, prepare_run
from tests.support.noisy_host import register_noisy
from tests.support.parameters import teacher_names
from tests.support.small_runs import train_on
from tests.support.teachers import Teaching
from tests.support.tiny import act, bits, make_engine, replica, schedule, tiny_config, tiny_plain
from tests.tolaria.training.test_isolation import STEPS, Watched, config_of, host_of, planted

PATH = "tests.support.teachers:teach"
PAIRS = {"r0c0": "stem"}


def taught(**settings: Any) -> DistillConfig:
    return DistillConfig(**{"path": PATH, "weight": 0.7, "temperature": 3.0, **settings})


@pytest.fixture(autouse=True)
def _noisy_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "HOSTS", dict(registry.HOSTS))
    register_noisy()


# closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("shape", [(5, 7), (3, 6, 4)])
def test_soft_targets_are_torchs_kl_div_and_so_is_their_gradient(shape: tuple[int, ...], temperature: float) -> None:
    torch.manual_seed(1)
    student = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    teacher = 3 * torch.randn(shape, dtype=torch.float64)
    loss = soft_target_loss(student, teacher, temperature)
    assert loss.shape == shape[:1]
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    wanted = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    wanted = wanted.flatten(1).mean(1) if wanted.ndim > 1 else wanted
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    closed = temperature * (log_q.exp() - log_p.exp()).detach() / math.prod(shape[1:-1])
    torch.testing.assert_close(gradient, closed, rtol=1e-10, atol=1e-12)


def test_two_classes_by_hand() -> None:
    p, q = 1 / (1 + math.exp(-2 / 4)), 1 / (1 + math.exp(1 / 4))
    wanted = 16 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    found = soft_target_loss(torch.tensor([[0.0, 1.0]]).double(), torch.tensor([[2.0, 0.0]]).double(), 4.0)
    assert found.item() == pytest.approx(wanted, rel=1e-12)


def test_at_the_teacher_it_is_zero_and_a_class_ruled_out_adds_nothing() -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    assert soft_target_loss(logits, logits, 2.0).item() == 0.0
    ruled = torch.tensor([[1.0, -math.inf, 0.5]])
    student = torch.tensor([[0.2, -1.0, 0.3]], requires_grad=True)
    loss = soft_target_loss(student, ruled, 1.0)
    wanted = F.kl_div(F.log_softmax(student, -1), F.softmax(ruled, -1), reduction="none").sum()
    torch.testing.assert_close(loss.sum(), wanted)
    loss.sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (F.softmax(student, -1) - F.softmax(ruled, -1)).detach())


def test_half_precision_is_widened_and_features_are_torchs_mse() -> None:
    torch.manual_seed(2)
    student, teacher = torch.randn(2, 4, 9).bfloat16()
    assert soft_target_loss(student, teacher, 2.0).dtype == torch.float32
    f, g = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    wanted = torch.stack([F.mse_loss(a, b) for a, b in zip(f, g, strict=True)])
    torch.testing.assert_close(feature_loss(f, g), wanted, rtol=1e-12, atol=1e-12)
    assert feature_loss(f.bfloat16(), g.bfloat16()).dtype == torch.float32


# in the engine -----------------------------------------------------------------------------------------------------


def caught_gradients(engine: Engine) -> dict[str, Tensor]:
    """Gradients of the next step, before they are clipped."""
    found: dict[str, Tensor] = {}
    step = engine.owner.step

    def caught() -> Any:
        for named in engine.grown.owner_parameters().values():
            found.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        return step()

    engine.owner.step = caught  # type: ignore[method-assign]
    engine.train_step()
    engine.owner.step = step  # type: ignore[method-assign]
    return found


@pytest.mark.parametrize("task", ["cnn", "gpt"])
def test_host_and_incubating_seed_learn_from_task_and_teacher(task: str, tmp_path: Path) -> None:
    """Against plain torch: one loss with all seeds off for the host, one with the seed at full alpha for the seed."""
    path = PATH if task == "cnn" else "tests.support.teachers:speak"
    distill = taught(path=path, features=PAIRS if task == "cnn" else {}, feature_weight=0.4)
    blueprint = "conv_small" if task == "cnn" else "mlp_small"
    actions = schedule(act(1, "r0c0", "GERMINATE", blueprint=blueprint, ticks=1), act(3, "r0c0", "ADVANCE"))
    config = tiny_config(task, distill=distill, trainer__precision="fp64", optim__clip_norm=None, controller=actions)
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    train_on(engine, 8)
    assert engine.state.slot("r0c0").stage is Stage.TRAINING
    assert engine.losses.distillation is not None
    twin = copy.deepcopy(engine.grown.model)
    teacher = copy.deepcopy(engine.losses.distillation.teacher.module).eval()
    indices = engine.plan.indices(engine.step)
    found = caught_gradients(engine)

    x, y = engine.bundle.train.fetch(indices)
    x = x.double() if x.is_floating_point() else x
    grown = Grown(twin, engine.grown.sites)
    seen: dict[str, Tensor] = {}
    if task == "cnn":
        twin.get_submodule(grown.sites["r0c0"].module).register_forward_hook(lambda m, a, o: seen.update(student=o))
        teacher.stem.register_forward_hook(lambda m, a, o: seen.update(teacher=o))
    for owner, alphas in (("host", {}), ("r0c0", {"r0c0": 1.0})):
        twin.zero_grad()
        with grown.override(alphas):
            output = twin(x)
        with torch.no_grad():
            logits = teacher(x)
        t = distill.temperature
        flat_out, flat_logits = output.flatten(0, -2), logits.flatten(0, -2)
        log_q, log_p = F.log_softmax(flat_out / t, -1), F.log_softmax(flat_logits / t, -1)
        kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        loss = F.cross_entropy(flat_out, y.flatten()) + distill.weight * t * t * kl
        if task == "cnn":
            loss = loss + distill.feature_weight * F.mse_loss(seen["student"], seen["teacher"])
        loss.backward()
        for name, parameter in grown.owner_parameters()[owner]:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=lambda s, n=name: n + s)


@pytest.mark.parametrize("incubation", ["shadow", "ste"])
@pytest.mark.parametrize("host", ["noisy", "cnn"])
def test_incubating_seeds_leave_no_trace_in_a_taught_host(host: str, incubation: str, tmp_path: Path) -> None:
    distill = taught(features=PAIRS)
    wanted = host_of(Watched(config_of(host, "adamw", incubation, distill=distill), tmp_path / "alone").train(STEPS))
    config = config_of(host, "adamw", incubation, distill=distill, controller=planted(host))
    engine = Watched(config, tmp_path / "grown").train(STEPS)
    assert {entry.stage for entry in engine.state.slots} == {Stage.TRAINING}
    assert host_of(engine) == wanted
    untaught = host_of(Watched(config_of(host, "adamw", incubation), tmp_path / "untaught").train(STEPS))
    assert untaught["weights"] != wanted["weights"]


def test_what_is_measured_is_the_task_alone(tmp_path: Path) -> None:
    """Before the first update: training loss, validation, parameters and random stream are those without a teacher."""
    told = []
    for name, distill in (("taught", taught(features=PAIRS)), ("untaught", DistillConfig())):
        engine = make_engine(tiny_config("cnn", control__every=1, optim__lr=1e-30, distill=distill), tmp_path / name)
        engine.begin(None)
        assert not [key for key in engine.grown.model.state_dict() if "teach" in key]
        train_on(engine, 1)
        state = engine.state
        count = len(list(engine.grown.model.parameters()))
        told.append((state.train_loss, state.validation_loss, count, torch.get_rng_state().tolist()))
    assert told[0] == told[1]
    assert told[0][0].value is not None


# the teacher's life ------------------------------------------------------------------------------------------------


def test_at_until_step_nothing_is_left_of_the_teacher(tmp_path: Path) -> None:
    config = tiny_config("cnn", distill=taught(features=PAIRS, until_step=5), trainer__precision="fp64")
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    assert engine.losses.distillation is not None
    module = engine.losses.distillation.teacher.module
    assert isinstance(module, Teaching)
    assert not module.training
    assert module.stem.weight.dtype == dtype_of(Precision.FP64)
    statistics = module.norm.running_mean.clone()
    train_on(engine, 5)
    assert torch.equal(module.norm.running_mean, statistics)
    assert "teacher.stem.weight" in teacher_names(engine.growth.parameters)
    gone = [weakref.ref(thing) for thing in (module, *module.parameters(), *module.buffers())]
    del module
    train_on(engine, 6)
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert engine.losses.distillation is None
    assert not teacher_names(engine.growth.parameters)
    engine.growth.parameters.check()
    site = engine.grown.sites["r0c0"].module
    assert len(engine.grown.model.get_submodule(site)._forward_hooks) == 1, "the slot's own"


@pytest.mark.parametrize("until", [None, 9])
def test_a_resume_finds_the_same_teacher_or_says_which_differs(until: int | None, tmp_path: Path) -> None:
    def config(seed: int) -> EsperConfig:
        distill = taught(options={"seed": seed}, features=PAIRS, until_step=until)
        return tiny_config("cnn", checkpoint__every_ticks=3, distill=distill, trainer__steps=12)

    whole = make_engine(config(0), tmp_path)
    whole.begin(None)
    train_on(whole)
    whole.saves.finish(whole.state)
    payload = whole.saver.store.load(6, "state.pt")
    assert set(payload["teacher"]) == {"source", "digest"}
    assert not [key for key in payload["model"] if "teach" in key or "stem" in key]
    assert not [key for key in payload["optimizer"] if "teach" in key]
    again = make_engine(config(0), tmp_path, attempt=2)
    again.begin(6)
    train_on(again)
    assert replica(again) == replica(whole)
    other = make_engine(config(1), tmp_path, attempt=3)
    with pytest.raises(CheckpointError, match=rf"its teacher was {PATH} \(digest .*, now it is {PATH} \(digest"):
        other.begin(6)
    without = make_engine(tiny_config("cnn", checkpoint__every_ticks=3, trainer__steps=12), tmp_path, attempt=4)
    with pytest.raises(CheckpointError, match="now it is none"):
        without.begin(6)


def trained_run(folder: Path) -> Engine:
    """A finished run that has grown, with its config beside its checkpoints; a gate and a ramp half done at step 8."""
    actions = [
        act(1, "r0c0", "GERMINATE", blueprint="conv_light", operator="GATE", ticks=3),
        act(2, "r0c0", "ADVANCE"),
        act(3, "r0c0", "ADVANCE"),
    ]
    config = tiny_config(
        "cnn", trainer__steps=12, checkpoint__every_ticks=2, checkpoint__keep=9, controller=schedule(*actions)
    )
    engine = make_engine(config, folder)
    engine.begin(None)
    train_on(engine)
    engine.saves.finish(engine.state)
    write_config(folder / "config.yaml", as_plain(config))
    return engine


def test_a_run_teaches_as_its_checkpoint_has_it(tmp_path: Path) -> None:
    engine = trained_run(tmp_path / "teacher")
    store: CheckpointStore = engine.saver.store
    bundle = engine.bundle
    x = bundle.example()
    for step in (8, None):
        config = tiny_config("cnn", distill=DistillConfig(run=str(tmp_path / "teacher"), step=step))
        teacher = build_teacher(config, bundle, torch.device("cpu"))
        assert teacher is not None
        at = step or store.best()
        assert at is not None
        assert teacher.source == f"{tmp_path / 'teacher'}, step {at}"
        network = rebuild_checkpoint(store, at, engine.fresh, engine.growth)
        network.model.eval()
        teacher.module.eval()
        with torch.no_grad():
            assert torch.equal(teacher.call(x), network.model(x))
        again = build_teacher(config, bundle, torch.device("cpu"))
        assert again is not None
        assert again.identity == teacher.identity
    student = make_engine(config, tmp_path / "student")
    student.begin(None)
    before = bits(student.losses.distillation.teacher.module.state_dict().items())  # type: ignore[union-attr]
    train_on(student, 4)
    assert bits(student.losses.distillation.teacher.module.state_dict().items()) == before  # type: ignore[union-attr]


def test_a_run_that_cannot_teach_is_one_clear_error(tmp_path: Path) -> None:
    trained_run(tmp_path / "teacher")
    run = str(tmp_path / "teacher")
    bundle, cpu = load_data(tiny_config("cnn").data), torch.device("cpu")

    def build(task: str = "cnn", **settings: Any) -> None:
        config = tiny_config(task, distill=DistillConfig(run=run, **settings))
        build_teacher(config, load_data(config.data) if task != "cnn" else bundle, cpu)

    with pytest.raises(CheckpointError, match=r"no checkpoint of step 7; there are 4, 8, 12; set distill.step"):
        build(step=7)
    with pytest.raises(ConfigError, match="its network does not fit this run's data"):
        build("gpt")
    with pytest.raises(ConfigError, match=r"distill.run = .*: no config.yaml in it, so it is no run"):
        tiny_config("cnn", distill=DistillConfig(run=str(tmp_path / "nowhere")))
    path = tmp_path / "teacher" / "checkpoints" / "step-00000008" / "state.pt"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"step-00000008/state.pt: .* bytes, the manifest says"):
        build(step=8)


MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"path": "tests.support.teachers:count_too_few"}, r"returns \(\d+, 9\), the host returns \(\d+, 10\)"),
    ({"path": "tests.support.teachers:not_a_number"}, "logits that are not finite"),
    ({"features": {"r0c0": "trunk"}}, "distill.features.r0c0 = 'trunk': the teacher has no such module; it has stem"),
    ({"path": "tests.support.teachers:tell", "features": {"r0c0": "name"}}, r"^distill\.features\.r0c0: .*str"),
    ({"features": {"r1c0": "stem"}}, r"the teacher's features there are \(\d+, 4, 8, 8\), the student's \(\d+, 8, "),
    ({"options": {"depth": 3}}, "tests.support.teachers:teach does not take input_shape, classes and these"),
]


@pytest.mark.parametrize(("settings", "said"), MISFITS)
def test_a_teacher_that_does_not_fit_is_refused_at_start(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        make_engine(tiny_config("cnn", distill=taught(**settings)), tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"run": "a"}, "one teacher at a time"),
        ({"step": 3}, "goes with distill.run"),
        ({"path": "teach"}, "write package.module:function"),
        ({"path": None, "options": {"a": 1}}, "go with distill.path"),
        ({"options": {"classes": 3}}, "input_shape and classes are given by the data"),
        ({"weight": -1.0}, "must be >= 0"),
        ({"weight": 0.0}, "must be > 0 where no features are named"),
        ({"temperature": 0.0}, "must be > 0"),
        ({"feature_weight": 0.0}, "must be > 0"),
        ({"until_step": 0}, "must be >= 1"),
        ({"features": {"early": "stem"}}, "early"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        taught(**settings)


def test_features_of_a_slot_that_is_not_in_use_and_a_path_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"distill.features.r3c0 = 'stem': no slot in use; there are r0c0"):
        tiny_config("cnn", distill=taught(features={"r3c0": "stem"}))
    with pytest.raises(ConfigError, match=r"distill.path = .*: tests.support.teachers has no teech"):
        tiny_config("cnn", distill=taught(path="tests.support.teachers:teech"))


# ranks -------------------------------------------------------------------------------------------------------------


def taught_run(rank: int, config: EsperConfig, run_dir: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    engine = make_engine(config, run_dir)
    engine.begin(None)
    train_on(engine, 14)
    tensors = {name: tensor.detach() for name, tensor in engine.grown.model.state_dict().items()}
    for name, entries in engine.owner.state_by_name().items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in entries.items()}
    return replica(engine), tensors


def test_two_ranks_learn_from_a_teacher_what_one_learns(tmp_path: Path) -> None:
    actions = [
        act(1, "r0c0", "GERMINATE", blueprint="conv_light", ticks=1),
        act(1, "r1c0", "GERMINATE", blueprint="conv_light", ticks=1),
        act(3, "r0c0", "ADVANCE"),
        act(3, "r1c0", "ADVANCE"),
        act(5, "r0c0", "ADVANCE"),
    ]
    config = tiny_config(
        "cnn",
        trainer__precision="fp64",
        trainer__accumulate=2,
        distill=taught(features=PAIRS),
        controller=schedule(*actions),
    )
    _, alone = taught_run(0, config, tmp_path / "1")
    (first, tensors), (second, _) = run_distributed(taught_run, 2, config, tmp_path / "2")
    assert first == second
    assert tensors.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-9, atol=1e-9, msg=lambda s, n=name: n + s)


def test_ranks_with_different_teachers_are_refused_at_the_handshake(tmp_path: Path) -> None:
    distill = taught(path="tests.support.teachers:teach_each_rank_otherwise")
    run_dir = prepare_run(tmp_path / "run", tiny_plain("cnn", distill=distill))
    assert live(run_dir, 2) == [76, 76]
    message = json.loads((run_dir / "STATUS.json").read_text())["message"]
    assert "ranks are unequal: teacher: rank 0 has tests.support.teachers:teach_each_rank_otherwise" in message
    assert "the teacher must be the same on every host" in message


def test_every_rank_s_teacher_is_frozen_in_a_module_tree_of_its_own(tmp_path: Path) -> None:
    engine = make_engine(tiny_config("cnn", distill=taught()), tmp_path)
    assert engine.losses.distillation is not None
    module: nn.Module = engine.losses.distillation.teacher.module
    assert not {id(p) for p in module.parameters()} & {id(p) for p in engine.grown.model.parameters()}
    assert not any(p.requires_grad for p in module.parameters())


# what it is for ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_under_noisy_labels_a_pupil_of_a_good_teacher_does_better(tmp_path: Path) -> None:
    """Three of five labels are drawn at random; the teacher learned from true ones. On three seeds, each time."""
    common: dict[str, Any] = {"control__every": 50, "trainer__batch": 32, "checkpoint__every_ticks": 0}

    def finish(config: EsperConfig, folder: Path, *, noise: bool) -> float:
        engine = make_engine(config, folder)
        if noise:
            labels = engine.bundle.train._labels  # type: ignore[attr-defined]
            stream = torch.Generator().manual_seed(config.seed)
            hit = torch.rand(len(labels), generator=stream) < 0.6
            labels[hit] = torch.randint(10, (int(hit.sum()),), generator=stream)
        engine.begin(None)
        train_on(engine)
        engine.saves.finish(engine.state)
        assert engine.state.validation_loss.value is not None
        return engine.state.validation_loss.value

    own = tiny_config("cnn", trainer__steps=800, **common)
    teacher = finish(own, tmp_path / "teacher", noise=False)
    write_config(tmp_path / "teacher" / "config.yaml", as_plain(own))
    for seed in (1, 2, 3):
        distill = DistillConfig(run=str(tmp_path / "teacher"), weight=2.0, temperature=2.0)
        settings: dict[str, Any] = {"seed": seed, "trainer__steps": 400, **common}
        with_teacher = finish(tiny_config("cnn", distill=distill, **settings), tmp_path / f"w{seed}", noise=True)
        without = finish(tiny_config("cnn", **settings), tmp_path / f"o{seed}", noise=True)
        assert with_teacher < without, (seed, teacher, with_teacher, without)
        print(f"seed {seed}: teacher {teacher:.3f}, pupil {with_teacher:.3f}, alone {without:.3f} nats")
