"""Why, from the record alone: seeds, ticks and ends, each sentence on events that are there."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from esper import cli
from esper.karn.why.endings import explain_end
from esper.karn.why.fates import explain_slot
from esper.karn.why.rules import RULES, Action, Failure, comes_again, comes_for_ever, match_rule
from esper.karn.why.sentence import Sentence, name_event
from esper.karn.why.ticks import explain, explain_growth
from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError, RunDirError
from esper.leyline.events import BirthVetoed, CommandJudged, Panic, RolledBack, RunEnded, StageChanged
from esper.leyline.files import RunDir
from esper.leyline.stages import Op, Stage
from esper.nissa.envelope import Envelope
from esper.nissa.jsonl import encode
from esper.nissa.reading import read_latest
from tests.karn.faults_recorded import Judged, judge_all, shares, tables
from tests.karn.test_store import RECORDED, write_run
from tests.nissa.samples import GATE, axes, fault, refused, run_started
from tests.support.dist import ROOT


@pytest.fixture(scope="module")
def judged() -> list[Judged]:
    return judge_all()


def test_ends_kept_apart_are_told_right(judged: list[Judged]) -> None:
    """What the rules were never tried on while they were written: other phases, ranks and seeds of the fault table."""
    apart = [one for one in judged if not one.known]
    wrong = {one.name: [point for point, right in one.right.items() if not right] for one in apart}
    assert len(apart) >= 30
    for point, (right, asked) in shares(apart).items():
        assert right >= 0.95 * asked, (point, {name: points for name, points in wrong.items() if points})


def test_the_known_ends_are_told_right(judged: list[Judged]) -> None:
    wrong = {one.name: one.right for one in judged if one.known and not all(one.right.values())}
    assert wrong == {}


def test_a_fault_that_comes_again_is_never_answered_by_a_restart(judged: list[Judged]) -> None:
    again = [one for one in judged if one.label["action"] == "change"]
    assert len(again) >= 10
    assert [one.name for one in again if one.said.action is Action.RESTART] == []


def test_the_page_has_the_matrix_as_it_is(judged: list[Judged]) -> None:
    page = (ROOT / "docs" / "why.md").read_text()
    assert page.split("## How often it is right\n\n")[1].endswith(tables(judged)), (
        "python -m tests.karn.faults_recorded"
    )


def test_every_sentence_on_an_end_names_what_it_stands_on_or_what_is_not_there(judged: list[Judged]) -> None:
    for one in judged:
        assert 1 <= len(one.said.sentences) <= 12, one.name
        for failure in one.said.failures:
            assert any(f"Attempt {failure.attempt} ended" in s.text for s in one.said.sentences)
        assert (one.said.command == "") == (one.said.action is Action.NOTHING)


def texts(told: list[Sentence]) -> list[str]:
    return [f"{one.text} {' '.join(map(name_event, one.events))}" for one in told]


def records_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_latest(folder / "events.jsonl"))


def test_a_seed_that_was_kept_and_one_that_was_pruned() -> None:
    records = records_of(RECORDED)
    born, looked, joined, kept = texts(explain_slot(records, "r0c0"))
    assert born.startswith(
        "r0c0: conv_light was born at step 36 (tick 3): warm-up of 2 ticks is over; conv_light is un"
    )
    assert born.endswith("#4 #6")
    assert "measured 5 times" in looked
    assert "it saves 0.2341 ± 0.028 of the loss of a sample (409 clusters" in looked
    assert "the log evidence that it helps is 19.3, its gate asks for 4.91: enough" in looked
    assert joined.startswith("It joined the host at step 84 (tick 7): G2 passed: contribution 0.02976 ± 0.007176")
    assert (
        kept
        == "It was kept: fossilised at step 180 (tick 15), since G5 passed: contribution 0.2341 ± 0.0283 over "
        + ("all looks. #58 #59 #60")
    )
    *_, looked, pruned = texts(explain_slot(records, "r0c1"))
    assert "-1.35, its gate asks for 3: not enough" in looked
    assert pruned.startswith("It was pruned at step 132 (tick 11), since 2 of 2 looks spent: contribution -0.004177")
    (never,) = texts(explain_slot(records, "r1c0"))
    assert never.startswith("Nothing was born in r1c0: the controller never asked for a seed there.")
    first, second, nothing = texts(explain_growth(records))
    assert nothing.startswith("Nothing was born in r1c0.")
    assert "#58 #59 #60" in first
    assert "-1.35, its gate asks for 3: not enough" in second, "why a seed went is told without a second command"
    by_seq = {record["seq"]: record for record in records}
    for slot in ("r0c0", "r0c1"):
        for sentence in explain_slot(records, slot):
            numbers = {f"{n['payload'].get('blueprint')}" for n in sentence.events}
            assert sentence.events, sentence.text
            assert all(by_seq[event["seq"]] is event for event in sentence.events), numbers


def germinated(tick: int, slot: str = "r0c0", proposal: int = 7) -> list[Any]:
    """A seed that was asked for and is born two ticks later."""
    command = Command(slot=slot, op=Op.GERMINATE, blueprint="norm", proposal=proposal, reason="try")
    move = {"slot": slot, "generation": 1, "blueprint": "norm", "proposal": proposal, "cause": "GERMINATE"}
    born = StageChanged(**axes(tick + 2), source=Stage.EMPTY, target=Stage.GERMINATED, **move)
    return [CommandJudged(**axes(tick), command=command, applied=True, reason="try"), born]


def pruned(tick: int, cause: str) -> StageChanged:
    move = {"slot": "r0c0", "generation": 1, "blueprint": "norm", "proposal": 0, "cause": cause}
    return StageChanged(**axes(tick), source=Stage.TRAINING, target=Stage.PRUNED, **move)


def rolled_back(tick: int) -> list[Any]:
    panic = Panic(**axes(tick), symptom="DIVERGENCE", words="training loss 9 against 1", healthy_step=50)
    window = {"skipped_from": 0, "skipped_steps": 0, "recovery_ms": 1.0, "budget_ms": 9.0, "replay": 1, "source": "ram"}
    back = RolledBack(**axes(tick), to_step=40, to_tick=4, blamed=("r0c0",), blamed_ticks=(3,), **window)
    return [panic, back]


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([*germinated(1), pruned(5, "QUARANTINE")], r"pruned at step 50 \(tick 5\): its own gradient was not finite"),
        (
            [*germinated(1), *rolled_back(6), pruned(4, "ROLLBACK")],
            r"blamed for what made .* \(training loss 9 against",
        ),
        ([*germinated(1)], r"It is alive, in GERMINATED since step 30"),
        (
            [BirthVetoed(**axes(6), slot="r0c0", blueprint="norm", rank=1, reason="OUT_OF_MEMORY", proposal=9)],
            r"r0c0: the birth of norm was given up on all ranks at step 60 \(tick 6\), since rank 1 .*: OUT_OF_MEMORY",
        ),
        (
            [refused(4), refused(5)],
            r"r0c0: ADVANCE was refused 2 times, the last at step 50 \(tick 5\): dwell is 0 of 1",
        ),
        ([*germinated(1), refused(4)], r"ADVANCE was refused at step 40 \(tick 4\): dwell is 0 of 1 ticks"),
    ],
)
def test_other_fates(tmp_path: Path, events: list[Any], says: str) -> None:
    folder = write_run(tmp_path / "run", [run_started(), *events])
    assert re.search(says, "\n".join(texts(explain_slot(records_of(folder), "r0c0"))))


def test_a_gate_that_held_a_seed_back_is_told_with_what_it_measured(tmp_path: Path) -> None:
    from esper.leyline.events import GateJudged

    gates = [GateJudged(**axes(tick), slot="r0c0", enforced=True, result=GATE) for tick in (4, 5)]
    folder = write_run(tmp_path / "run", [run_started(), *germinated(1), *gates])
    told = "\n".join(texts(explain_slot(records_of(folder), "r0c0")))
    assert (
        "G2 held it back 2 times, the last at step 50 (tick 5) for contribution (contribution: 0.001 ± 0.004)" in told
    )


def test_a_tick() -> None:
    told = texts(explain(RECORDED, "10"))
    assert "r0c0: look 2 at it: it saves 0.1636 ± 0.038 of the loss of a sample. #36" in told
    assert "r0c0: G3 passed. #39" in told
    assert any("r0c0 BLENDING -> HOLDING conv_light (ADVANCE)" in text for text in told)
    assert texts(explain(RECORDED, "1")) == ["At tick 1 nothing was decided, moved or measured. "]
    with pytest.raises(ConfigError, match="no tick 99; the last tick is 20"):
        explain(RECORDED, "99")
    with pytest.raises(ConfigError, match="no slot r9c9; its slots are r0c0, r0c1, r1c0"):
        explain(RECORDED, "r9c9")


def test_a_run_that_diverged_is_never_restarted_as_it_is() -> None:
    """Recorded: the demo at a learning rate of 1e12."""
    said = explain_end(RECORDED.parent / "diverged")
    assert (said.cause, said.action) == ("diverged", Action.CHANGE)
    assert "resume" not in said.command, "every step would be the same again"
    (failure,) = said.failures
    assert (failure.rank, failure.step, failure.tick) == (None, 21, 4)
    text = " ".join(sentence.text for sentence in said.sentences)
    assert "training left the finite numbers for good" in text
    assert "lower optim.lr" in text
    kinds = {event["kind"] for sentence in said.sentences for event in sentence.events}
    assert "run_ended" in kinds


def failed(
    step: int, words: str = "lost contact in x: rank 1 was last seen in save at step {0}, tick 2, 1 s ago"
) -> Any:
    return RunEnded(step=step, tick=step // 10, epoch=0, status="failed", summary={"message": words.format(step)})


def lasting(folder: Path) -> Path:
    """STATUS.json is of the newest attempt."""
    os.utime(RunDir(folder).attempt, (1, 1))
    return folder


def test_the_same_fault_twice_is_no_restart_and_five_times_is_the_end(tmp_path: Path) -> None:
    status = {"status": "failed", "exit_code": 76, "message": failed(20).summary["message"], "step": 20}
    once = lasting(write_run(tmp_path / "once", [run_started(), failed(20)], status=status))
    assert explain_end(once).action is Action.RESTART
    twice = [[run_started(), failed(20)], [run_started(step=10, resumed_from=10), failed(20)]]
    folder = lasting(write_run(tmp_path / "twice", *twice, status=status))
    said = explain_end(folder)
    assert (said.action, said.command) == (Action.CHANGE, f"esper doctor --run-dir {folder}")
    assert [failure.attempt for failure in said.failures] == [1, 2]
    further = [[run_started(), failed(10)], [run_started(step=10, resumed_from=10), failed(20)]]
    assert explain_end(lasting(write_run(tmp_path / "further", *further, status=status))).action is Action.RESTART
    five = [[run_started(), failed(20)]] * 5
    assert explain_end(lasting(write_run(tmp_path / "five", *five, status=status))).action is Action.GIVE_UP


def test_an_end_without_a_word(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [run_started(), fault(3)])
    (folder / "heartbeat").mkdir()
    mark = folder / "heartbeat" / "rank-00001"
    mark.write_bytes(json.dumps([31, 3, "forward", [0.0, "x", 0.0], ""]).encode().ljust(512))
    os.utime(mark, (1, 1))
    said = explain_end(folder)
    assert (said.cause, said.action, said.failures[-1].phase) == ("silent", Action.RESTART, "forward")
    assert (
        "Attempt 1 ended at step 31 (tick 3) without a word; its ranks were last in forward" in said.sentences[0].text
    )
    mark.write_bytes(json.dumps([31, 3, "failed", [0.0, "x", 0.0], "OSError: Read-only file system"]).encode())
    os.utime(mark, (1, 1))
    assert explain_end(folder).cause == "read-only"


def test_where_rank_0_points_to_another_rank_that_one_is_heard(tmp_path: Path) -> None:
    words = "save of step 20 failed on rank 1: see that rank; older checkpoints are untouched"
    status = {"status": "failed", "exit_code": 74, "message": words, "step": 20}
    folder = lasting(write_run(tmp_path / "run", [run_started(), failed(20, words)], status=status))
    assert explain_end(folder).cause == "files"
    other = fault(2, what="save of step 20 failed here: OSError: [Errno 28] No space left on device")
    RunDir(folder).rank_events(1).write_bytes(encode(Envelope("0badcafe", 1, 1).to_record(other)))
    assert explain_end(folder).cause == "disk full"


@pytest.mark.parametrize(("attempt", "causes"), [(1, ["silent", "silent"]), (2, ["silent"])])
def test_a_status_itself_says_of_which_attempt_it_is(tmp_path: Path, attempt: int, causes: list[str]) -> None:
    """Whatever the times of the files say, as after a copy that lost them."""
    status = {"status": "done", "exit_code": 0, "message": "", "step": 9, "attempt": attempt}
    folder = write_run(tmp_path / "run", [run_started()], [run_started(step=10, resumed_from=10)], status=status)
    os.utime(RunDir(folder).status, (1, 1) if attempt == 2 else (4e9, 4e9))
    assert [failure.cause for failure in explain_end(folder).failures] == causes


def test_an_older_status_is_not_taken_for_the_end_of_the_newest_attempt(tmp_path: Path) -> None:
    status = {"status": "done", "exit_code": 0, "message": "", "step": 9}
    folder = write_run(tmp_path / "run", [run_started()], [run_started(step=10, resumed_from=10)], status=status)
    os.utime(RunDir(folder).status, (1, 1))
    said = explain_end(folder)
    assert (said.cause, [failure.cause for failure in said.failures]) == ("silent", ["silent", "silent"])


def test_rules() -> None:
    assert len({rule.says for rule in RULES}) == len(RULES)
    rule, said = match_rule("lost contact in load: rank 3 never arrived", 76)
    assert (rule.cause, said["rank"]) == ("rank lost", "3")
    assert match_rule("KeyError: 'x'", 70)[0].cause == "own code"
    assert match_rule("optim.lr = -1: must be > 0", 78)[0].cause == "settings"
    row = [Failure(attempt=n, cause="silent", rule=None, step=20) for n in range(1, 6)]
    assert not comes_again(row[:1])
    assert comes_again(row)
    assert comes_for_ever(row)
    assert not comes_for_ever(row[1:])


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    run = Path(shutil.copytree(RECORDED, tmp_path / "run"))
    assert cli.main(["why", str(run), "r0c1"]) == 0
    assert "It was pruned at step 132 (tick 11)" in capsys.readouterr().out
    assert cli.main(["why", str(run)]) == 0
    assert '[#7] is the record with "seq":7 in events.jsonl' in capsys.readouterr().out
    assert cli.main(["why", str(lasting(run)), "--end"]) == 0
    assert capsys.readouterr().out == "The run is done, at step 240. There is nothing to do. [#76]\n"
    assert cli.main(["why", str(tmp_path)]) == RunDirError.exit_code
    assert f"{tmp_path}: no run directory (there is no config.yaml in it); name one of {run}" in capsys.readouterr().err


def test_a_run_named_as_esper_runs_names_it(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(RECORDED, tmp_path / "runs" / "demo" / "grown")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["runs"]) == 0
    next_command = capsys.readouterr().out.splitlines()[-1]
    assert next_command.startswith("next  esper why runs/demo/grown ")
    assert cli.main(next_command.split()[2:4]) == 0
    assert "It was pruned" in capsys.readouterr().out
    for command in ("why", "report", "watch"):
        assert cli.main([command, "demo/grown"]) == RunDirError.exit_code
        assert "; name one of runs/demo/grown\n" in capsys.readouterr().err
