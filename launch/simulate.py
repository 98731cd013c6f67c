"""Simulates the lockstep protocol on one machine: many ranks, or every state of a few. Nothing is trained.

    python launch/simulate.py crowd   [--ranks 64 256 1024] [--slots 12] [--ticks 3] [--fault "forged stage"]
    python launch/simulate.py guarded [--ranks 8] [--ticks 60] [--sick 20 40] [--lives 5] [--fault "forged snapshot"]
    python launch/simulate.py explore [--depth 4] [--slots 2] [--ranks 3] [--max-live N] [--losses]
    python launch/simulate.py ring    [--ranks 64 256 1024 4096] [--latency-us 20] [--cpu-us 20] [--spread 0.3]
    python launch/simulate.py cost    [--machines 1 8 64] [--parameters 124e6] [--step-s 0.25] [--every 50] [...]

`crowd` prints for each number of ranks the bytes and collectives of a tick, the CPU milliseconds that a rank spends on
it, and how the ranks ended. `guarded` lets crowds fall ill, each with checkpoints in a temporary folder, and prints how
often they went back and how the ranks ended. `explore` prints how many states it entered, and fails with the path to
the first state that breaks an invariant. These use encoder, reducer and error handling of real runs: see `esper.drill`.
`ring` follows every message of both collectives of a tick, and prints their time beside the formula's. `cost` prints
what ticks, births, saves and resumes cost by formula (docs/scale.md).
"""

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from esper.drill.crowd import Crowd, run_crowd, strip_ages
from esper.drill.explore import Explorer, SmallWorld
from esper.drill.faults import FaultKind
from esper.drill.guarded import GuardedCrowd, GuardFault, run_guarded
from esper.drill.ring import Link, grid_seconds, messages_sent, ring_seconds, ring_simulated, tree_seconds
from esper.drill.scale import TCP, Cluster, Job, commit_bytes, costs, observe_bytes


def show_crowd(args: argparse.Namespace) -> None:
    """Prints a paragraph for each number of ranks."""
    fault = None if args.fault is None else FaultKind(args.fault)
    for ranks in args.ranks:
        result = run_crowd(Crowd(ranks=ranks, slots=args.slots, ticks=args.ticks, seed=args.seed, fault=fault))
        print(
            f"{ranks} ranks, {args.slots} slots: {result.bytes_per_tick:,} bytes and {result.collectives} collectives "
            f"a rank and tick, {result.ms_per_tick:.1f} ms of CPU"
        )
        ends = Counter(
            "lost"
            if rank.lost
            else strip_ages(str(rank.error))
            if rank.error is not None
            else f"came to the end with state {rank.value.digests[-1]:016x}"
            if rank.value is not None
            else ""
            for rank in result.ranks
        )
        for text, count in ends.most_common():
            print(f"    {count} ranks: {text}")


def show_guarded(args: argparse.Namespace) -> None:
    """Prints a line for each life, and how the ranks ended."""
    fault = None if args.fault is None else GuardFault(args.fault)
    for seed in range(args.seed, args.seed + args.lives):
        setup = GuardedCrowd(ranks=args.ranks[0], ticks=args.ticks, sick=tuple(args.sick), seed=seed, fault=fault)
        with tempfile.TemporaryDirectory() as folder:
            ends = run_guarded(setup, Path(folder))
        back = {sum(moment.panicked for moment in rank.value.moments) for rank in ends if rank.value is not None}
        texts = Counter(
            "lost"
            if rank.lost
            else f"state {rank.value.moments[-1].state:016x} at step {rank.value.moments[-1].step}"
            if rank.value is not None
            else strip_ages(str(rank.error))
            for rank in ends
        )
        went = f"went back {', '.join(map(str, sorted(back)))} times; " if back else ""
        print(f"life {seed}: {went}{'; '.join(f'{count} ranks: {text}' for text, count in texts.most_common())}")


def show_exploration(args: argparse.Namespace) -> None:
    """Prints a line for each depth."""
    small = SmallWorld(ranks=args.ranks[0] if args.ranks else 3, slots=args.slots, max_live=args.max_live)
    result = Explorer(small).explore(args.depth, with_losses=args.losses)
    for depth, count in enumerate(result.levels):
        print(f"depth {depth}: {count} new states")
    print(f"{result.states} states, {result.ticks} ticks on {small.ranks} ranks, {result.faults} of them with a fault")


def link_of(args: argparse.Namespace) -> Link:
    """The link that the arguments describe."""
    return Link(
        latency_s=1e-6 * args.latency_us,
        cpu_s=1e-6 * args.cpu_us,
        bytes_per_s=TCP.bytes_per_s,
        spread=args.spread,
    )


def show_ring(args: argparse.Namespace) -> None:
    """Prints a line for each number of ranks."""
    link = link_of(args)
    for ranks in args.ranks:
        sizes = (observe_bytes(args.slots), commit_bytes(args.slots, ranks))
        sent = sum(messages_sent(ranks, 0, size) for size in sizes)
        ring = sum(ring_simulated(ranks, size, link, seed=args.seed) for size in sizes)
        others = [sum(f(ranks, size, link) for size in sizes) for f in (ring_seconds, grid_seconds, tree_seconds)]
        words = ", ".join(f"{name} {1e3 * s:.2f}" for name, s in zip(("formula", "grid", "tree"), others, strict=True))
        print(f"{ranks} ranks, {args.slots} slots: {sent:,} messages a rank and tick, {1e3 * ring:.2f} ms; {words} ms")


def show_cost(args: argparse.Namespace) -> None:
    """Prints a Markdown table with a column for each number of machines."""
    job = Job(parameters=args.parameters, step_s=args.step_s, every=args.every, slots=args.slots)
    found = [costs(job, Cluster(machines=machines, tcp=link_of(args))) for machines in args.machines]
    print("| | " + " | ".join(f"{8 * machines} GPUs" for machines in args.machines) + " |")
    print("|---" * (1 + len(found)) + "|")
    rows = {
        "observe and commit, ms": [f"{1e3 * (c.observe_s + c.commit_s):.3g}" for c in found],
        "a tick, ms": [f"{1e3 * c.tick_s:.3g}" for c in found],
        "share of training time, %": [f"{100 * c.share:.2g}" for c in found],
        "both collectives over a square of ranks, ms": [f"{1e3 * c.grid_s:.3g}" for c in found],
        "a birth at its tick, ms": [f"{1e3 * c.birth_s:.3g}" for c in found],
        "a seed's gradient in a step, ms": [f"{1e3 * c.seed_step_s:.2g}" for c in found],
        "a save: training waits, s": [f"{c.save_stall_s:.2g}" for c in found],
        "a save: on disk after, s": [f"{c.save_s:.2g}" for c in found],
        "a resume: state read and hashed, s": [f"{c.resume_s:.2g}" for c in found],
        "connections a process / in all": [f"{c.open_files:,} / {c.mesh:,}" for c in found],
    }
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(values) + " |")


def main() -> None:
    """Runs one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    many = commands.add_parser("crowd")
    many.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024])
    many.add_argument("--slots", type=int, default=12)
    many.add_argument("--ticks", type=int, default=3)
    many.add_argument("--seed", type=int, default=0)
    many.add_argument("--fault", choices=[kind.value for kind in FaultKind])
    many.set_defaults(show=show_crowd)
    ill = commands.add_parser("guarded")
    ill.add_argument("--ranks", type=int, nargs=1, default=[8])
    ill.add_argument("--ticks", type=int, default=60)
    ill.add_argument("--sick", type=int, nargs="*", default=[20, 40])
    ill.add_argument("--seed", type=int, default=0)
    ill.add_argument("--lives", type=int, default=5)
    ill.add_argument("--fault", choices=[fault.value for fault in GuardFault])
    ill.set_defaults(show=show_guarded)
    few = commands.add_parser("explore")
    few.add_argument("--ranks", type=int, nargs=1)
    few.add_argument("--slots", type=int, default=2)
    few.add_argument("--depth", type=int, default=4)
    few.add_argument("--max-live", type=int)
    few.add_argument("--losses", action="store_true", help="take every rank away at every point, too (slow)")
    few.set_defaults(show=show_exploration)
    for name, show in (("ring", show_ring), ("cost", show_cost)):
        one = commands.add_parser(name)
        one.add_argument("--slots", type=int, default=12)
        one.add_argument("--latency-us", type=float, default=1e6 * TCP.latency_s)
        one.add_argument("--cpu-us", type=float, default=1e6 * TCP.cpu_s)
        one.add_argument("--spread", type=float, default=TCP.spread)
        if name == "ring":
            one.add_argument("--ranks", type=int, nargs="+", default=[64, 256, 1024, 4096])
            one.add_argument("--seed", type=int, default=0)
        else:
            one.add_argument("--machines", type=int, nargs="+", default=[1, 8, 64])
            one.add_argument("--parameters", type=float, default=124e6)
            one.add_argument("--step-s", type=float, default=0.25)
            one.add_argument("--every", type=int, default=50)
        one.set_defaults(show=show)
    args = parser.parse_args()
    args.show(args)


if __name__ == "__main__":
    main()
