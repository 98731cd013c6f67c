"""The tree of shared prefixes against its definition: forwards share what comes before they differ."""

import itertools
import random

import pytest

from esper.kasmina.attribution.coalitions import Plan, QuantityKind, make_plan
from esper.kasmina.attribution.prefixes import Entry, ForwardPart, account, forward_parts

LEAVE = (QuantityKind.LEAVE_ONE_OUT,)


def levels(n: int) -> dict[str, float]:
    return {f"r{i}c0": 1.0 for i in range(n)}


def test_leave_one_out_of_three_seeds_is_the_tree_in_the_docstring():
    plan = make_plan(levels(3), ask=LEAVE)
    assert plan.coalitions == (0b011, 0b101, 0b110, 0b111)
    a, b, c = levels(3)
    found = account(plan, (a, b, c))
    assert found == {
        Entry(None, a, ()): 1,
        Entry(a, b, (a,)): 1,
        Entry(b, c, (b,)): 1,
        Entry(c, None, (c,)): 1,
        Entry(c, None, ()): 1,
        Entry(b, None, (c,)): 1,
        Entry(a, None, (b, c)): 1,
    }
    assert account(plan, None) == {
        Entry(None, None, (a, b)): 1,
        Entry(None, None, (a, c)): 1,
        Entry(None, None, (b, c)): 1,
        Entry(None, None, (a, b, c)): 1,
    }


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_all_coalitions_make_a_full_binary_tree_in_the_order_of_execution(n):
    plan = make_plan(levels(n))
    order = [*reversed(levels(n))]
    counts = dict.fromkeys((None, *order), 0)
    for entry, count in account(plan, order).items():
        counts[entry.start] += count
    assert list(counts.values()) == [2**i for i in range(n + 1)]


def walked(plan: Plan, order: list[str], work: tuple[ForwardPart, ...]) -> dict[int, list[ForwardPart]]:
    """The parts that each coalition's output went through, by running the stack as `forward_parts` says."""
    stack: list[ForwardPart] = []
    found: dict[int, list[ForwardPart]] = {}
    for part in work:
        del stack[part.depth :]
        assert part.start == (stack[-1].until if stack else None)
        assert not stack or set(part.coalitions) <= set(stack[-1].coalitions)
        if part.until is None:
            for coalition in part.coalitions:
                assert coalition not in found
                found[coalition] = [*stack, part]
        stack.append(part)
    return found


@pytest.mark.parametrize("seed", range(30))
def test_every_coalition_reaches_one_output_and_what_can_be_shared_is_run_once(seed):
    stream = random.Random(seed)
    n = stream.randint(1, 6)
    pairs = stream.choice([0, 2, 3]) if n <= 4 else 2
    plan = make_plan(
        levels(n), pairs=pairs, key=(seed,), ask=LEAVE if stream.random() < 0.3 else tuple(QuantityKind)[:3]
    )
    order = [*levels(n), "r7c0", "r8c1"]  # the host has slots that are not asked about
    stream.shuffle(order)
    work = forward_parts(plan, order)
    found = walked(plan, order, work)
    assert sorted(found) == list(plan.coalitions)
    players = [slot for slot in order if slot in levels(n)]
    bit = {slot: i for i, slot in enumerate(levels(n))}
    for coalition, path in found.items():
        ends = [players.index(part.until) for part in path[:-1]]
        assert ends == sorted(set(ends))
        for other in plan.coalitions:
            apart = [i for i, slot in enumerate(players) if (coalition ^ other) >> bit[slot] & 1]
            shared = [part for part in path if part in found[other]]
            if other == coalition:
                continue
            # together to the first slot in which they differ, and not a part further
            assert shared == path[: len(shared)]
            assert shared[-1].until == players[apart[0]]
    for one, two in itertools.combinations(work, 2):
        assert one != two
    assert account(plan, order).total() == len(work)


def test_a_host_that_cannot_resume_runs_every_coalition_whole():
    plan = make_plan(levels(3))
    assert forward_parts(plan, None) == tuple(ForwardPart(0, None, None, (mask,)) for mask in range(8))
    assert account(plan, None).total() == 8


def test_a_seed_asked_about_at_alpha_0_does_not_run():
    plan = make_plan({"r0c0": 0.0, "r1c0": 0.5})
    assert {entry.seeds for entry in account(plan, ["r0c0", "r1c0"])} == {(), ("r1c0",)}
