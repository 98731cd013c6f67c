"""Two collectives a tick, counted below our code, of every kind, on every group, whatever the slots and commands."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from esper.config.tree import EsperConfig
from esper.leyline.events import CommandJudged, CommandRefused, Rewrapped, StageChanged
from esper.tolaria.lockstep.collectives import RUN_DIGESTS, SLOT_DIGESTS
from esper.tolaria.lockstep.wire import CommitLayout, ObserveLayout
from tests.support.collective_counter import CollectiveCounter
from tests.support.dist import DEVICES, run_distributed
from tests.support.tiny import act, events, make_engine, schedule, tiny_config

# torch.distributed call -> operators that it must be counted as. What a counter cannot see, it would call absent.
CONTROL = {
    "all_reduce": {"allreduce_": 1},
    "all_reduce on another group": {"allreduce_": 1},
    "async all_reduce": {"allreduce_": 1},
    "broadcast": {"broadcast_": 1},
    "reduce": {"reduce_": 1},
    "all_gather": {"allgather_": 1},
    "gather": {"gather_": 1},
    "scatter": {"scatter_": 1},
    "all_to_all_single": {"alltoall_base_": 1},
    "barrier": {"barrier": 1},
    "monitored_barrier": {"monitored_barrier_": 1},
    "point to point": {"send": 1},
    "broadcast_object_list": {"broadcast_": 2},
    "all_gather_object": {"allgather_": 2},
    "DDP with init_sync": {"allgather_": 1, "broadcast_": 2},
    "DDP without init_sync": {},
    "a DDP step": {"allreduce_": 1},
}


def count_control(rank: int) -> dict[str, Any]:
    dist.init_process_group("gloo")
    other = dist.new_group(backend="gloo")
    vector, model = torch.ones(2), nn.Linear(2, 2)
    wrapped = nn.parallel.DistributedDataParallel(model)
    parts = [torch.ones(2) for _ in range(2)]
    calls = {
        "all_reduce": lambda: dist.all_reduce(vector),
        "all_reduce on another group": lambda: dist.all_reduce(vector, group=other),
        "async all_reduce": lambda: dist.all_reduce(vector, async_op=True).wait(),
        "broadcast": lambda: dist.broadcast(vector, 0),
        "reduce": lambda: dist.reduce(vector, 0),
        "all_gather": lambda: dist.all_gather(parts, vector),
        "gather": lambda: dist.gather(vector, parts if rank == 0 else None),
        "scatter": lambda: dist.scatter(vector, parts if rank == 0 else None),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.ones(2), vector),
        "barrier": lambda: dist.barrier(),
        "monitored_barrier": lambda: dist.monitored_barrier(),
        "point to point": lambda: dist.send(vector, 1) if rank == 0 else dist.recv(vector, 0),
        "broadcast_object_list": lambda: dist.broadcast_object_list([1], 0),
        "all_gather_object": lambda: dist.all_gather_object([None, None], 1),
        "DDP with init_sync": lambda: nn.parallel.DistributedDataParallel(model),
        "DDP without init_sync": lambda: nn.parallel.DistributedDataParallel(model, init_sync=False),
        "a DDP step": lambda: wrapped(torch.ones(1, 2)).sum().backward(),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        with CollectiveCounter() as counter:
            call()
        found[name] = counter.kinds()
        if name.startswith("all_reduce"):
            found[f"group of {name}"] = [group for _, group in counter.counts]
    found["groups"] = (dist.group.WORLD.group_name, other.group_name)
    return found


def test_the_counter_sees_every_kind_of_collective() -> None:
    found = run_distributed(count_control, 2)[0]
    assert {name: found[name] for name in CONTROL} == CONTROL
    world, other = found["groups"]
    assert found["group of all_reduce"] == [world]
    assert found["group of all_reduce on another group"] == [other]


def count_ticks(rank: int, config: EsperConfig, run_dir: Path) -> dict[str, Any]:
    engine = make_engine(config, run_dir)
    engine.begin(None)
    sink, steps, ticks = events(engine), [], []
    while engine.step < engine.terms.total_steps:
        with CollectiveCounter() as counter:
            engine.train_step()
        steps.append(dict(counter.counts))
        if engine.tick_due():
            seen = len(sink.events)
            with CollectiveCounter() as counter:
                engine.tick()
            new = sink.events[seen:]
            ticks.append(
                {
                    "counts": dict(counter.counts),
                    "sizes": counter.sizes,
                    "applied": sum(type(event) is CommandJudged for event in new),
                    "refused": [event.reason for event in new if type(event) is CommandRefused],
                    "births": sum(isinstance(e, StageChanged) and e.target.name == "GERMINATED" for e in new),
                    "rewrapped": any(isinstance(event, Rewrapped) for event in new),
                    "probed": any(entry.request is not None for entry in engine.state.slots),
                }
            )
    lock = engine.lockstep
    return {
        "steps": steps,
        "ticks": ticks,
        "control": engine.world.control.group_name,
        "data": engine.world.data.group_name,
        "bytes": [8 * len(lock.observe_layout.names), 8 * lock.commit_layout.length],
    }


def slots_of(task: str, count: int) -> list[str]:
    return [f"r{row}c0" for row in range(count)] if task == "gpt" else ["r0c0", "r0c1", "r1c0"][:count]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("task", "count"), [("cnn", 1), ("cnn", 3), ("gpt", 12)])
def test_two_all_reduces_a_tick_whatever_the_slots_and_commands(
    task: str, count: int, device: str, tmp_path: Path
) -> None:
    slots, blueprint = slots_of(task, count), "norm" if task == "cnn" else "lora"
    used = slots[:5]  # five commands in one tick where there are five slots
    life = schedule(
        *(act(1, slot, "GERMINATE", blueprint=blueprint, ticks=2) for slot in used),
        *(act(3, slot, "ADVANCE") for slot in used),
        *(act(5, slot, "ADVANCE") for slot in used),
        *(act(8, slot, "PRUNE", ticks=1) for slot in used),
    )
    host = {"host__layers": 12, "host__dim": 8, "host__block": 16} if task == "gpt" else {}
    config = tiny_config(
        task,
        trainer__steps=22,
        slots__ids=slots,
        controller=life,
        control__digest_every=2,
        checkpoint__every_ticks=7,
        world__device=device,
        **host,
    )
    for found in run_distributed(count_ticks, 2, config, tmp_path, device=device):
        ticks = found["ticks"]
        two = {("allreduce_", found["control"]): 2}
        assert [tick["counts"] for tick in ticks] == [two] * 11
        assert all(tick["sizes"] == found["bytes"] for tick in ticks), "observe, then commit, each one vector"
        # What those ticks did, so that the count above says something.
        assert not any(tick["refused"] for tick in ticks)
        assert [tick["applied"] for tick in ticks] == [len(used) if at in (1, 3, 5, 8) else 0 for at in range(1, 12)]
        births = [tick for tick in ticks if tick["births"]]
        assert [tick["births"] for tick in births] == [len(used)]
        assert not births[0]["rewrapped"], "a seed that does not learn yet changes nothing in the reducer"
        # Growth (3), the frozen seed of a prune by ramp (8) and its end (9: the wrapper lists frozen tensors, too),
        # saves (7, 11): DDP built anew without a collective.
        assert [at for at, tick in enumerate(ticks, start=1) if tick["rewrapped"]] == [3, 7, 8, 9, 11]
        assert any(tick["probed"] for tick in ticks)
        # Steps keep to the data group: the gradient's reductions, and DDP's two broadcasts of its bucket order after
        # the first backward of a wrapper.
        for step in found["steps"]:
            assert {group for _, group in step} == {found["data"]}
            assert {kind for kind, _ in step} <= {"allreduce_", "broadcast_"}
            assert step.get(("broadcast_", found["data"]), 0) in (0, 2)


def test_bytes_of_a_tick_at_1024_ranks() -> None:
    slots = [f"r{row}c0" for row in range(12)]
    digests = [*RUN_DIGESTS, *(f"slot {slot} {field}" for slot in slots for field in SLOT_DIGESTS)]
    observe = 8 * len(ObserveLayout(slots).names)
    commit = 8 * CommitLayout(slots, digests, ("norm",), 1024).length
    # 12 commands of 8 words, 55 digest pairs, 12 vetoes, 1,024 rank words, 4 words of an order: 9,968 bytes of int64;
    # and the float64 of what was measured. Together 13.3 kB; the budget is 16 KiB.
    assert commit == 8 * (12 * 8 + 2 * 55 + 12 + 1024 + 4)
    assert observe == 8 * (48 + 34 * 12)
    assert observe + commit < 16 * 1024
    attributed = 8 * len(ObserveLayout(slots, worth=True).names)
    assert attributed == observe + 8 * (5 + 15 * 12)
    assert attributed + commit < 16 * 1024
