"""What can befall a run, in which phase, what the user then reads, and what must hold afterwards: the table as data.

A row with ``strikes`` is launched by `tests/faults/test_matrix.py`, phase by phase; ``tests`` names what shows it
beside. One cell of each kind always runs: `tests/faults/test_bad_day.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from esper.config.tree import read_plain
from tests.faults.launching import Mounted, Place
from tests.support.fault_plans import Strike


class After(Enum):
    """How a run gets over a fault."""

    GOES_ON = "trains on"
    RESTARTS = "torchrun starts the ranks again"
    RESUMED = "`esper resume RUN`"


# Where each phase is struck (see tests/support/fault_places.py), and from which tick on. A seed blends from tick 7 on;
# at tick 8 another one is built.
PHASES: dict[str, tuple[str, int]] = {
    "start-up": ("start", 0),
    "forward": ("forward", 9),
    "backward": ("backward", 9),
    "between observe and commit": ("before-commit", 9),
    "staging": ("stage", 8),
    "save": ("save", 8),
    "commit of a save": ("rename", 8),
    "teardown": ("test", 16),
}
ALL = tuple(PHASES)
# Places that are of interest for a stop alone.
PHASES |= {"import": ("import", 0), "data": ("data", 0), "compile": ("compile", 0), "probe": ("probe", 9)}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One row.

    Args:
        phases: where it can strike. says: pattern of the line that the user reads, "" for none; ``says_in`` differs.
        after: how the run gets over it. code: exit code of the first command.
        strikes: what to do to which ranks, made for a phase. settings: of the run.
        same: what the run comes to is bit for bit what the undisturbed one came to. silent: its event file is not
            whole. tests: that show it beside, ``file::name``. size: of a tmpfs that RUN then lies on.
        text: the data lies in a file.
    """

    phases: tuple[str, ...]
    says: str = ""
    says_in: dict[str, str] = field(default_factory=dict)
    after: After = After.RESUMED
    code: int = 0
    strikes: Callable[[str, Place], list[Strike]] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    mend: Callable[[Place], None] = lambda place: None
    same: bool = True
    silent: bool = False
    size: str = ""
    text: bool = False
    tests: tuple[str, ...] = ()


def on(fault: str, *ranks: int, **more: Any) -> Callable[[str, Place], list[Strike]]:
    """``fault`` on these ranks at a phase; a rank that commits no save is struck when it hears of one."""

    def made(phase: str, place: Place) -> list[Strike]:
        where, tick = PHASES[phase]
        if where == "rename" and 0 not in ranks:
            where, tick = "settle", tick + 1
        path = more.get("path", lambda place: "")(place)
        return [Strike(fault=fault, place=where, tick=tick, ranks=list(ranks), again="again" in more, path=str(path))]

    return made


def filled_until(tick: int | None) -> Callable[[str, Place], list[Strike]]:
    """The disk is full from a phase on, and has room again at ``tick`` (None: when a person made some)."""

    def made(phase: str, place: Place) -> list[Strike]:
        full = on("fill", 0, path=_filler)(phase, place)
        return full if tick is None else [*full, replace(full[0], fault="free", place="forward", tick=tick)]

    return made


def _filler(place: Place) -> Path:
    return place.run / "filler"


def _make_room(place: Place) -> None:
    (place.seen / "filler").unlink()


def _thaw(place: Place) -> None:
    assert isinstance(place, Mounted)
    place.thaw()


def train_file(place: Place) -> Path:
    """Of a run on text."""
    return Path(read_plain(place.seen / "config.yaml")["data"]["root"]) / "train.txt"


def put_back(place: Place) -> None:
    """Undoes a strike of that kind."""
    train_file(place).with_name("elsewhere").rename(train_file(place))


LOST = r"esper: rank {}: lost contact in .*: rank {} "
STOPPED = r"esper: preempted at step \d+: stopped at step .*to go on: esper resume"
AT_ONCE = r"|esper: preempted: SIGTERM: ended before the workers could save"  # nothing was unsaved, and it took long
PARTED = r"esper: rank 0: ranks parted before tick \d+, step \d+: .* differs on rank 1"
ONE_RESTART = {"world__max_restarts": 1}
RESUME = "tests/dist/test_resume.py::"
RECOVERY = "tests/dist/test_recovery.py::"
DEATHS = "tests/dist/test_lockstep_lost.py::test_every_rank_that_is_left_names_the_one_that_is_not"
PARTING = "tests/dist/test_lockstep_parted.py::test_every_rank_ends_with_the_same_named_outcome"
TROUBLE = "tests/dist/test_lockstep_trouble.py::"
GOVERNOR = "tests/dist/test_governor.py::"

TABLE: dict[str, Fault] = {
    "kill -9 of rank 0": Fault(
        phases=ALL,
        says=LOST.format(1, 0),
        after=After.RESTARTS,
        strikes=on("kill", 0),
        settings=ONE_RESTART,
        tests=(RESUME + "test_killed_again_and_again_the_run_is_the_one_that_nobody_disturbed", DEATHS),
    ),
    "kill -9 of another rank": Fault(
        phases=ALL,
        says=LOST.format(0, 1),
        after=After.RESTARTS,
        strikes=on("kill", 1),
        settings=ONE_RESTART,
        tests=("tests/e2e/test_kill_resume.py::test_a_killed_worker_is_started_again_by_torchrun",),
    ),
    "kill -9 of the launcher": Fault(
        phases=ALL,
        code=-9,
        strikes=on("kill launcher", 0),
        tests=(
            "tests/e2e/test_kill_resume.py::test_stopped_then_killed_it_goes_on_and_leaves_nobody_behind",
            "tests/launcher/test_launcher.py::"
            "test_a_killed_launcher_takes_everything_with_it_and_the_run_stays_locked_until_then",
        ),
    ),
    "kill -9 of all": Fault(phases=ALL, code=-9, strikes=on("kill all", 0)),
    "stop signal to the launcher": Fault(
        phases=("import", "data", "forward", "probe", "staging", "save"),
        says=STOPPED,
        says_in={"import": STOPPED + AT_ONCE, "data": STOPPED + AT_ONCE},
        code=75,
        strikes=on("ask to stop", 0),
        tests=("tests/e2e/test_kill_resume.py::test_stopped_then_killed_it_goes_on_and_leaves_nobody_behind",),
    ),
    "stop signal while the host is compiled": Fault(
        phases=("compile",),
        says=STOPPED + AT_ONCE,
        code=75,
        strikes=on("ask to stop", 0),
        settings={"trainer__compile": True, "control__startup_timeout_s": 300.0, "control__slow_timeout_s": 300.0},
    ),
    "SIGSTOP of a rank": Fault(
        phases=ALL,
        says=LOST.format(0, 1),
        after=After.RESTARTS,
        strikes=on("stop", 1),
        settings={**ONE_RESTART, "control__startup_timeout_s": 20.0},
        tests=(DEATHS,),
    ),
    "a rank 5 s slow": Fault(phases=ALL, after=After.GOES_ON, strikes=on("slow", 1)),
    "Inf in a seed": Fault(
        phases=("forward",),
        after=After.GOES_ON,
        strikes=on("inf seed", 0, 1),
        same=False,
        tests=(
            TROUBLE + "test_a_broken_training_seed_leaves_the_host_untouched",
            TROUBLE + "test_a_broken_blending_seed_is_pruned_at_a_tick_out_of_turn",
        ),
    ),
    "forged weight": Fault(
        phases=("forward", "backward", "between observe and commit", "staging", "save"),
        says=PARTED,
        after=After.RESTARTS,
        strikes=on("forged weight", 1),
        settings=ONE_RESTART,
        tests=(PARTING,),
    ),
    "forged stage": Fault(
        phases=("forward", "backward"),  # a tick makes the state anew
        says=f"{PARTED}|{LOST.format(0, 1)}",
        after=After.RESTARTS,
        strikes=on("forged stage", 1),
        settings=ONE_RESTART,
        tests=(
            PARTING,
            "tests/dist/test_lockstep_lost.py::test_ranks_that_disagree_on_what_learns_name_each_other_and_do_not_hang",
        ),
    ),
    "out of memory in one rank at germination": Fault(
        phases=("staging",),
        after=After.GOES_ON,
        strikes=on("no memory", 1),
        same=False,
        tests=(TROUBLE + "test_a_seed_that_one_rank_cannot_hold_is_discarded_on_all",),
    ),
    "full disk, for a while": Fault(
        phases=("save", "commit of a save"),
        after=After.GOES_ON,
        strikes=filled_until(13),
        size="2m",
        silent=True,
        says=r"cannot write .*No space left on device",
        tests=(RECOVERY + "test_a_save_that_fails_on_one_rank_costs_that_save_alone",),
    ),
    "full disk": Fault(
        phases=("save", "commit of a save", "teardown"),
        code=74,
        strikes=filled_until(None),
        size="2m",
        silent=True,
        says="No space left on device",
        mend=_make_room,
    ),
    "checkpoint truncated, bit-flipped, deleted, unreadable": Fault(
        phases=("start-up",),
        after=After.GOES_ON,
        tests=(
            RECOVERY + "test_damaged_checkpoints_are_named_and_the_one_before_is_used",
            RECOVERY + "test_with_no_valid_checkpoint_the_run_refuses_to_begin_anew",
        ),
    ),
    "RUN gone read-only": Fault(
        phases=("start-up", "forward", "save", "commit of a save", "teardown"),
        code=74,
        size="8m",
        silent=True,
        strikes=on("freeze", 0, path=lambda place: place.run),
        says="Read-only file system",
        mend=_thaw,
        tests=(
            "tests/launcher/test_launcher.py::test_a_read_only_file_system_is_named_and_the_exit_code_says_input_output",
        ),
    ),
    "wandb unreachable": Fault(
        phases=("start-up",),
        after=After.GOES_ON,
        says="wandb is off for the rest of this run",
        strikes=on("note", 0),
        settings={"telemetry__wandb__mode": "online", "control__startup_timeout_s": 120.0},
        environment={"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"},
        tests=("tests/nissa/test_wandb.py::test_an_outage_is_one_fault_and_one_line",),
    ),
    "data file vanished": Fault(
        phases=("forward",),
        code=74,
        settings=ONE_RESTART,
        text=True,
        mend=put_back,
        strikes=on("vanish", 1, path=train_file),
        says=r"text/train\.txt",
    ),
    "clock jumps an hour ahead": Fault(
        phases=("start-up", "forward", "save"), after=After.GOES_ON, strikes=on("clock ahead", 1)
    ),
    "clock jumps an hour back": Fault(
        phases=("start-up", "forward", "save"), after=After.GOES_ON, strikes=on("clock back", 0)
    ),
    "link cut": Fault(
        phases=("forward",),
        code=76,
        tests=("tests/dist/test_two_hosts.py::test_a_cut_cable_ends_both_sides_with_one_named_error",),
    ),
    "link back within the timeout": Fault(
        phases=("forward",),
        after=After.GOES_ON,
        tests=("tests/dist/test_two_hosts.py::test_a_cable_that_is_back_within_the_timeout_costs_nothing",),
    ),
    "two launchers on one RUN": Fault(
        phases=("start-up",),
        code=74,
        tests=("tests/launcher/test_launcher.py::test_a_second_launcher_is_told_who_has_the_run",),
    ),
    "an older attempt comes back": Fault(
        phases=("forward", "commit of a save", "teardown"),
        code=74,
        tests=("tests/dist/test_lease.py::test_an_attempt_that_lost_its_lease_ends_and_leaves_everything_as_it_was",),
    ),
    "NaN loss on one rank": Fault(
        phases=("forward",),
        after=After.GOES_ON,
        same=False,
        tests=(
            TROUBLE + "test_a_loss_that_is_not_finite_skips_the_step_on_all_and_blames_no_seed",
            GOVERNOR + "test_a_row_of_losses_that_are_not_finite_on_one_rank",
        ),
    ),
    "exploding learning rate": Fault(
        phases=("forward",), code=79, tests=(GOVERNOR + "test_what_no_replay_cures_ends_as_diverged",)
    ),
    "samples that drive the loss away": Fault(
        phases=("forward",),
        after=After.GOES_ON,
        same=False,
        tests=(GOVERNOR + "test_samples_that_drive_the_loss_away_are_left_out",),
    ),
    "kill -9 in a rollback": Fault(
        phases=("forward",),
        code=76,
        tests=(
            "tests/dist/test_governor_resume.py::test_killed_in_a_rollback_it_comes_to_the_same_panic_and_the_same_end",
        ),
    ),
    "restart budget used up": Fault(
        phases=("forward",), code=76, says=LOST.format(0, 1), settings=ONE_RESTART, strikes=on("kill", 1, again=True)
    ),
}
