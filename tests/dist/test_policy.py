"""A policy drives whole runs: two ranks that grow, prune and are killed to no effect, and the five slots of a GPT.

Nobody trained it; it draws from what is legal. What it was made for are other numbers of slots and other topologies:
the same file serves three slots of a CNN and five of a GPT.
"""

from pathlib import Path
from typing import Any

import pytest

from esper.kasmina.hosts import GPTConfig
from esper.tamiyo.policy.controller import Mode, PolicyConfig
from tests.support.killed_runs import Kill, assert_same_run, final, live, prepare_run
from tests.support.policy_files import save_untrained
from tests.support.tiny import tiny_plain

TICKS = 20


@pytest.fixture
def policy(tmp_path: Path) -> PolicyConfig:
    return PolicyConfig(checkpoint=str(save_untrained(tmp_path / "policy.pt")), mode=Mode.SAMPLED)


def plain_of(task: str, policy: PolicyConfig, **settings: Any) -> dict[str, Any]:
    common = {"trainer__steps": 2 * TICKS, "checkpoint__every_ticks": 5, "checkpoint__keep": 9}
    return tiny_plain(task, controller=policy, telemetry__level="full", **{**common, **settings})


def targets(outcome: dict[str, Any]) -> list[str]:
    return [event[4]["target"] for event in outcome["plain"]["events"] if event[0] == "stage"]


def test_two_ranks_grow_and_prune_and_a_kill_changes_no_bit(policy: PolicyConfig, tmp_path: Path) -> None:
    whole = prepare_run(tmp_path / "whole", plain_of("cnn", policy))
    assert live(whole, 2) == [0, 0]
    wanted = final(whole)
    assert {"GERMINATED", "TRAINING", "PRUNED"} <= set(targets(wanted))
    killed = prepare_run(tmp_path / "killed", plain_of("cnn", policy))
    assert live(killed, 2, Kill("before-commit", 12)) is None
    assert live(killed, 2) == [0, 0]
    assert_same_run(final(killed), wanted)


def test_the_same_file_drives_five_slots_of_a_gpt(policy: PolicyConfig, tmp_path: Path) -> None:
    host = GPTConfig(layers=5, heads=2, dim=16, block=16)
    run = prepare_run(tmp_path / "run", plain_of("gpt", policy, host=host))
    assert live(run, 1) == [0]
    outcome = final(run)
    assert {"GERMINATED", "PRUNED"} <= set(targets(outcome))
    assert len({event[4]["slot"] for event in outcome["plain"]["events"] if event[0] == "stage"}) > 2
