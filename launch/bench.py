"""Benchmarks: ratios of Esper to a baseline, measured in one interleaved run, with an A/A arm for each.

    python launch/bench.py lockstep [--rounds N] [--ranks R] [--parts step tick growth save share]
    python launch/bench.py kasmina  [--rounds N] [--ranks R] [--parts ...] [--json FILE]
    python launch/bench.py policy   [--rounds N] [--ranks R] [--parts many64 many16 share ranks] [--json FILE]
    python launch/bench.py library  [--rounds N] [--json FILE]
    python launch/bench.py feeding  [--rounds N] [--ranks 1] [--json FILE]
    python launch/bench.py gpu      [--devices N] [--rounds R] [--out FOLDER] [--plan]
    python launch/bench.py gates    [--rounds N] [--parts luck shadow power runs births corpora]
    python launch/bench.py service  [--rounds N] [--parts start restart] [--before FOLDER]
    python launch/bench.py tokens   --rounds 1

`service` measures what a user waits for, in seconds; ``--before`` names a checkout of older code to measure beside.
`tokens` trains on 4 GiB of tokens that it makes below TMPDIR, and removes them.
`library` measures one rank, which leaves cores idle, and as many as there are cores.
`gates` prints the tables of docs/gates.md, of 50 N lives a cell. Its part `corpora` first trains small nets on text.

If the interval straddles the budget, or A/A's noise is wider than the margin to it, the verdict is "unresolved", not
"met". To add a measurement, write a function in a module of `benching` that returns its lines, and name it in PARTS.
"""

import argparse
import json
import os
import sys
from pathlib import Path

from benching import compiled, feeding, gates, gpu, kasmina, library, lockstep, policy, service, ticking, tokens
from benching.harness import DEVICE, run

from esper.leyline.machine.room import usable_cores

BENCHES = {
    "lockstep": lockstep.PARTS | ticking.PARTS,
    "kasmina": kasmina.PARTS | library.PARTS | compiled.PARTS,
    "policy": policy.PARTS,
    "feeding": feeding.PARTS,
    "library": library.PARTS,
}


def main() -> None:
    """Prints the lines of each ratio; ``--json`` writes them to a file."""
    if sys.argv[1:2] == ["gpu"]:
        sys.exit(gpu.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=[*BENCHES, "gates", "service", "tokens"])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--ranks", type=int, help="2 unless given; library: one, then as many as there are cores")
    parser.add_argument("--parts", nargs="+", help="only these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu", help="where ranks compute")
    parser.add_argument("--before", type=Path, help="service: a checkout of older code")
    args = parser.parse_args()
    own = {"gates": gates.PARTS, "service": service.PARTS, "tokens": tokens.PARTS}
    known = own.get(args.what) or BENCHES[args.what]
    unknown = [part for part in args.parts or [] if part not in known]
    if unknown:
        parser.error(f"{args.what} has no part {', '.join(unknown)}; it has {', '.join(known)}")
    if args.what == "service":
        for part in args.parts or known:
            service.PARTS[part](args.rounds, args.before and args.before.absolute())
        return
    if args.what == "tokens":
        for part in args.parts or known:
            tokens.PARTS[part](args.rounds)
        return
    if args.what == "gates":
        for part in args.parts or known:
            gates.PARTS[part](50 * args.rounds)
        return
    os.environ[DEVICE] = args.device
    counts = [args.ranks or 2]
    if args.what == "library" and args.ranks is None:
        counts = sorted({1, usable_cores()})
    chosen = {name: known[name] for name in args.parts or known}
    results = [ratio for ranks in counts for ratio in run(chosen, ranks=ranks, rounds=args.rounds)]
    for r in results:
        print(f"{r.name}\n    {r.host}")
        print(
            f"    ratio {r.ratio:.3f} [{r.low:.3f}, {r.high:.3f}]   A/A {r.aa:.3f} [{r.aa_low:.3f}, {r.aa_high:.3f}]",
            end="",
        )
        print(f"   budget {r.budget}: {r.verdict}")
    if args.json:
        args.json.write_text(json.dumps([{**vars(r), "verdict": r.verdict} for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
