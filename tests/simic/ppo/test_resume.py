"""A training that was stopped and resumed has the bits of one that was not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.leyline.errors import CheckpointError
from esper.simic.ppo.saves import checkpoints, load_shared
from esper.simic.ppo.train import Training
from esper.simic.probes import make_probe
from tests.support.dist import run_distributed
from tests.support.policies import Idle, training_of

UPDATES = 6


class Forgetful(Idle):
    """An environment that cannot save itself."""

    state_dict = load_state_dict = None  # type: ignore[assignment]


def make(folder: Path | None, kind: type[Idle] = Idle, **settings: Any) -> Training:
    plan = {"folder": folder, "save_every": 100}
    return training_of(kind(4), updates=UPDATES, hidden=8, width=16, seed=9, plan=plan, **settings)


def after(training: Training, updates: int) -> Callable[[], bool]:
    return lambda: training.done >= updates


def run(training: Training, until: int = UPDATES) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    done = training.run(should_stop=after(training, until), after_update=lambda update: found.append(update.numbers))
    assert done is (until == UPDATES)
    return [{name: value for name, value in numbers.items() if name != "charts/SPS"} for numbers in found]


@pytest.mark.parametrize("stop", [1, 4])
def test_resumed_equals_uninterrupted(tmp_path: Path, stop: int) -> None:
    whole = make(None)
    numbers = run(whole)
    first = make(tmp_path)
    before = run(first, stop)
    second = make(tmp_path)
    torch.rand(7)  # this process's own stream is somewhere else
    (path,) = checkpoints(tmp_path)
    second.resume(path)
    assert second.done == stop
    assert before + run(second) == numbers
    for name, tensor in whole.agent.state_dict().items():
        assert torch.equal(tensor, second.agent.state_dict()[name]), name
    assert [path.name for path in checkpoints(tmp_path)] == [f"update-{stop:08d}", f"update-{UPDATES:08d}"]
    one, other = (t.ppo.optimizer.state_dict()["state"] for t in (whole, second))
    assert all(torch.equal(one[key]["exp_avg_sq"], other[key]["exp_avg_sq"]) for key in one)


def test_episodes_restart_where_an_environment_cannot_save_itself(tmp_path: Path) -> None:
    run(make(tmp_path, Forgetful), 2)
    results = []
    for _ in range(2):
        training = make(None, Forgetful)
        training.resume(tmp_path / "update-00000002")
        assert bool(training.collector._starts.all())
        results.append(run(training))
    assert results[0] == results[1]  # by seeds that the number of updates decides


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    training = make(tmp_path)
    run(training, 1)
    (path,) = checkpoints(tmp_path)
    plan = {"folder": tmp_path}
    with pytest.raises(CheckpointError, match="of seed 9, this training has 8"):
        training_of(Idle(4), updates=1, hidden=8, width=16, seed=8, plan=plan).resume(path)
    with pytest.raises(CheckpointError, match="of 4 environments a rank, this has 8"):
        training_of(Idle(8), updates=1, hidden=8, width=16, seed=9, plan=plan).resume(path)
    with pytest.raises(CheckpointError, match="of another agent"):
        training_of(Idle(4), updates=1, hidden=16, width=16, seed=9, plan=plan).resume(path)
    with pytest.raises(CheckpointError, match="another agent"):
        training_of(make_probe("luby", 4), updates=1, hidden=8, width=16, seed=9, plan=plan).resume(path)
    (path / "rank-00000.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"rank-00000.pt: cannot be read"):
        make(tmp_path).resume(path)
    (path / "rank-00000.pt").unlink()
    with pytest.raises(CheckpointError, match=r"rank-00000.pt: not there"):
        make(tmp_path).resume(path)
    shared = load_shared(path)
    torch.save({**shared, "format": 99}, path / "shared.pt")
    with pytest.raises(CheckpointError, match="format 99"):
        make(tmp_path).resume(path)


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make(tmp_path)
    run(training, 1)

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esper.simic.ppo.saves.write_synced", refuse)
    training.done = 2
    with pytest.raises(OSError, match="No space"):
        training.save()
    assert [path.name for path in checkpoints(tmp_path)] == ["update-00000001"]


def resume_on_a_rank(rank: int, folder: Path) -> list[float]:
    from esper.tolaria.ranks.config import ControlConfig, WorldConfig
    from esper.tolaria.ranks.world import World

    world = World(WorldConfig(), ControlConfig())

    def one(where: Path | None) -> Training:
        plan = {"folder": where, "save_every": 100}
        return training_of(Idle(2, first=2 * rank), updates=4, width=16, hidden=8, ranks=world, plan=plan)

    whole, first, second = one(None), one(folder), one(folder)
    whole.run()
    first.run(should_stop=lambda: rank == 1 and first.done == 2)  # one rank was asked, both stop
    assert first.done == 2
    second.resume(folder / "update-00000002")
    second.run()
    pairs = zip(whole.agent.parameters(), second.agent.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    return [float(parameter.detach().sum()) for parameter in second.agent.parameters()]


def test_two_ranks_resume_to_the_same_bits(tmp_path: Path) -> None:
    one, other = run_distributed(resume_on_a_rank, 2, tmp_path)
    assert one == other
    assert not list(tmp_path.glob(".*.tmp"))
