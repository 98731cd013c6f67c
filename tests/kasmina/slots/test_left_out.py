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
    grown.beat.may_skip = True
    call(X)
    model.skip, grown.beat.may_skip = False, False
    call(X).sum().backward()
    assert all(parameter.grad is not None for parameter in holder.parameters())


def session(kind: str, incubation: str, **more: Any) -> esper.Session:
    model = Skipping(kind)
    sites = esper.attach(Skipping("always"), SITES, X).sites
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


def test_a_seed_at_rest_needs_no_site() -> None:
    grown = esper.attach(Skipping("branch"), SITES, X)
    set_to_work(grown, "r0c0", born(grown, "r0c0"), 0.0)
    grown.slots["r0c0"].phase = Phase.OFF
    grown.model.skip = True
    grown.model.train()(X).sum().backward()
