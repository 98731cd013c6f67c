"""Guards of comparisons that no other test makes fire."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.compare.arms import CompareConfig, derive, load_compare
from esper.compare.growth import GrowthArm, build_arm
from esper.compare.lengths import DataCache
from esper.compare.runner import ArmJob, Comparer, Stopped, _start
from esper.compare.search import trials_of
from esper.leyline.errors import ConfigError, EsperError
from esper.simic.env.tasks import find_task
from tests.compare.test_runner import ALONE
from tests.compare.test_trained import PLANTED
from tests.support.refusals import fails


def read(folder: Path, text: str, *changes: str) -> CompareConfig:
    """A comparison of one's own."""
    (folder / "mine.yaml").write_text(text)
    return load_compare(str(folder / "mine.yaml"), list(changes))


def with_base(override: str) -> None:
    compare = load_compare("digits_cpu", [])
    compare.base.append(override)
    derive(compare, "none", 100, {}, DataCache())


def wait(folder: Path) -> None:
    comparer = Comparer(read(folder, ALONE.format(root=folder)), folder / "out", print)
    comparer._wait(lambda: _start([str(folder / "none")], folder / "log", {}))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda tmp: with_base("optim.lr=???"), ConfigError, r"^optim\.lr = \?\?\?: missing; set optim\.lr=<value>$"),
        (lambda tmp: with_base("host.nothing=1"), ConfigError, r"^compare: arm none: .*nothing"),
        (
            lambda tmp: build_arm(GrowthArm(controller={"kind": "heuristic", "life_ticks": "x"}), find_task("hd1")),
            ConfigError,
            r"^compare\.arms\.controller\.life_ticks = 'x'",
        ),
        (
            lambda tmp: trials_of(read(tmp, PLANTED, "arms.replay.flops=scratch", "arms.scratch.search=true"), [0.1]),
            EsperError,
            r"^compare: arm replay searches and waits for scratch, which searches too$",
        ),
        (wait, EsperError, r"^a run cannot be started: .*No such file or directory"),
    ],
)
def test_comparisons(call: Callable[[Path], Any], kind: type[Exception], text: str, tmp_path: Path) -> None:
    fails(lambda: call(tmp_path), kind, text)


def test_once_it_is_stopped_no_job_begins(tmp_path: Path) -> None:
    comparer = Comparer(load_compare("digits_cpu", []), tmp_path / "out", print)
    comparer.stop()
    for arm in ("none", "none_long"):  # the second one waits for another arm
        with pytest.raises(Stopped):
            comparer.run(ArmJob(arm, 1))
    assert not (tmp_path / "out").exists()
