"""Every logged number is explained, and is right in a case that can be counted by hand."""

import re

import pytest
import torch

from esper.leyline.events import Event, PolicyAlarm, PolicySymptom, PolicyUpdated
from esper.simic.ppo.alarms import Alarms
from esper.simic.ppo.config import AlarmConfig, PPOConfig, at
from esper.simic.ppo.normal import ReturnScale
from esper.simic.ppo.ranks import Alone
from esper.simic.ppo.seeds import Purpose, make_generator, make_seed
from esper.simic.probes import make_probe
from tests.support.dist import ROOT
from tests.support.policies import Idle, training_of


class Kept:
    """A sink that keeps all."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def numbers_of(updates: int = 3) -> tuple[list[dict[str, float]], Kept]:
    sink = Kept()
    training = training_of(Idle(8), updates=updates, hidden=8, sink=sink, ticks=32)
    training.run()
    return [event.numbers for event in sink.events if isinstance(event, PolicyUpdated)], sink


def test_every_number_is_explained() -> None:
    page = (ROOT / "docs" / "policy.md").read_text()
    explained = set(re.findall(r"^\| `([a-z]+/[\w/]+)` \|", page, re.M))
    logged = set()
    for numbers in numbers_of()[0]:
        logged |= {re.sub(r"(heads|masks)/\w+", r"\1/NAME", name) for name in numbers}
    assert logged == explained
    for symptom in PolicySymptom:
        assert re.search(rf"^\| .*\b{symptom}\b.* \|", page, re.M), symptom


def test_numbers_say_what_happened() -> None:
    found, sink = numbers_of()
    for numbers in found:
        assert 0.5 < numbers["rollout/valid"] < 1
        assert numbers["heads/op/share"] == 1
        assert 0 < numbers["heads/argument/share"] < 1
        assert 0.3 < numbers["losses/forced"] < 0.8  # on odd steps only waiting is legal
        assert 0 < numbers["masks/op"] < 0.5
        assert numbers["masks/argument"] == pytest.approx(1 / 3)
        assert 0 < numbers["rollout/truncated"] < 1
        assert 2 <= numbers["charts/episodic_length"] <= 6
        assert -3 <= numbers["charts/episodic_return"] <= 2  # as paid, whatever the scale
    assert [(event.step, event.tick, event.epoch) for event in sink.events] == [(16, 32, 1), (32, 64, 2), (48, 96, 3)]
    assert found[0]["charts/learning_rate"] == pytest.approx(3e-3)
    assert found[2]["charts/learning_rate"] == pytest.approx(1e-3)


def test_the_scale_is_the_root_mean_square_of_returns() -> None:
    scale = ReturnScale(2, 0.5)
    assert scale.sigma == 1.0
    rewards = torch.tensor([[2.0, 1.0], [2.0, 7.0], [4.0, 1.0]])
    done = torch.tensor([[False, True], [True, False], [False, False]])
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    scale.take(rewards, done, valid, Alone())
    # environment 0: 2, 2 + 1 = 3, then 4; environment 1: 1, (no decision), 1
    assert scale.sigma == pytest.approx(((4 + 9 + 16 + 1 + 1) / 5) ** 0.5)
    other = ReturnScale(2, 0.5)
    other.load_state_dict(scale.state_dict())
    for each in (scale, other):
        each.take(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool), Alone())
    assert scale.sigma == other.sigma
    assert ReturnScale(1, 1.0, enabled=False).sigma == 1.0


def healthy(**changed: float) -> dict[str, float]:
    numbers = {
        "losses/entropy": 1.0,
        "losses/explained_variance": 0.5,
        "losses/approx_kl": 0.01,
        "losses/ratio_max": 1.3,
        "losses/mismatch": 1e-7,
        "losses/value_loss": 0.5,
        "heads/op/share": 1.0,
        "heads/op/entropy": 0.5,
        "heads/tempo/share": 0.2,
        "heads/tempo/entropy": 0.4,
    }
    return numbers | {name.replace("__", "/"): value for name, value in changed.items()}


@pytest.mark.parametrize(
    ("sick", "symptom", "head", "after"),
    [
        ({"losses__entropy": 0.01}, PolicySymptom.ENTROPY, "", 3),
        ({"heads__tempo__entropy": 0.0}, PolicySymptom.HEAD_ENTROPY, "tempo", 3),
        ({"heads__tempo__share": 0.0}, PolicySymptom.DEAD_HEAD, "tempo", 3),
        ({"losses__explained_variance": -3.0}, PolicySymptom.VALUE, "", 3),
        ({"losses__value_loss": 1e4}, PolicySymptom.VALUE, "", 3),
        ({"losses__approx_kl": 2.0}, PolicySymptom.KL, "", 1),
        ({"losses__approx_kl": float("nan")}, PolicySymptom.KL, "", 1),
        ({"losses__ratio_max": 1e5}, PolicySymptom.RATIO, "", 1),
        ({"losses__mismatch": 0.1}, PolicySymptom.MISMATCH, "", 1),
    ],
)
def test_each_sickness_is_told_once_and_again_after_it_was_gone(
    sick: dict[str, float], symptom: PolicySymptom, head: str, after: int
) -> None:
    alarms = Alarms(AlarmConfig(patience=3))
    assert alarms.judge(healthy()) == []
    for _ in range(2):
        found = [alarms.judge(healthy(**sick)) for _ in range(5)]
        assert [len(one) for one in found] == [int(number == after) for number in range(1, 6)]
        (alarm,) = found[after - 1]
        assert (alarm.symptom, alarm.head, alarm.updates) == (symptom, head, after)
        assert alarms.judge(healthy()) == []


def test_a_real_training_that_goes_wrong_is_told() -> None:
    sink = Kept()
    settings = {"lr": 1.0, "target_kl": None, "max_grad_norm": None}
    training_of(make_probe("gated", 8), updates=4, sink=sink, **settings).run()
    symptoms = {event.symptom for event in sink.events if isinstance(event, PolicyAlarm)}
    assert symptoms & {PolicySymptom.KL, PolicySymptom.RATIO}


def test_seeds_are_apart_and_do_not_depend_on_ranks() -> None:
    seeds = {make_seed(7, purpose, number) for purpose in Purpose for number in range(50)}
    assert len(seeds) == 50 * len(Purpose)
    assert make_seed(7, Purpose.ACTIONS, 1) != make_seed(8, Purpose.ACTIONS, 1)
    one, other = (make_generator(3, Purpose.MINIBATCHES, 4, 0) for _ in range(2))
    assert torch.equal(torch.randperm(9, generator=one), torch.randperm(9, generator=other))
    assert list(training_of(Idle(4), updates=1).numbers) == [0, 1, 2, 3]


def test_schedules_are_straight_and_settings_are_checked() -> None:
    assert [at(2.0, 1.0, share) for share in (0.0, 0.5, 1.0)] == [2.0, 1.5, 1.0]
    with pytest.raises(ValueError, match=r"gamma = 1.5: must be 0 to 1\nlr = 0: must be > 0"):
        PPOConfig(gamma=1.5, lr=0)
    with pytest.raises(ValueError, match="patience = 0"):
        AlarmConfig(patience=0)
