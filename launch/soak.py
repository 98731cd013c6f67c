"""Random kills of real runs: every one is resumed by the product itself and must end as if nothing had happened.

    python launch/soak.py [--kills 200] [--minutes 120] [--seed 1]     # about 15 s a kill on two cores
    python launch/soak.py --seed 1 --round 7                           # one round again

One run of the demo's task is left alone. Then, round by round, the same run is started and struck at random moments
(start-up, training, saves and the end as they come) by a random signal, on a rank, on all of them, on torchrun's agent,
on the launcher or on everything at once. What torchrun does not start again by itself `esper resume RUN` does. In the
end every bit of the last checkpoint and of result.json must be that of the run that was left alone; on the way the
newest checkpoint never becomes an older one, nothing is left behind, nothing hangs. The moments are drawn from seed and
round, but where they find a run depends on the machine: the same command tries again, it cannot promise the same place.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soaking.run import Failed, Kill, Run, outcome, strike

from esper.nissa.reading import read_events

PATIENCE_S = 300.0  # for one run without a further kill
PER_ROUND = 5


@dataclass(slots=True)
class Round:
    """One run that was struck: its kills, and how it failed ("" where it did not)."""

    number: int
    kills: list[Kill] = field(default_factory=list)
    failure: str = ""


class Moments:
    """When to strike: one kill in four falls into a start, the others into what is trained afterwards.

    Args:
        start_s, train_s: what these took in the run that was left alone.
    """

    def __init__(self, start_s: float, train_s: float, rng: random.Random) -> None:
        self.start_s, self.train_s, self._rng = start_s, train_s, rng
        self._due, self._trains = 0.0, True

    def again(self) -> None:
        """After a kill, or at the beginning: draws the next moment."""
        self._trains = early = self._rng.random() < 0.25
        # Ranks that do not come to train, since the kill before had no effect on them, are struck in any case.
        self._due = time.monotonic() + (self._rng.uniform(0.0, self.start_s) if early else 4 * self.start_s)

    def trains(self) -> None:
        """The ranks of a new attempt train."""
        if not self._trains:
            self._trains = True
            self._due = time.monotonic() + self._rng.uniform(0.0, self.train_s / 2)

    def due(self) -> bool:
        """Whether the moment has come."""
        return time.monotonic() >= self._due


def play(run: Run, record: Round, kills: int, moments: Moments, rng: random.Random) -> None:
    """One run to its end through at most so many kills."""
    run.start()
    moments.again()
    attempt, deadline = 0, time.monotonic() + PATIENCE_S
    while True:
        assert run.command is not None
        time.sleep(0.05)
        now = time.monotonic()
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
            run.clear()
            run.look()
            if code == 0:
                return
            if not record.kills:
                raise Failed(f"exit code {code} before any kill")
            run.start()
            deadline = time.monotonic() + PATIENCE_S
        elif len(record.kills) < kills and moments.due():
            run.look()
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
    """Optimizer steps done at each kill that the next process group did again."""
    starts = [event for event in read_events(run.folder / "events.jsonl") if event["kind"] == "run_started"]
    began = {event["attempt"]: event["payload"]["resumed_from"] or 0 for event in starts}
    for kill in kills:
        if kill.attempt + 1 in began:
            kill.lost = max(0, kill.step - began[kill.attempt + 1])


def one_round(
    number: int, seed: int, kills: int, times: tuple[float, float], folder: Path, wanted: dict[str, Any]
) -> Round:
    """A round; a failure is told in it, and its folder kept."""
    record, run = Round(number), Run(folder / f"round-{number}")
    rng = random.Random(f"{seed}/{number}")
    try:
        play(run, record, kills, Moments(*times, rng), rng)
        found = outcome(run)
        differing = [key for key in {*found, *wanted} if found.get(key) != wanted.get(key)]
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
    """Soaks; returns 1 when a round failed."""
    parser = argparse.ArgumentParser(description="Random kills of real runs, each compared with an undisturbed one.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=120.0, help="no round begins later")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--round", type=int, default=None, help="this one alone")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended first
    folder = Path(tempfile.mkdtemp(prefix="esper-soak-"))
    began = time.monotonic()
    alone = Run(folder / "alone")
    try:
        play(alone, Round(-1), 0, Moments(0.0, 0.0, random.Random(0)), random.Random(0))
    finally:
        alone.end()
    wanted, whole_s = outcome(alone), time.monotonic() - began
    train_s = trained_s(alone)
    times = (whole_s - train_s, train_s)
    print(f"undisturbed: {times[0]:.0f} s to start, {times[1]:.0f} s of training; runs in {folder}", flush=True)
    rounds: list[Round] = []
    number = 0 if args.round is None else args.round
    while (left := args.kills - sum(len(record.kills) for record in rounds)) > 0:
        record = one_round(number, args.seed, min(left, PER_ROUND), times, folder, wanted)
        rounds.append(record)
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
    """The figures, and how to try again what failed."""
    kills = [kill for record in rounds for kill in record.kills]
    waits = [kill.again_s for kill in kills if kill.again_s is not None]
    failed = [record for record in rounds if record.failure]
    print(f"{len(kills)} kills in {len(rounds)} runs, {len(failed)} failed, {seconds / 60:.1f} minutes")
    print("  " + ", ".join(f"{count} x {name}" for name, count in Counter(k.victim for k in kills).most_common()))
    print("  " + ", ".join(f"{count} x {name}" for name, count in Counter(k.signal for k in kills).most_common()))
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
