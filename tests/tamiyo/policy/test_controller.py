"""controller=policy: what it remembers, what it refuses at the start, what it says, how long it takes."""

import json
import random
import time
from pathlib import Path

import pytest
import torch

from esper.leyline.errors import ConfigError
from esper.leyline.legality import why_refused
from esper.leyline.protocols import Controller
from esper.leyline.stages import Op
from esper.tamiyo import build_controller
from esper.tamiyo.policy.checkpoint import load_policy, save_policy
from esper.tamiyo.policy.controller import SHIPPED, Mode, PolicyConfig, PolicyController
from esper.tamiyo.policy.features import LAYOUT
from tests.support.any_observations import any_observation
from tests.support.observations import World
from tests.support.policy_files import MADE, save_untrained, untrained_agent

THREE, FIVE = ("r0c0", "r1c0", "r2c0"), ("r0c0", "r0c1", "r1c0", "r1c1", "r2c0")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_untrained(tmp_path / "policy.pt")


def make(file: Path, slots: tuple[str, ...] = THREE, mode: Mode = Mode.SAMPLED, seed: int = 5) -> PolicyController:
    controller = build_controller(PolicyConfig(checkpoint=str(file), mode=mode), slots=slots, seed=seed)
    assert isinstance(controller, PolicyController)
    assert isinstance(controller, Controller)
    return controller


def world(slots: tuple[str, ...] = THREE) -> World:
    return World(slots, lambda slot, name: 0.01, max_live=2, enforce=False, total_ticks=200)


def test_it_lives_through_a_world_by_the_rules(file: Path) -> None:
    """`World.apply` asserts that every command is legal and has a reason."""
    for slots in (THREE, FIVE):  # the same weights
        log = world(slots).run(make(file, slots), 60)
        assert {Op.GERMINATE, Op.PRUNE, Op.ADVANCE} <= {command.op for _, command in log}
        assert all(("blueprint" in command.reason) is (command.op is Op.GERMINATE) for _, command in log)


def test_sampling_repeats_by_seed_and_greedy_does_not_depend_on_it(file: Path) -> None:
    def commands(mode: Mode, seed: int) -> list[object]:
        return list(world().run(make(file, mode=mode, seed=seed), 25))

    torch.manual_seed(1)
    first = commands(Mode.SAMPLED, 5)
    torch.manual_seed(2)
    assert commands(Mode.SAMPLED, 5) == first != commands(Mode.SAMPLED, 6)
    assert commands(Mode.GREEDY, 5) == commands(Mode.GREEDY, 6)


def test_a_resumed_controller_decides_bit_for_bit_as_the_uninterrupted_one(file: Path) -> None:
    rng = random.Random(0)
    seen = [any_observation(rng, 3, tick=tick) for tick in range(1, 41)]
    whole = make(file)
    for observation in seen[:20]:
        whole.decide(observation)
    resumed = make(file)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    after = [whole.decide(observation) for observation in seen[20:]]
    assert [resumed.decide(observation) for observation in seen[20:]] == after
    assert resumed.state_dict() == whole.state_dict()
    assert sum(len(commands) for commands in after) > 3
    fresh = make(file)
    assert [fresh.decide(observation) for observation in seen[20:]] != after  # what it remembers matters


def test_the_state_of_another_policy_is_refused(file: Path, tmp_path: Path) -> None:
    other = make(save_untrained(tmp_path / "other.pt", seed=4))
    with pytest.raises(ValueError, match=r"controller\.checkpoint holds another policy now"):
        make(file).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="unknown surprise"):
        make(file).load_state_dict(other.state_dict() | {"surprise": 1})


def test_every_command_is_legal_and_says_its_probability(file: Path) -> None:
    rng, controller = random.Random(8), make(file)
    told = []
    for tick in range(1, 50):
        observation = any_observation(rng, 3, tick=tick)
        commands = controller.decide(observation)
        assert len(commands) <= 1
        assert all(why_refused(observation, command) is None for command in commands)
        told += [command.reason for command in commands]
    assert told
    assert all("%" in reason and "slot" in reason and "value" in reason for reason in told)


def test_no_random_stream_moves(file: Path) -> None:
    before = torch.get_rng_state()
    controller = make(file)
    controller.decide(any_observation(random.Random(1), 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_policy_of_this_package_decides_for_any_number_of_slots() -> None:
    _, made, _ = load_policy(SHIPPED)
    assert {"command", "seeds", "code", "env", "ppo", "warm"} <= set(made)
    assert SHIPPED.stat().st_size < 2**20
    for slots in (3, 5):
        seen = any_observation(random.Random(1), slots)
        names = tuple(view.slot for view in seen.slots)
        controller = build_controller(PolicyConfig(), slots=names, seed=0)
        assert all(why_refused(seen, command) is None for command in controller.decide(seen))


def refused(file: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        build_controller(PolicyConfig(checkpoint=str(file)), slots=THREE, seed=0)
    (line,) = caught.value.problems
    assert line.startswith("controller.checkpoint = ")
    assert "\n" not in line
    return line


def test_a_bad_checkpoint_is_one_line_at_the_start(file: Path, tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "gone.pt")
    assert "cannot be read (Is a directory)" in refused(tmp_path)
    whole = file.read_bytes()
    for damaged in (b"", b"nonsense", whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        assert "damaged, or no trained policy" in refused(file)
    torch.save({"model": 1}, file)
    assert "no trained policy; name the file of one" in refused(file)
    torch.save(untrained_agent(), file)  # code, which is never run
    assert "damaged, or no trained policy" in refused(file)


def test_a_flipped_bit_a_missing_key_and_another_meaning_are_told(file: Path) -> None:
    payload = torch.load(file, weights_only=True)
    flipped = {name: tensor.clone() for name, tensor in payload["weights"].items()}
    flipped["join.bias"].view(torch.uint8)[0] ^= 1
    slots = [["verdict", 2] if name == "verdict" else [name, version] for name, version in payload["features"]["slot"]]
    for changed, said in (
        ({"weights": flipped}, "weights are not those that were saved"),
        ({"format": 99}, "format 99, this code reads 1"),
        ({"more": 1}, "missing or unknown more"),
        ({"features": payload["features"] | {"slot": slots}}, r"slot.verdict (version 2, here 1)"),
        ({"features": payload["features"] | {"version": 9}}, "FEATURES version 9"),
        ({"options": payload["options"] | {"ops": ["WAIT", "DANCE"]}}, "'DANCE' is none of"),
        ({"network": {"width": 32, "hidden": 64}}, "weights of another network"),
    ):
        torch.save(payload | changed, file)
        assert said in refused(file)


def test_a_policy_comes_back_whole_with_how_it_was_made(file: Path, tmp_path: Path) -> None:
    agent, made, digest = load_policy(file)
    assert made == MADE
    assert agent.layout == LAYOUT
    again = tmp_path / "again.pt"
    save_policy(again, agent, made)
    assert load_policy(again)[2] == digest
    assert all(torch.equal(x, y) for x, y in zip(agent.state_dict().values(), untrained_agent().state_dict().values()))
    with pytest.raises(ValueError, match="seeds, code missing"):
        save_policy(again, agent, {"command": "?"})


def test_a_decision_for_48_slots_is_a_matter_of_milliseconds(file: Path) -> None:
    """A bound that a crowded machine keeps too; `python -m tests.tamiyo.policy.test_controller` prints the time."""
    assert decision_ms(file, 5) < 200


def decision_ms(file: Path, repeats: int) -> float:
    rng, slots = random.Random(2), tuple(f"r{row}c0" for row in range(48))
    controller = make(file, slots)
    spent = []
    for tick in range(1, repeats + 1):
        observation = any_observation(rng, 48, tick=tick)
        begun = time.process_time()
        controller.decide(observation)
        spent.append(time.process_time() - begun)
    return 1000 * sorted(spent)[repeats // 2]


if __name__ == "__main__":
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(f"{decision_ms(save_untrained(Path(folder) / 'policy.pt'), 50):.1f} ms of processor time")
