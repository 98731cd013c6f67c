"""A whole life in a user's own loop, alone; against a plain PyTorch loop wherever seeds must leave no trace."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, TensorDataset

import esper
from esper.kasmina.slots.sites import CONTAINER
from esper.leyline.errors import ConfigError, LoopError
from esper.leyline.events import ContributionMeasured, TickDone
from esper.leyline.stages import Stage
from tests.support.dist import ROOT
from tests.support.sessions import (
    EVERY,
    LIFE,
    LIFE_STEPS,
    STAGES,
    A,
    B,
    adamw,
    batch,
    host,
    loss,
    make,
    moments,
    of,
    probe,
    replica,
    stages,
    train,
)
from tests.support.tiny import act, bits

INCUBATE = [act(1, A, "GERMINATE", blueprint="conv_light", ticks=1), act(3, A, "ADVANCE")]


def plain_loop(steps: int, optimizer: Any = adamw, scheduler: Any = None, **of_host: Any) -> dict[str, Any]:
    """What a PyTorch user writes without us."""
    model = host(**of_host)
    made = optimizer(model)
    planned = None if scheduler is None else scheduler(made)
    losses, rates = [], []
    for step in range(steps):
        value = loss(model, batch(step))[0].mean()
        value.backward()
        rates.append([group["lr"] for group in made.param_groups])
        made.step()
        made.zero_grad()
        if planned is not None:
            planned.step()
        losses.append(value.item())
    state = {name: made.state[p] for name, p in model.named_parameters()}
    named = {f"{n}.{k}": v for n, entry in state.items() for k, v in entry.items() if isinstance(v, torch.Tensor)}
    return {"model": model, "losses": losses, "rates": rates, "moments": bits(named.items())}


def of_host(session: esper.Session, found: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in found.items() if not name.startswith(CONTAINER)}


def test_a_whole_life_in_a_users_own_loop():
    session = make()
    one_object = session.model
    losses = train(session, range(LIFE_STEPS))
    assert stages(session) == STAGES
    assert session.state.slot(A).stage is Stage.FOSSILIZED
    assert all(value == value for value in losses)
    assert session.model is one_object
    assert copy.deepcopy(session.model)(batch(0)[0]).shape == (8, 3)
    assert [group["owner"] for group in session.optimizer.param_groups] == ["host", A, A]
    assert len(of(session, TickDone)) == session.state.tick == LIFE_STEPS // EVERY
    assert [event.look for event in of(session, ContributionMeasured) if event.slot == A][:2] == [1, 2]
    table = session.status()
    assert table.row_count == 2
    plain, x = session.export(fold=False), batch(0)[0]
    assert not any(type(module).__module__.startswith("esper") for module in plain.modules())
    assert torch.equal(plain(x), session.grown.model.eval()(x))
    session.close()
    session.close()


def test_alpha_follows_its_ramp_at_every_step_not_at_ticks_alone():
    session, alphas = make(), []
    for step in range(16):
        train(session, [step])
        alphas.append(session.grown.slots[A].level)
        assert alphas[-1] == session.state.slot(A).alpha(session.steps)
    rising = [alpha for alpha in alphas if 0.0 < alpha < 1.0]
    assert len(set(rising)) == len(rising) == 2 * EVERY - 1


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("actions", [(), INCUBATE], ids=["no growth", "incubating"])
def test_without_a_blended_seed_the_host_is_that_of_a_plain_loop(actions, dropout):
    torch.manual_seed(5)
    wanted = plain_loop(12, dropout=dropout, scheduler=cosine)
    torch.manual_seed(5)
    session = make(host(dropout=dropout), actions=actions, scheduler=cosine)
    losses = train(session, range(12))
    assert losses == wanted["losses"]
    assert of_host(session, bits(session.grown.model.named_parameters())) == bits(wanted["model"].named_parameters())
    assert of_host(session, bits(moments(session).items())) == wanted["moments"]
    if actions:
        assert session.state.slot(A).stage is Stage.TRAINING
        assert any(name.startswith(CONTAINER) for name in moments(session)), "the seed never learned"


# schedulers ---------------------------------------------------------------------------------------------------------


def lambdas(optimizer):
    return schedules.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + 0.1 * step))


def one_cycle(optimizer):
    return schedules.OneCycleLR(optimizer, max_lr=0.02, total_steps=2 * LIFE_STEPS)


def cosine(optimizer):
    return schedules.CosineAnnealingLR(optimizer, T_max=LIFE_STEPS)


def sequence(optimizer):
    parts = [schedules.LinearLR(optimizer, 0.1, total_iters=4), schedules.CosineAnnealingLR(optimizer, T_max=20)]
    return schedules.SequentialLR(optimizer, parts, milestones=[4])


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # torch's own SequentialLR
@pytest.mark.parametrize("scheduler", [lambdas, one_cycle, cosine, sequence])
def test_a_users_scheduler_survives_growth(scheduler):
    wanted = plain_loop(LIFE_STEPS, scheduler=scheduler)["rates"]
    session, rates = make(scheduler=scheduler), []
    for step in range(LIFE_STEPS):
        rates.append([group["lr"] for group in session.optimizer.param_groups if group["owner"] == "host"])
        train(session, [step])
        entry = session.state.slot(A)
        seed = [group for group in session.optimizer.param_groups if group.get("owner") == A]
        if seed and entry.learn_step is not None and step > entry.learn_step + 3:
            assert {group["lr"] for group in seed} == set(rates[-1])
            betas = {group["betas"] for group in seed}
            assert len(betas) == 1
    assert rates == wanted
    assert len({rate[0] for rate in rates}) > 10
    assert stages(session) == STAGES


def test_a_scheduler_per_epoch_steps_at_the_end_of_an_epoch():
    session = make(scheduler=lambda opt: schedules.StepLR(opt, 1, gamma=0.5), scheduler_per="epoch", actions=())
    data = [batch(step) for step in range(3)]
    for epoch in range(2):
        for one in session.epoch(data):
            assert session.optimizer.param_groups[0]["lr"] == 0.01 * 0.5**epoch
            session.loss(one).backward()
            session.step()
    assert session.optimizer.param_groups[0]["lr"] == 0.01 * 0.25
    assert (session.epochs, session.steps) == (2, 6)


def test_a_scheduler_that_cannot_work_is_refused_by_name():
    with pytest.raises(ConfigError, match="ReduceLROnPlateau: its step needs a metric"):
        make(scheduler=schedules.ReduceLROnPlateau)
    other = adamw(host())
    with pytest.raises(ConfigError, match="belongs to another optimizer"):
        make(scheduler=lambda _: schedules.StepLR(other, 1))


# optimizers ---------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": {"lr": 0.05, "momentum": 0.9, "nesterov": True},
    "AdamW": {"lr": 0.01, "amsgrad": True},
    "NAdam": {"lr": 0.01},
    "Adafactor": {"lr": 0.05},
    "Rprop": {"lr": 0.01},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_with_groups_grows_and_is_restored_exactly(name, tmp_path):
    def build(model):
        return getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])

    session = make(optimizer=build)
    train(session, range(11))
    assert session.state.slot(A).stage is Stage.BLENDING
    session.save(tmp_path / "s.pt")
    again = esper.Session.restore(tmp_path / "s.pt", host, loss=loss, probe=probe())
    assert type(again.optimizer) is type(session.optimizer)
    for one in (session, again):
        train(one, range(11, LIFE_STEPS))
    assert replica(again) == replica(session)
    assert [name for name, _ in session._loop.owner.state_by_name().items() if f"{CONTAINER}.{B}" in name] == []


def test_groups_of_the_users_own_stay_as_they_are():
    def build(model):
        first, *rest = model.named_parameters()
        groups = [{"params": [first], "lr": 0.5}, {"params": rest, "betas": (0.8, 0.9)}]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.3)

    session = make(optimizer=build, seed_lr_scale=0.5, seed_weight_decay=0.05)
    train(session, range(12))
    mine = [group for group in session.optimizer.param_groups if group.get("owner") == A]
    assert [len(group["params"]) for group in session.optimizer.param_groups[:2]] == [1, 5]
    assert {group["lr"] for group in mine} == {0.005}, "the rate of the widest group, scaled"
    assert {group["betas"] for group in mine} == {(0.8, 0.9)}
    assert {group["weight_decay"] for group in mine} == {0.05, 0.0}
    assert all(name.startswith(f"{CONTAINER}.{A}") for group in mine for name in group["param_names"])


def test_groups_stand_in_the_order_of_slots_whoever_was_born_first():
    births = [act(1, B, "GERMINATE", blueprint="norm", ticks=1), act(3, A, "GERMINATE", blueprint="norm", ticks=1)]
    session = make(actions=births)
    train(session, range(10))
    owners = [group["owner"] for group in session.optimizer.param_groups]
    assert owners == ["host", *[A] * owners.count(A), *[B] * owners.count(B)]
    assert {A, B} < set(owners)


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Muon"])
def test_an_optimizer_that_cannot_grow_is_refused_by_name(name):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")

    def build(model):
        return getattr(torch.optim, name)([p for p in model.parameters() if p.ndim == 2], lr=0.1)

    with pytest.raises(ConfigError, match=f"optimizer = {name}: it cannot grow"):
        make(optimizer=build)


def test_parameters_in_no_group_and_foreign_ones_are_named():
    with pytest.raises(ConfigError, match=r"0\.weight, 0\.bias of the host stand in no parameter group"):
        make(optimizer=lambda model: torch.optim.SGD(list(model.parameters())[2:], lr=0.1))
    stray = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match=r"group 0 parameter 6 \(2, 3\) is no parameter of the host"):
        make(optimizer=lambda model: torch.optim.SGD([*model.parameters(), stray], lr=0.1))
    model = host()
    model[0].requires_grad_(False)
    make(model, optimizer=lambda m: torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1))


# moving, copying, going back ----------------------------------------------------------------------------------------


def test_a_grown_model_is_cast_and_copied_in_the_middle_of_its_life():
    def cast(model, data):
        return loss(model, (data[0].to(next(model.parameters()).dtype), data[1]))

    session = make(host(dtype=torch.float32), loss=cast)
    train(session, range(12))
    x = batch(99)[0]
    twin = copy.deepcopy(session.grown.model).double().eval()
    session.grown.model.eval()
    assert torch.allclose(twin(x).float(), session.model(x.float()), atol=1e-5)
    session.grown.model.train()
    session.to(torch.float64)
    train(session, range(12, LIFE_STEPS))
    assert stages(session) == STAGES
    assert {tensor.dtype for tensor in moments(session).values() if tensor.ndim} == {torch.float64}
    session.grown.model.float()
    session.loss(batch(0, dtype=torch.float32)).backward()
    with pytest.raises(LoopError, match=r"changed beside the session; use session\.to"):
        session.step()


def test_a_dormant_checkpoint_over_a_grown_session_leaves_no_trace():
    session = make()
    train(session, range(2))
    dormant, wanted = session.state_dict(), replica(session)
    train(session, range(2, 15))
    assert [session.grown.slots[slot].seed is not None for slot in (A, B)] == [True, True]
    seeds = [weakref.ref(p) for slot in (A, B) for p in session.grown.slots[slot].seed.parameters()]
    later = replica(session)
    session.load_state_dict(dormant)
    gc.collect()
    assert [ref() for ref in seeds] == [None] * len(seeds)
    assert replica(session) == wanted
    assert not any(key.startswith(CONTAINER) for key in session.grown.model.state_dict())
    assert len(session.optimizer.param_groups) == 1
    assert {id(p) for p in session.optimizer.state} == {id(p) for p in session.grown.model.parameters()}
    train(session, range(2, 15))
    assert replica(session) == later


def test_batch_norm_and_bf16_autocast_go_through_a_life():
    def autocast(model, data):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return loss(model, data)

    data = [batch(-1 - i, dtype=torch.float32) for i in range(8)]
    session = make(host(batch_norm=True, dtype=torch.float32), loss=autocast, probe=data)
    losses = train(session, range(LIFE_STEPS))
    assert stages(session) == STAGES
    assert all(value == value for value in losses)


# accumulation and epochs --------------------------------------------------------------------------------------------


def test_an_accumulated_window_is_the_step_of_the_whole_batch():
    whole, windowed = make(), make()
    train(whole, range(12))
    for step in range(12):
        x, y = batch(step)
        with windowed.accumulate():
            windowed.loss((x[:4], y[:4])).backward()
        windowed.loss((x[4:], y[4:])).backward()
        windowed.step()
    assert windowed.state.tick == whole.state.tick
    for (name, wanted), (_, found) in zip(
        whole.grown.model.named_parameters(), windowed.grown.model.named_parameters()
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, msg=name)


def test_ticks_come_at_the_end_of_an_epoch_where_every_is_0():
    session = make(every=0, actions=())
    for _ in range(2):
        for one in session.epoch([batch(step) for step in range(3)]):
            session.loss(one).backward()
            session.step()
    assert [event.step for event in of(session, TickDone)] == [3, 6]


def test_loaders_of_any_kind():
    def ones(loader):
        seen = 0
        for one in session.epoch(loader):
            session.loss(one).backward()
            session.step()
            seen += 1
        return seen

    session = make(actions=())
    x, y = batch(0, 20)
    assert ones(DataLoader(TensorDataset(x, y), 8)) == 3
    assert ones(iter([batch(1), batch(2)])) == 2

    class Lying(list):
        def __len__(self):
            return 5

    with pytest.raises(ConfigError, match="it said 5 batches and ended after 2"):
        ones(Lying([batch(0), batch(1)]))
    with pytest.raises(ConfigError, match="loader: it is empty"):
        ones([])


# the order of calls -------------------------------------------------------------------------------------------------


def test_calls_out_of_order_are_one_clear_error_each(tmp_path):
    session = make()
    with pytest.raises(LoopError, match=r"session\.step\(\) without session\.loss"):
        session.step()
    value = session.loss(batch(0))
    with pytest.raises(LoopError, match=r"the host has no gradient; call loss\.backward\(\) first"):
        session.step()
    value.backward()
    with pytest.raises(LoopError, match=r"called again before session\.step"):
        session.loss(batch(1))
    with pytest.raises(LoopError, match=r"optimizer\.step\(\) was called beside the session"):
        session.optimizer.step()
    for between in (lambda: session.to("cpu"), lambda: next(session.epoch([batch(0)]))):
        with pytest.raises(LoopError, match=r"call session\.step\(\) first, or session\.discard\(\)"):
            between()
    session.step()
    with session.accumulate():
        session.loss(batch(1)).backward()
        with pytest.raises(LoopError, match=r"a save within session\.accumulate"):
            session.save(tmp_path / "x")
        with pytest.raises(LoopError, match=r"within session\.accumulate"):
            session.step()
    with pytest.raises(LoopError, match=r"last session\.loss\(batch\) goes outside session\.accumulate"):
        session.step()
    session.loss(batch(2)).backward()
    session.step()
    epoch = session.epoch([batch(3)])
    session.loss(next(epoch)).backward()
    with pytest.raises(LoopError, match="the epoch ended between"):
        next(epoch)
    session.step()
    session.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    session.loss(batch(4)).backward()
    with pytest.raises(LoopError, match="groups were changed beside the session"):
        session.step()
    session.close()
    with pytest.raises(LoopError, match=r"called after session\.close"):
        session.model(batch(0)[0])
    for call in (lambda: session.loss(batch(0)), session.step):
        with pytest.raises(LoopError, match="the session is closed"):
            call()
    session.optimizer.step()  # it is the user's again
    assert "owner" not in session.optimizer.param_groups[0]


def test_without_gradients_a_loss_only_evaluates():
    session = make()
    train(session, range(12))
    before = replica(session)
    with torch.no_grad():
        value = session.loss(batch(3))
    session.grown.model.eval()
    assert value.item() == loss(session.model, batch(3))[0].mean().item()
    session.grown.model.train()
    assert replica(session) == before
    train(session, [12])


# what it refuses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (
            lambda model, data: loss(model, data)[0].mean(),
            r"returned float64 \[\], expected one value per sample, \[8\]",
        ),
        (lambda model, data: model(data[0]), r"returned float64 \[8, 3\]"),
        (lambda model, data: torch.cat([loss(model, data)[0]] * 2), r"returned float64 \[16\]"),
        (lambda model, data: (loss(model, data)[0], torch.zeros(3)), r"\(float64 \[8\], float32 \[3\]\)"),
        (lambda model, data: None, "returned NoneType"),
    ],
)
def test_a_loss_without_one_value_per_sample_is_one_clear_error(returned, text):
    session = make(loss=returned)
    with pytest.raises(ConfigError, match=text):
        session.loss(batch(0))


def test_what_is_missing_is_said_in_one_line(capsys):
    grown = esper.attach(host(), {A: "0"}, batch(0)[0])
    session = esper.Session(grown, adamw(grown.model))
    said = capsys.readouterr().err
    assert said == "esper: Session without loss and probe: evidence gates will refuse everything\n"
    assert session.config.slots.incubation == "ste"
    for step in range(3):
        loss(session.model, batch(step))[0].mean().backward()
        session.step()
    assert session.steps == 3
    with pytest.raises(LoopError, match="needs loss= at construction"):
        session.loss(batch(0))
    with pytest.raises(ConfigError, match="shadow: needs loss="):
        make(loss=None)
    with pytest.raises(ConfigError, match=r"probe: 64 samples in 8 clusters are too few for any seed ever to pass G5"):
        make(gates={"probe_samples": 64})
    with pytest.raises(ConfigError, match="probe = generator: it has no length"):
        make(probe=(one for one in probe()))


def test_settings_are_checked_like_any_config():
    with pytest.raises(ConfigError, match=r"session\.step = 5: no such setting; did you mean session\.steps"):
        make(step=5)
    with pytest.raises(ConfigError, match=r"gates\.look_ever = 1: no such setting; did you mean gates\.look_every"):
        make(gates={"look_ever": 1})
    with pytest.raises(ConfigError, match=r"session\.every = '4': expected a whole number of steps"):
        make(every="4")
    with pytest.raises(ConfigError, match="every = -1: optimizer steps, must be >= 1"):
        make(every=-1)
    with pytest.raises(ConfigError, match=r"find_unused = True: does not go with slots\.incubation = shadow"):
        make(find_unused=True)
    with pytest.raises(
        ConfigError, match=r"slots\.ids = \['r0c0'\]: a session has the slots of its attach \(r0c0, r1c0\)"
    ):
        make(slots={"incubation": "shadow", "ids": [A]})
    make(slots={"incubation": "shadow", "ids": [B, A]})
    with pytest.raises(ConfigError, match=r"controller\.kind = 'clever': unknown; kinds are"):
        make(controller="clever")
    with pytest.raises(ConfigError, match=r"controller = int: expected a kind by name"):
        make(controller=3)
    session = make()
    train(session, range(6))
    with pytest.raises(ConfigError, match="r0c0 already hold seeds"):
        esper.Session(session.grown, session.optimizer)


def test_a_controller_of_ones_own_and_a_file_of_events(tmp_path):
    class Waits:
        name = "waits"
        seen = 0

        def decide(self, observation):
            self.seen += 1
            return []

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    session = make(controller=Waits(), sink=tmp_path / "events.jsonl", steps=4)
    train(session, range(6))
    session.save(tmp_path / "s.pt")
    session.close()
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) >= 4
    with pytest.raises(esper.leyline.errors.CheckpointError, match="its controller was an object; pass controller="):
        esper.Session.restore(tmp_path / "s.pt", host, loss=loss, probe=probe())
    again = Waits()
    esper.Session.restore(tmp_path / "s.pt", host, controller=again, loss=loss, probe=probe())
    assert again.seen == session.parts.controller.seen == 3
    assert LIFE


@pytest.mark.filterwarnings("default")  # as a user runs it
def test_the_script_in_the_docs_runs_as_it_stands_and_grows(tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "session.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    world: dict[str, Any] = {"__name__": "docs"}
    exec(code, world)
    printed = capsys.readouterr().out
    first, last = (float(printed.split(f"epoch {epoch}: loss ")[1].split()[0]) for epoch in (0, 11))
    assert last < 0.5 * first
    assert "FOSSILIZED" in printed
    worth = [line for line in printed.splitlines() if line.endswith(" nats")]
    assert [line.split(":")[0] for line in worth] == ["r0c0", "r1c0"]
    assert (tmp_path / "grown.pt").exists()


@pytest.mark.filterwarnings("default")  # as a user runs it
def test_the_short_script_in_the_readme_runs_as_it_stands_and_grows(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.split("## Your own loop")[1].split("```python\n")[1].split("```")[0]
    world: dict[str, Any] = {"__name__": "readme"}
    exec(code, world)
    world["session"].close()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "r0c0" in line]
    assert "conv" in line, line  # a seed of a feature map has germinated there
