"""A site that is left out of a forward or has no gradients is named: at attach where it shows, else at the step."""

import re
from typing import Any

import pytest
import torch

import esper
from esper.kasmina.attach import attach_described
from esper.kasmina.slots.phases import phase_of
from esper.kasmina.slots.slot import Phase
from esper.leyline.errors import ConfigError
from esper.leyline.stages import Incubation, Stage
from esper.tolaria.growth.config import OptimConfig
from esper.tolaria.growth.ownership import ParameterOwner
from tests.support.sessions import GATES
from tests.support.skipping import Skipping, ask, batches
from tests.support.tiny import act
from tests.support.working_seeds import born, set_to_work

SITES = {"r0c0": "site"}
X = batches(1)[0][0]
NAMED = r"^site 'site' of slot r0c0 did not run in a forward in which its seed learns: a host that leaves modules out"


def state(model: torch.nn.Module) -> Any:
    return torch.get_rng_state().tolist(), model.training, model.site.training


@pytest.mark.parametrize("start", range(5))
def test_a_site_that_is_left_out_at_random_is_named_at_attach(start: int) -> None:
    """Whether the first forward leaves it out or not."""
    model = Skipping("drop")
    torch.manual_seed(start)
    before = state(model)
    with pytest.raises(ConfigError, match=r"site 'site' of slot r0c0 fired 0 times .* \(layer drop, .*set that to 0"):
        esper.attach(model, SITES, X)
    assert state(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_site_without_gradients_is_named_at_attach_and_one_that_runs_again_with_them_is_none() -> None:
    model = Skipping("no_grad")
    with pytest.raises(ConfigError, match=r"^site 'site' of slot r0c0 runs without gradients in train\(\)"):
        esper.attach(model, SITES, X)
    for kind in ("reentrant", "always", "branch"):
        model = Skipping(kind)
        before = state(model)
        assert set(esper.attach(model, SITES, X).slots) == {"r0c0"}
        assert state(model) == before
        assert all(parameter.grad is None for parameter in model.parameters())
        frozen = Skipping(kind).requires_grad_(False)
        assert set(esper.attach(frozen, SITES, X).slots) == {"r0c0"}


@pytest.mark.parametrize("incubation", Incubation)
def test_a_forward_without_the_site_is_refused_only_where_the_seed_learns(incubation: Incubation) -> None:
    model = Skipping("branch")
    grown = esper.attach(model, SITES, X)
    model.skip = True
    model.train()(X)  # empty
    set_to_work(grown, "r0c0", born(grown, "r0c0"), 0.0)
    holder = grown.slots["r0c0"]
    learning = Stage.BLENDING if incubation == Incubation.IMMEDIATE else Stage.TRAINING
    holder.phase = phase_of(learning, incubation)
    call = (lambda x: grown.incubate("r0c0", x)) if incubation == Incubation.SHADOW else model
    with pytest.raises(ConfigError, match=NAMED) as caught:
        call(X)
    assert "\n" not in str(caught.value)
    assert re.search(r"find_unused \(world\.find_unused=true, Session\(find_unused=True\)\)$", str(caught.value))
    with torch.no_grad():
        call(X)
    with grown.disabled():
        model(X)
    model.eval()
    call(X)  # runs the site
    model.train()
    if incubation == Incubation.SHADOW:
        model(X)
    for parameter in holder.parameters():
        parameter.requires_grad_(False)
    call(X)
    for parameter in holder.parameters():
        parameter.requires_grad_(True)
    grown.beat.find_unused = True
    call(X)
    model.skip, grown.beat.find_unused = False, False
    call(X).sum().backward()
    assert all(parameter.grad is not None for parameter in holder.parameters())


def session(kind: str, incubation: str, *, may_skip: bool = False, **more: Any) -> esper.Session:
    model = Skipping(kind)
    sites = esper.attach(Skipping("always"), SITES, X, may_skip=may_skip).sites
    grown = attach_described(model, sites, X)  # as a checkpoint does: without a dry run
    actions = [
        act(1, "r0c0", "GERMINATE", blueprint="mlp", ticks=0),
        act(3, "r0c0", "ADVANCE"),
    ]
    return esper.Session(
        grown,
        torch.optim.SGD(model.parameters(), lr=0.1),
        controller={"kind": "schedule", "actions": actions},
        loss=ask,
        probe=batches(4, 1),
        every=2,
        gates=GATES,
        slots={"incubation": incubation},
        **more,
    )


def lived(ours: esper.Session, skip_from: int) -> int:
    model: Any = ours.grown.model
    for step, batch in enumerate(ours.epoch(batches(16))):
        model.skip = step >= skip_from and step % 3 == 0
        ours.loss(batch).backward()
        ours.step()
    return ours.steps


@pytest.mark.parametrize("incubation", ["shadow", "ste", "immediate"])
def test_a_step_names_what_attach_could_not_see(incubation: str) -> None:
    with pytest.raises(ConfigError, match=NAMED):
        lived(session("branch", incubation), 9)
    text = "^no gradient reached the seed of slot r0c0 at site 'site': what it adds is cut off"
    with pytest.raises(ConfigError, match=text):
        lived(session("cut", incubation), 99)
    assert lived(session("reentrant", incubation), 99) == 16


def test_who_allows_unused_parameters_allows_a_site_that_is_left_out() -> None:
    assert lived(session("branch", "immediate", find_unused=True), 0) == 16


@pytest.mark.parametrize("incubation", Incubation)
def test_a_site_that_may_skip_gives_zeros_where_it_was_left_out(incubation: Incubation) -> None:
    """Bits of the output are the host's; what the seed gets is exact: zeros."""
    model = Skipping("drop")
    grown = esper.attach(model, SITES, X, may_skip=["r0c0"])
    model.kind = "branch"
    assert grown.sites["r0c0"].may_skip
    set_to_work(grown, "r0c0", born(grown, "r0c0"), 0.5)
    holder = grown.slots["r0c0"]
    holder.phase = phase_of(Stage.BLENDING if incubation == Incubation.IMMEDIATE else Stage.TRAINING, incubation)
    call = (lambda x: grown.incubate("r0c0", x)) if incubation == Incubation.SHADOW else model
    model.train().skip = True
    call(X).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in holder.parameters())
    twin = Skipping("branch").train()
    twin.skip = True
    twin(X).sum().backward()
    assert torch.equal(model(X), twin(X))
    if incubation != Incubation.SHADOW:
        assert torch.equal(model.head.weight.grad, twin.head.weight.grad)
    model.skip = False
    call(X).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in holder.parameters())


class Several(torch.nn.Module):
    """Returns a mapping with two tensors, of which a loss may read either."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Skipping("branch")

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        y = self.inner(x)
        return {"loss": y.square().mean(), "logits": y, "count": torch.tensor(3), "aside": x}


@pytest.mark.parametrize("name", ["loss", "logits"])
def test_whichever_output_a_loss_reads(name: str) -> None:
    grown = esper.attach(Several(), {"r0c0": "inner.site"}, X, may_skip=True)
    set_to_work(grown, "r0c0", born(grown, "r0c0"), 1.0)
    model: Any = grown.model.train()
    model.inner.skip = True
    output = model(X)
    assert not output["aside"].requires_grad
    output[name].sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in grown.slots["r0c0"].parameters())


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (["r1c0"], "r1c0"),
        ("r0c0", r"may_skip = 'r0c0': expected slot ids such as \["),
        ([3], r"may_skip = \[3\]: expected slot ids"),
    ],
)
def test_what_may_skip_takes(asked: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        esper.attach(Skipping("drop"), SITES, X, may_skip=asked)


def test_a_site_that_may_skip_runs_in_eval_and_a_pattern_says_so_for_all() -> None:
    with pytest.raises(ConfigError, match=r"sites is a pattern; say True for all"):
        esper.attach(Skipping("drop"), "site", X, may_skip=["r0c0"])
    for start in range(4):
        torch.manual_seed(start)
        assert esper.attach(Skipping("drop"), "stem|site", X, may_skip=True).sites["r1c0"].module == "site"
    with pytest.raises(ConfigError, match=r"fired 0 times in one eval\(\) forward, .*may_skip is for train\(\) alone"):
        esper.attach(Skipping("never"), SITES, X, may_skip=True)


def test_a_seed_takes_no_step_where_its_site_did_not_run() -> None:
    """Neither weights, nor moments, nor decay, nor the measurements of its gradient."""
    model = Skipping("branch")
    grown = esper.attach(model, SITES, X, may_skip=True)
    set_to_work(grown, "r0c0", born(grown, "r0c0"), 1.0)
    owner = ParameterOwner(grown, OptimConfig(lr=0.1, weight_decay=0.1, health_every=1), 100)
    owner.register("r0c0")
    assert not owner.late
    x, found = batches(1)[0][0], []
    for skip in (False, True, True, False):
        model.skip = skip
        before = {name: p.detach().clone() for name, p in grown.slots["r0c0"].named_parameters()}
        model(x).square().mean().backward()
        report = owner.step()
        moved = any(not torch.equal(p, before[name]) for name, p in grown.slots["r0c0"].named_parameters())
        found.append((moved, "r0c0" in report.norms, "host" in report.norms))
    assert found == [(True, True, True), (False, False, True), (False, False, True), (True, True, True)]
    health = owner.health.take()
    assert (health["r0c0"].health_steps, health["host"].health_steps) == (2, 4)
    steps = {int(owner.optimizer.state[p]["step"]) for p in grown.slots["r0c0"].seed.parameters()}
    assert steps == {2}


def test_a_seed_at_rest_needs_no_site() -> None:
    grown = esper.attach(Skipping("branch"), SITES, X)
    set_to_work(grown, "r0c0", born(grown, "r0c0"), 0.0)
    grown.slots["r0c0"].phase = Phase.OFF
    grown.model.skip = True
    grown.model.train()(X).sum().backward()
