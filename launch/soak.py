"""Soak test: kills real runs at random; every run is resumed by Esper itself and must end as if nothing had happened.

    python launch/soak.py [--kills 200] [--minutes 120] [--seed 1]     # about 15 s per kill on two cores
    python launch/soak.py --seed 1 --round 7                           # repeats one round
    python launch/soak.py --seed 1 --kills 500 --record FILE           # stopped and typed again, it goes on

First the demo's task runs undisturbed. Then, in each round, the same run is started and gets random signals at random
moments (start-up, training, saves, the end): one rank, all ranks, torchrun's agent, the launcher, or all of them at
once. If torchrun does not start the run again by itself, `esper resume RUN` does. In the end every bit of the last
checkpoint and of result.json must equal that of the undisturbed run. On the way the newest checkpoint never becomes an
older one, no process is left behind, and nothing hangs. The moments are drawn from seed and round, but which step they
meet depends on the machine: the same command draws the same moments, not the same steps.
"""

import argparse
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soaking.record import OtherCode, add_line, read_lines, sources_digest
from soaking.run import Failed, Kill, Run, outcome, strike

from esper.nissa.reading import read_events

PATIENCE_S = 300.0  # for the next step, attempt or kill
PER_ROUND = 5


@dataclass(slots=True)
class Round:
    """One run with kills.

    Fields:
        number: of the round.
        kills: in order.
        failure: the error of the round; "" without one.
    """

    number: int
    kills: list[Kill] = field(default_factory=list)
    failure: str = ""


class Moments:
    """Draws the moments of kills: one in four falls into a start, the others into the training after it.

    Args:
        start_s: seconds that the start of the undisturbed run took.
        train_s: seconds that its training took.
        rng: draws the moments.
    """

    def __init__(self, start_s: float, train_s: float, rng: random.Random) -> None:
        self.start_s, self.train_s, self._rng = start_s, train_s, rng
        self._due, self._trains = 0.0, True

    def again(self) -> None:
        """Draws the next moment, after a kill or at the beginning."""
        self._trains = early = self._rng.random() < 0.25
        # If the last kill had no effect, no new attempt begins to train; then the next kill comes after this time.
        self._due = time.monotonic() + (self._rng.uniform(0.0, self.start_s) if early else 4 * self.start_s)

    def trains(self) -> None:
        """Sets the moment after the ranks of a new attempt have begun to train."""
        if not self._trains:
            self._trains = True
            self._due = time.monotonic() + self._rng.uniform(0.0, self.train_s / 2)

    def due(self) -> bool:
        """Whether the moment has come."""
        return time.monotonic() >= self._due


def play(run: Run, record: Round, kills: int, moments: Moments, rng: random.Random) -> None:
    """Takes one run to its end through at most ``kills`` kills."""
    run.start()
    moments.again()
    attempt, deadline, reached = 0, time.monotonic() + PATIENCE_S, (0, 0)
    while True:
        assert run.command is not None
        time.sleep(0.05)
        now, at = time.monotonic(), (run.attempt(), run.mark()[0])
        if at > reached:
            reached, deadline = at, now + PATIENCE_S
        if now > deadline:
            raise Failed(f"nothing for {PATIENCE_S:.0f} s: rank 0 is in {run.mark()}")
        last = record.kills[-1] if record.kills else None
        if run.attempt() > attempt and run.mark()[1] in ("forward", "backward"):
            attempt = run.attempt()
            moments.trains()
            if last and last.again_s is None and attempt > last.attempt:
                last.again_s = now - last.at
        code = run.command.poll()
        if code is not None:
            run.wait_for_processes()
            run.check_newest()
            if code == 0:
                return
            if not record.kills:
                raise Failed(f"exit code {code} before any kill")
            run.start()
            deadline = time.monotonic() + PATIENCE_S
        elif len(record.kills) < kills and moments.due():
            run.check_newest()
            kill = strike(run, rng)
            if kill is not None:
                record.kills.append(kill)
            moments.again()
            deadline = now + PATIENCE_S


def trained_s(run: Run) -> float:
    """Seconds from the first tick to the last one."""
    times = [event["time"] for event in read_events(run.folder / "events.jsonl") if event["kind"] == "tick"]
    return float(times[-1] - times[0])


def count_lost(run: Run, kills: list[Kill]) -> None:
    """Counts for each kill the optimizer steps that the next attempt had to repeat."""
    starts = [event for event in read_events(run.folder / "events.jsonl") if event["kind"] == "run_started"]
    began = {event["attempt"]: event["payload"]["resumed_from"] or 0 for event in starts}
    for kill in kills:
        if kill.attempt + 1 in began:
            kill.lost = max(0, kill.step - began[kill.attempt + 1])


def read_rounds(path: Path | None, code: str, seed: int, ranks: int) -> list[Round]:
    """The rounds that earlier commands have recorded, of the same seed and ranks."""
    return [
        Round(line["number"], [Kill(**kill) for kill in line["kills"]], line["failure"])
        for line in (() if path is None else read_lines(path, code))
        if (line["seed"], line["ranks"]) == (seed, ranks)
    ]


def one_round(
    number: int, seed: int, kills: int, times: tuple[float, float], folder: Path, wanted: dict[str, Any], ranks: int
) -> Round:
    """Plays one round; after a failure the result names it, and the folder is kept."""
    record, run = Round(number), Run(folder / f"round-{number}", ranks)
    rng = random.Random(f"{seed}/{number}")
    try:
        play(run, record, kills, Moments(*times, rng), rng)
        actual = outcome(run)
        differing = [key for key in {*actual, *wanted} if actual.get(key) != wanted.get(key)]
        if differing:
            raise Failed(f"{len(differing)} values differ, among them {sorted(differing)[:3]}")
        count_lost(run, record.kills)
        shutil.rmtree(run.folder)
    except Exception as error:
        record.failure = f"{type(error).__name__}: {error} (kept: {run.folder}, {run.log})"
    finally:
        run.end()
    return record


def main() -> int:
    """Plays the rounds; returns 1 if one failed, else 0."""
    parser = argparse.ArgumentParser(description="Random kills of real runs, each compared with an undisturbed one.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=120.0, help="no round begins later")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round", type=int, default=None, help="only this one")
    parser.add_argument("--ranks", type=int, default=2, help="of each run; 2 or 3")
    parser.add_argument("--record", type=Path, help="a file of the rounds played, with which the same command goes on")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the processes of the run are ended first
    began = time.monotonic()
    code = sources_digest()
    try:
        rounds = read_rounds(args.record, code, args.seed, args.ranks) if args.round is None else []
    except OtherCode as error:
        print(f"soak: {error}", file=sys.stderr)
        return 78
    folder = Path(tempfile.mkdtemp(prefix="esper-soak-"))
    if sum(len(record.kills) for record in rounds) >= args.kills:
        return summary(rounds, args.seed, time.monotonic() - began, folder)
    alone = Run(folder / "alone", args.ranks)
    try:
        play(alone, Round(-1), 0, Moments(0.0, 0.0, random.Random(0)), random.Random(0))
    finally:
        alone.end()
    wanted, whole_s = outcome(alone), time.monotonic() - began
    train_s = trained_s(alone)
    times = (whole_s - train_s, train_s)
    print(f"undisturbed: {times[0]:.0f} s to start, {times[1]:.0f} s of training; runs in {folder}", flush=True)
    number = len(rounds) if args.round is None else args.round
    while (left := args.kills - sum(len(record.kills) for record in rounds)) > 0:
        record = one_round(number, args.seed, min(left, PER_ROUND), times, folder, wanted, args.ranks)
        rounds.append(record)
        if args.record is not None:
            add_line(args.record, code, seed=args.seed, ranks=args.ranks, **asdict(record))
        for kill in record.kills:
            again = "-" if kill.again_s is None else f"{kill.again_s:.1f} s"
            where = f"in {kill.phase or 'start'}, step {kill.step}"
            print(f"round {number}: {kill.signal} to {kill.victim} {where}: {again}, {kill.lost} steps lost")
        print(f"round {number}: {record.failure or 'the same bits'}", flush=True)
        number += 1
        if args.round is not None or time.monotonic() - began > 60 * args.minutes:
            break
    return summary(rounds, args.seed, time.monotonic() - began, folder)


def summary(rounds: list[Round], seed: int, seconds: float, folder: Path) -> int:
    """Prints the figures, and the command that repeats each failed round; returns the exit code."""
    kills = [kill for record in rounds for kill in record.kills]
    waits = [kill.again_s for kill in kills if kill.again_s is not None]
    failed = [record for record in rounds if record.failure]
    print(f"{len(kills)} kills in {len(rounds)} runs, {len(failed)} failed, {seconds / 60:.1f} minutes")
    print("  " + ", ".join(f"{count} x {name}" for name, count in Counter(k.victim for k in kills).most_common()))
    print("  " + ", ".join(f"{count} x {name}" for name, count in Counter(k.signal for k in kills).most_common()))
    print(f"  {sum(kill.attempt > 1 for kill in kills)} of them struck a run that had been started again")
    if waits:
        print(f"  to training again: median {statistics.median(waits):.1f} s, longest {max(waits):.1f} s")
        print(f"  steps done twice: {sum(k.lost for k in kills)}, by one kill {max(k.lost for k in kills)} at most")
    for record in failed:
        print(f"  FAILED round {record.number}: {record.failure}")
        print(f"  again: python launch/soak.py --seed {seed} --round {record.number}")
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
