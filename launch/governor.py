"""Measures the governor: its false alarms on runs that went well, and its recovery times.

    python launch/governor.py alarms RUN... [--deviations 6] [--rise 0.1] [--errors 4]
    python launch/governor.py recovery [--layers 16] [--dim 512] [--rounds 5]

`alarms` reads the losses that runs have logged (``telemetry.level=full``) and judges each tick by the ticks before it.
In runs that went well every suspect tick is a false alarm. `recovery` trains a GPT of that size on one process and
times its snapshots, and its rollbacks from memory and from disk.
"""

import argparse
import os
import socket
import statistics
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from benching.harness import engine_for

from esper.accord.course import Course
from esper.accord.governor.config import GovernorConfig
from esper.accord.judge import judge_loss
from esper.accord.verdict import Series, Verdict
from esper.config.strict import Reader
from esper.config.tree import read_plain
from esper.leyline.errors import ConfigError
from esper.leyline.events import Event, RolledBack
from esper.leyline.evidence import Reading
from esper.leyline.plain import from_plain
from esper.nissa.reading import keep_latest, read_events
from esper.run.assembly import chance_of
from esper.tolaria.data import data_config_class, load_data
from esper.tolaria.training.engine import Engine


def count_symptoms(losses: list[Reading], chance: float, config: GovernorConfig, *, training: bool) -> Counter[str]:
    """Counts losses, suspect losses by symptom, shifts, and panics of one curve; after a panic it begins anew."""
    counts, series = Counter(losses=len(losses)), Series()
    for loss in losses:
        found = judge_loss(series, loss, loss.tick or 0, chance, config, training=training)
        series = found.sick if found.course in (Course.WAIT, Course.PANIC) else found.healthy
        if found.course is Course.SHIFT:
            counts["shifts"] += 1
        elif found.course is not None:
            counts[f"suspect, {found.symptom.name}"] += 1
        if found.course is Course.PANIC:
            counts["panics"] += 1
            series = Series()
    return counts


def show_alarms(args: argparse.Namespace) -> None:
    """Prints a line for each run with a suspect loss, then the sums."""
    total: Counter[str] = Counter()
    chances: dict[str, float] = {}
    for folder in args.runs:
        plain = read_plain(folder / "config.yaml")["data"]
        data = repr(plain)
        if data not in chances:
            reader = Reader()
            section = reader.section(data_config_class(plain["kind"]), plain, "data")
            if reader.problems:
                raise ConfigError([f"{folder}: {problem}" for problem in reader.problems])
            chances[data] = chance_of(load_data(section))
        rule = GovernorConfig(deviations=args.deviations, rise=args.rise, errors=args.errors)
        ticks = [r for r in keep_latest(read_events(folder / "events.jsonl")) if r["kind"] == "tick"]
        counts = Counter(runs=1)
        for name in ("train_loss", "validation_loss"):
            plain_readings = [r["payload"][name] for r in ticks if r["payload"][name]["tick"] == r["tick"]]
            fresh = [from_plain(Reading, reading) for reading in plain_readings]
            counts += count_symptoms(fresh, chances[data], rule, training=name == "train_loss")
        if set(counts) > {"runs", "losses"}:
            print(f"{folder}: {dict(counts)}")
        total += counts
    print(dict(total))


class _KeptEvents:
    """A sink that keeps all events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _panic(engine: Engine) -> RolledBack:
    """Takes the engine back once, as after a tick with the verdict PANIC; returns the event of the rollback."""
    assert engine.governor is not None
    sick = replace(engine.state.governor, verdict=Verdict.PANIC, healthy_tick=engine.state.tick, replays=0)
    engine.state = replace(engine.state, governor=sick)
    began = time.perf_counter()
    recovery = engine.governor.find_recovery(engine.state, from_step=engine.oldest_step())
    assert recovery is not None
    engine.go_back(engine.state, recovery, began)
    assert isinstance(engine.narrator.sink, _KeptEvents)
    return next(e for e in reversed(engine.narrator.sink.events) if isinstance(e, RolledBack))


def show_recovery(args: argparse.Namespace) -> None:
    """Prints the median times of a snapshot's copy and of both kinds of rollback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]), RANK="0", WORLD_SIZE="1")
    engine = engine_for(
        [
            "host=gpt",
            "data=pysource",
            "data.max_bytes=200000",
            f"host.layers={args.layers}",
            f"host.dim={args.dim}",
            "host.heads=8",
            "trainer.batch=2",
            "controller=none",
            "world.nproc_per_node=1",
            "telemetry=off",
            "trainer.steps=1000",
            "control.every=1",
            "gates.probe_samples=64",
            "data.probe=128",
            "data.validation=8",
        ],
        0,
        1,
    )
    assert engine.governor is not None
    engine.narrator.sink = _KeptEvents()
    engine.train_step()
    engine.tick()
    size = sum(p.numel() for p in engine.grown.model.parameters())
    copies = []
    for _ in range(args.rounds + 1):  # one more, since the first allocates
        taken, ms = engine.governor.ring.take(engine.state, *engine.collect(engine.state))
        copies.append(ms)
    engine.governor.ring.confirm(engine.state.tick + 1)
    ram = [_panic(engine).recovery_ms for _ in range(args.rounds)]
    engine.saves.begin(engine.state, scored=True)
    engine.saves.finish(engine.state)
    engine.train_step()
    engine.tick()
    disk = []
    for _ in range(args.rounds):
        engine.governor.ring.forget_after(-1)
        engine.state = replace(engine.state, tick=engine.state.tick + 2, step=engine.state.step + 2)
        disk.append(_panic(engine).recovery_ms)
    print(
        f"GPT {args.layers} x {args.dim}, {size / 1e6:.1f} M parameters, {taken / 2**20:.0f} MiB a snapshot, 1 rank: "
        f"copy {statistics.median(copies[1:]):.0f} ms (the first one, which allocates, {copies[0]:.0f}); "
        f"back from memory {statistics.median(ram):.0f} ms of 500, from disk {statistics.median(disk):.0f} ms of 12000"
    )
    engine.world.close()


def main() -> None:
    """Makes one of the two measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(required=True)
    alarms = what.add_parser("alarms")
    alarms.add_argument("runs", nargs="+", type=Path)
    alarms.add_argument("--deviations", type=float, default=GovernorConfig().deviations)
    alarms.add_argument("--rise", type=float, default=GovernorConfig().rise)
    alarms.add_argument("--errors", type=float, default=GovernorConfig().errors)
    alarms.set_defaults(do=show_alarms)
    recovery = what.add_parser("recovery")
    recovery.add_argument("--layers", type=int, default=16)
    recovery.add_argument("--dim", type=int, default=512)
    recovery.add_argument("--rounds", type=int, default=5)
    recovery.set_defaults(do=show_recovery)
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
