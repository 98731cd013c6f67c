"""The command ``esper``.

esper train [overrides]                 the same as launch/train.py: compose, check, start torchrun
esper resume RUN                        go on with a run, from the newest checkpoint that is valid on all ranks
esper resume RUN --breaker ALLOWED      the same, and growth that the governor has stopped may go on
esper resume RUN --at STEP --as NEW     undo: a new run that goes on from an older checkpoint; RUN stays as it is
esper resume RUN key=value ...          the same under other settings, of those that may change: governor.*,
                                        checkpoint.*, telemetry.*, limits of time
esper resume RUN trainer.steps=N        make it longer, also if it is done (trainer.epochs=N, if epochs are its length)
esper compare NAME                      arms x seeds of conf/compare/NAME.yaml beside each other; finished runs are kept
esper runs [ROOT]                       every run below a folder: state, step, loss, slots, cost, last word
esper query "select ..." [--root ROOT]  SQL over all of their events
esper report RUN [RUN ...] [--out FILE] one page to look at or to send: RUN/report.html
esper ctl RUN COMMAND ...             an order to a run in training: germinate, prune, pause, stop (esper ctl --help)
esper watch RUN [RUN ...]               runs, live or finished, in this terminal (extra watch)
esper why RUN [SLOT|TICK|--end]         why a seed was born, kept or pruned; why the run ended, and what to do
esper init FOLDER --task segmentation   a small package (model, data, task, settings, test) that trains at once
esper eval RUN [--part test] [--data data.root=FOLDER]    the task's metrics on any part or on other data
esper predict RUN --input FILE --output FILE             what the network says of new inputs
esper wandb-workspace --entity NAME     a page of panels in wandb for growth, evidence, health, cost, sweeps
esper export RUN --to FOLDER            the network of a run as a plain model, for use without esper
esper doctor [--run-dir RUN]            will a run work here? exit code 1 with a failure, else 0
esper policy train|resume|evaluate       train a controller (esper policy --help)
esper requeue RUN                       inside a Slurm job: put it back into the queue if its run was stopped
esper blueprints                        what may grow: every blueprint with its size (--dim CHANNELS --positions PLACES)
"""

from esper.launcher.early import interrupt_on_stop  # its handler must stand before what follows, which takes seconds

# isort: split

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.launcher.ahead.process import Ahead, is_plain_run
from esper.leyline.breaker import BreakerPhase
from esper.leyline.errors import EsperError, Preempted
from esper.nissa.screen import safe_streams

if TYPE_CHECKING:
    from esper.compare.arms import CompareConfig

WIDE = 200  # columns; a table takes what its content needs, and a narrower console would cut off numbers


def _count(text: str) -> int:
    """Reads a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    """Reads ``I/N``; returns I - 1 and N."""
    first, _, of = text.partition("/")
    if not (first.isdecimal() and of.isdecimal() and 1 <= int(first) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with 1 <= I <= N, as in 2/4")
    return int(first) - 1, int(of)


def _compare_over_tasks(given: argparse.Namespace, path: Path, plain: dict[str, Any], out: Path) -> int:
    """Runs ``esper compare`` of growth policies; returns exit code 0."""
    from esper.compare.growth import read_growth_compare
    from esper.compare.over_tasks import run_over_tasks
    from esper.compare.regret import markdown

    def say(text: str) -> None:
        print(f"esper: {text}", file=sys.stderr if given.markdown else sys.stdout, flush=True)

    config = read_growth_compare(path, plain)
    print(markdown(config, run_over_tasks(config, out, report_only=given.report, say=say)))
    return 0


def _compare_at_marks(
    given: argparse.Namespace, config: "CompareConfig", out: Path, share: str | None, say: Callable[[str], None]
) -> int:
    """Runs ``esper compare`` of arms that are read at FLOP marks; returns exit code 0, or 70 if a run failed."""
    from rich.console import Console

    from esper.compare.marked import run_marked
    from esper.compare.marked_table import marked_markdown, marked_table

    report = run_marked(given.name, config, out, parallel=given.jobs, report_only=given.report, share=share, say=say)
    if given.markdown:
        print(marked_markdown(report))
    else:
        Console(file=sys.stdout, width=WIDE).print(marked_table(report))
    for key, text in report.failures.items():
        print(f"esper: {key} failed: {text}", file=sys.stderr, flush=True)
    return EsperError.exit_code if report.failures else 0


def _compare(given: argparse.Namespace) -> int:
    """Runs ``esper compare``; returns exit code 0, or 70 if a run failed."""
    from rich.console import Console

    from esper.compare.arms import load_compare, read_compare
    from esper.compare.report import run_compare
    from esper.karn.page import write_page
    from esper.karn.table import comparison_table, markdown

    out = (given.out or Path("compare") / Path(given.name).stem).absolute()
    path, plain = read_compare(given.name, given.settings)
    if "tasks" in plain:
        return _compare_over_tasks(given, path, plain, out)
    config = load_compare(given.name, given.settings)
    index, shares = given.share
    config.seeds = config.seeds[index::shares]
    if not config.seeds:
        print(f"esper: share {index + 1}/{shares} has no seed; there are fewer than {shares}", flush=True)
        return 0

    def say(text: str) -> None:
        print(f"esper: {text}", file=sys.stderr if given.markdown else sys.stdout, flush=True)

    share = f"{index + 1}/{shares}" if shares > 1 else None
    if config.marks is not None:
        return _compare_at_marks(given, config, out, share, say)
    report = run_compare(given.name, config, out, parallel=given.jobs, report_only=given.report, share=share, say=say)
    if given.markdown:
        print(markdown(report.comparison))
    else:
        Console(file=sys.stdout, width=WIDE).print(comparison_table(report.comparison))
    if not given.no_page and share is None:
        command = " ".join(["esper compare", given.name, *given.settings])
        write_page(report.comparison, report.runs, out / "compare.html", command=command, where=report.where)
        say(f"page: {out / 'compare.html'}")
    for key, text in report.failures.items():
        print(f"esper: {key} failed: {text}", file=sys.stderr, flush=True)
    return EsperError.exit_code if report.failures else 0


def _give_order(arguments: Sequence[str]) -> int:
    """Runs ``esper ctl``; returns its exit code."""
    from esper.launcher import ctl
    from esper.launcher.start import LaunchResult, results_of_errors, show_result

    failed: list[LaunchResult] = []
    with results_of_errors(failed):
        return ctl.main(arguments)
    show_result(failed[0])
    return failed[0].code


@safe_streams()
def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    ahead = Ahead()
    if arguments[:1] == ["resume"] or (arguments[:1] == ["train"] and is_plain_run(arguments)):
        ahead.start()  # before what follows is imported, which takes its time, too
    try:
        return _run_command(arguments, ahead)
    finally:
        ahead.dismiss()


def _run_command(arguments: list[str], ahead: Ahead) -> int:
    """Runs a command line, and imports only what its command needs; returns its exit code."""
    from esper.launcher import compose as launcher

    launcher.make_cwd_importable()
    if arguments[:1] == ["train"]:  # Hydra reads the rest, its --help too
        return launcher.main(arguments[1:], ahead=ahead)
    if arguments[:1] == ["policy"]:
        from esper.launcher import policy

        return policy.main(arguments[1:])
    if arguments[:1] == ["doctor"]:
        from esper import doctor

        return doctor.main(arguments[1:])
    if arguments[:1] == ["ctl"]:
        return _give_order(arguments[1:])
    from esper.karn.commands import LOOKING, add_commands
    from esper.launcher.start import LaunchResult, results_of_errors, show_result
    from esper.run.using.commands import USING, add_using

    parser = argparse.ArgumentParser(
        "esper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="compose settings with Hydra and train (esper train --help)")
    again = commands.add_parser("resume", help="go on with a run", allow_abbrev=False)
    again.add_argument("run", metavar="RUN", type=Path, help="run directory")
    again.add_argument("--at", metavar="STEP", type=int, help="from the checkpoint of this step; needs --as")
    again.add_argument("--as", metavar="NEW", type=Path, dest="new", help="in this new run directory; needs --at")
    again.add_argument(
        "--breaker",
        metavar="PHASE",
        type=str.upper,
        choices=[phase.value for phase in BreakerPhase],
        help="turn the breaker of growth: allowed, trial, cooling, open",
    )
    trust = "run code that RUN names, although RUN is somebody else's, or others may write it"
    again.add_argument("--trust", action="store_true", help=trust)
    again.add_argument("changes", metavar="key=value", nargs="*", help="for example governor.enabled=false")
    plain = commands.add_parser("export", help="write a run's network as a plain model", allow_abbrev=False)
    plain.add_argument("run", metavar="RUN", type=Path, help="run directory")
    plain.add_argument("--at", metavar="STEP", type=int, help="checkpoint of this step; the one that validation chose")
    plain.add_argument("--to", metavar="FOLDER", type=Path, help="a new folder; RUN/export-STEP")
    plain.add_argument("--partial", action="store_true", help="also seeds with an alpha between 0 and 1, as they are")
    plain.add_argument("--ema", action="store_true", help="the average of the weights (trainer.ema), not the weights")
    plain.add_argument("--native", action="store_true", help="the host's own class with more blocks")
    plain.add_argument("--no-fold", action="store_true", help="fold nothing into weights: equal bit for bit")
    plain.add_argument("--wandb", action="store_true", help="wandb gets it too, as an artifact")
    plain.add_argument("--trust", action="store_true", help=trust)
    commands.add_parser("ctl", help="give an order to a run in training (esper ctl --help)")
    commands.add_parser("policy", help="train, resume and evaluate a policy (esper policy --help)")
    commands.add_parser("doctor", help="check whether a run will work here (esper doctor --help)")
    queue = commands.add_parser("requeue", help="put the Slurm job around this back into the queue", allow_abbrev=False)
    queue.add_argument("run", metavar="RUN", type=Path, help="run directory")
    listing = commands.add_parser("blueprints", help="print what may grow", allow_abbrev=False)
    listing.add_argument("--dim", metavar="CHANNELS", type=_count, default=64, help="of the slot's features; 64")
    listing.add_argument("--positions", metavar="PLACES", type=_count, default=64, help="H*W or T of a sample; 64")
    compare = commands.add_parser("compare", help="put arms beside each other", allow_abbrev=False)
    compare.add_argument("name", metavar="NAME", help="of conf/compare/NAME.yaml, or a file X.yaml")
    compare.add_argument("settings", metavar="key=value", nargs="*", help="for example seeds=[1,2]")
    compare.add_argument("--out", metavar="OUT", type=Path, help="folder for runs and report; compare/NAME")
    compare.add_argument("--jobs", metavar="N", type=_count, help="runs at a time; as many as there are cores for")
    compare.add_argument(
        "--share", metavar="I/N", type=_share, default=(0, 1), help="take every N-th seed, from the I-th; no page"
    )
    compare.add_argument("--report", action="store_true", help="run nothing, compare what has finished")
    compare.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    compare.add_argument("--no-page", action="store_true", help="no HTML page, so no matplotlib")
    add_commands(commands)
    add_using(commands)
    given, rest = parser.parse_known_args(arguments)
    if given.command == "compare" and not any(word.startswith("-") for word in rest):
        given.settings += rest  # argparse takes such a list in one place only; people also write it after options
    elif given.command == "resume" and not any(word.startswith("-") for word in rest):
        given.changes += rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if given.command == "resume" and (given.at is None) != (given.new is None):
        again.error("--at STEP and --as NEW belong together")
    results: list[LaunchResult] = []
    with results_of_errors(results):
        if given.command == "blueprints":
            from rich.console import Console

            from esper.kasmina.blueprints.table import blueprint_table

            Console(file=sys.stdout, width=WIDE).print(blueprint_table(given.dim, given.positions))
            return 0
        if given.command == "requeue":
            from esper.launcher.slurm import requeue

            requeued, line = requeue(given.run.absolute())
            print(f"esper: {line}", flush=True)
            return 0 if requeued else Preempted.exit_code
        if given.command in USING:
            return USING[given.command](given)
        if given.command in LOOKING:
            return LOOKING[given.command](given)
        if given.command == "compare":
            return _compare(given)
        if given.command == "export":
            from esper.run.export import export_run

            to = given.to and given.to.absolute()
            how = {"fold": not given.no_fold, "partial": given.partial, "averaged": given.ema}
            how |= {"trusted": given.trust, "as_native": given.native, "to_wandb": given.wandb}
            print(export_run(given.run.absolute(), given.at, to, **how))
            return 0
        from esper.launcher.resume import resume

        breaker = given.breaker and BreakerPhase(given.breaker)
        interrupt_on_stop()
        try:
            new = given.new and given.new.absolute()
            run, trusted = given.run.absolute(), given.trust
            results.append(resume(run, given.at, new, breaker, given.changes, trusted=trusted, ahead=ahead))
        except KeyboardInterrupt:
            results.append(LaunchResult(Preempted.exit_code, "interrupted before the run had started"))
    show_result(results[0])
    return results[0].code


if __name__ == "__main__":
    sys.exit(main())
