"""One network for any number of slots; what is not present has no influence; what is legal while acting is learned."""

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from esper.leyline.errors import EsperError
from esper.leyline.stages import Op
from esper.tamiyo.policy.arrays import arrays_of, stack, to_batch
from esper.tamiyo.policy.heads import Batch
from esper.tamiyo.policy.masks import Arrays
from esper.tamiyo.policy.memory import Memory
from esper.tamiyo.policy.network import GrowthAgent
from esper.tamiyo.policy.options import HEADS, OPTIONS
from tests.support.any_observations import any_observation

T, N = 5, 4


def make_agent(hidden: int = 64) -> GrowthAgent:
    """An agent whose logits are far from uniform."""
    torch.manual_seed(0)
    agent = GrowthAgent(hidden=hidden)
    with torch.no_grad():
        for name, parameter in agent.named_parameters():
            if "head" in name or "score" in name:
                parameter.mul_(100.0)
    return agent


def drawn(rng: random.Random, slots: int = 3, **padding: int) -> Arrays:
    observation, memory = any_observation(rng, slots), Memory()
    memory.note(observation)
    return arrays_of(observation, memory, **({"entries": 6} | padding))


def batch_of(seed: int, rows: int, **options: int) -> Batch:
    rng = random.Random(seed)
    return to_batch(stack([drawn(rng, **options) for _ in range(rows)]))


def generators(count: int = N) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(env) for env in range(count)]


def test_it_is_small() -> None:
    assert sum(parameter.numel() for parameter in GrowthAgent().parameters()) < 150_000


@pytest.mark.parametrize("hidden", [0, 64])
def test_judging_equals_acting_with_resets_and_masks(hidden: int) -> None:
    agent, rows = make_agent(hidden), [batch_of(t, N) for t in range(T)]
    starts = torch.rand(T, N, generator=torch.Generator().manual_seed(1)) > 0.6
    streams, first = generators(), torch.zeros(N, 2 * hidden)
    state, taken = first, []
    for t in range(T):
        taken.append(agent.act(rows[t], state * ~starts[t][:, None], generators=streams))
        state = taken[-1].state
    whole = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    judged = agent(whole, first, starts, {head: torch.stack([d.actions[head] for d in taken]) for head in HEADS})
    assert torch.allclose(judged.log_prob, torch.stack([d.log_prob for d in taken]), atol=1e-6)
    assert torch.allclose(judged.value, torch.stack([d.value for d in taken]), atol=1e-6)
    for head in HEADS[1:]:
        off = ~judged.matters[head]
        assert bool(off.any()), head
        assert bool((judged.entropies[head][off] == 0).all()), head
    (judged.log_prob.sum() + judged.value.sum() + judged.entropy.sum()).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in agent.parameters())


def test_every_head_is_learned() -> None:
    agent = make_agent()
    batch = batch_of(0, 64)
    taken = agent.act(batch, agent.begin(64), generators=generators(64))
    rows = {name: x[None] for name, x in batch.items()}
    judged = agent(
        rows, agent.begin(64), torch.ones(1, 64, dtype=torch.bool), {h: a[None] for h, a in taken.actions.items()}
    )
    (judged.log_prob.sum() + judged.value.sum()).backward()
    dead = [name for name, p in agent.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert [name for name in dead if "weight_hh" not in name] == []  # the state before the first row is zero


def told(agent: GrowthAgent, batch: Batch) -> tuple[Tensor, Tensor, Batch]:
    rows = len(batch["run"])
    taken = agent.act(batch, agent.begin(rows), generators=generators(rows))
    return taken.log_prob, taken.value, taken.actions


def test_padding_and_what_is_absent_have_no_influence_not_even_as_nan() -> None:
    agent, rng = make_agent(), random.Random(3)
    observations = [any_observation(rng, 3) for _ in range(N)]

    def padded(**padding: int) -> Arrays:
        rows = []
        for observation in observations:
            memory = Memory()
            memory.note(observation)
            rows.append(arrays_of(observation, memory, **padding))
        return stack(rows)

    log_prob, value, actions = told(agent, to_batch(padded(entries=6)))
    wide = padded(slots=7, entries=11)
    for arrays in (wide, {name: array.copy() for name, array in wide.items()}):
        if arrays is not wide:
            arrays["slots"][~arrays["present_slots"]] = np.nan
            arrays["entries"][~arrays["present_entries"]] = np.nan
        batch = to_batch(arrays)
        again = told(agent, batch)
        assert torch.allclose(again[0], log_prob, atol=1e-5)
        assert torch.allclose(again[1], value, atol=1e-5)
        assert all(torch.equal(again[2][head], actions[head]) for head in HEADS)
    rows = {name: x[None] for name, x in batch.items()}
    judged = agent(rows, agent.begin(N), torch.ones(1, N, dtype=torch.bool), {h: a[None] for h, a in actions.items()})
    (judged.log_prob.sum() + judged.value.sum() + judged.entropy.sum()).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in agent.parameters() if parameter.grad is not None)


def test_slots_in_another_order_are_the_same_run() -> None:
    agent, batch = make_agent(), batch_of(4, N, slots=4)
    order = torch.tensor([2, 0, 3, 1])
    by_slot = {"slots": 1, "entries": 1, "present_slots": 1, "present_entries": 1, "mask_slot": 2}
    by_slot |= {"mask_blueprint": 1, "mask_operator": 2, "mask_speed": 1}
    turned = {name: x.index_select(by_slot[name], order) if name in by_slot else x for name, x in batch.items()}
    first, second = (agent.act(b, agent.begin(N)) for b in (batch, turned))  # greedy
    assert torch.equal(first.actions["op"], second.actions["op"])
    acts = first.actions["op"] != OPTIONS.ops.index(Op.WAIT)
    assert bool(acts.any())
    assert torch.equal(first.actions["slot"][acts], order[second.actions["slot"]][acts])
    assert torch.allclose(first.log_prob, second.log_prob, atol=1e-5)
    assert torch.allclose(first.value, second.value, atol=1e-5)


def test_the_same_weights_serve_three_slots_and_five() -> None:
    agent = make_agent()
    for slots in (1, 5, 48):
        log_prob, value, _ = told(agent, batch_of(slots, N, slots=slots))
        assert bool((log_prob.isfinite() & value.isfinite()).all())


def test_an_op_with_many_legal_slots_is_no_likelier_for_their_number() -> None:
    torch.manual_seed(0)
    agent = GrowthAgent()  # close to uniform
    batch = batch_of(6, 1, slots=48)
    mask = torch.zeros_like(batch["mask_slot"])
    mask[:, 1, :] = True
    mask[:, 4, 0] = True
    batch |= {"mask_slot": mask, "mask_op": torch.tensor([[True, True, False, False, True, False]])}
    batch["mask_blueprint"][:] = batch["mask_speed"][:] = batch["mask_operator"][:] = True
    rows = {name: x[None] for name, x in batch.items()}
    actions = {head: torch.zeros(1, 1, dtype=torch.int64) for head in HEADS}
    judged = agent(rows, agent.begin(1), torch.ones(1, 1, dtype=torch.bool), actions)
    assert judged.entropies["op"].item() == pytest.approx(np.log(3), abs=0.05)


def test_a_corrupt_mask_is_an_error() -> None:
    agent, batch = make_agent(), batch_of(7, N)
    batch["mask_op"][2] = False
    with pytest.raises(EsperError, match=r"'op': no legal option in row \(2,\)"):
        agent.act(batch, agent.begin(N))
