"""The house keeps its order: no circle, no crowded folder, no file that is two rooms, and each idea in one place."""

import ast
import graphlib
import re
import subprocess
from pathlib import Path

import pytest

import esper
from tests.support.dist import ROOT

HOUSE = ROOT / "esper"
# Longer than 300 lines, and still one thing.
ONE_THING = {"session/session.py": "the public class, most of it documentation"}


def files() -> dict[str, Path]:
    """Every source file by its module's name."""
    named = {}
    for path in sorted(HOUSE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        named[name.removesuffix(".__init__")] = path
    return named


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Modules of the house that a file imports at any depth of it, for type checkers alone too."""
    wanted = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            wanted |= {name if name in known else node.module for name in inner}
    return wanted & known


def test_no_file_is_in_a_circle() -> None:
    named = files()
    # The front door of the package is looked through by everybody and imports lazily.
    graph = {name: imports_of(path, set(named)) - {"esper", name} for name, path in named.items() if name != "esper"}
    graphlib.TopologicalSorter(graph).prepare()  # CycleError shows the circle


def test_a_circle_would_be_found(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from esper.cli import main\n")
    assert imports_of(source, {"esper.cli"}) == {"esper.cli"}


def test_no_folder_is_crowded() -> None:
    crowded = {str(d.relative_to(ROOT)): n for d in HOUSE.rglob("*") if (n := len(list(d.glob("*.py")))) > 18}
    assert crowded == {}
    assert sorted(path.stem for path in HOUSE.glob("*.py")) == ["__init__", "cli", "doctor", "worker"]


def test_no_file_is_two_rooms() -> None:
    lengths = {p.relative_to(HOUSE).as_posix(): len(p.read_text().splitlines()) for p in HOUSE.rglob("*.py")}
    assert {name: lines for name, lines in lengths.items() if lines > 300 and name not in ONE_THING} == {}


def places_of(pattern: str) -> set[str]:
    """Files of the house in which a pattern stands, outside comments."""
    code = re.compile(rf"^[^#\n]*{pattern}", re.MULTILINE)
    return {p.relative_to(HOUSE).as_posix() for p in HOUSE.rglob("*.py") if code.search(p.read_text())}


def test_each_idea_stands_in_one_place() -> None:
    assert places_of(r"random\.fork_rng\(|\bset_rng_state\(streams|random\.setstate\(") == {"kasmina/streams.py"}
    assert places_of(r"DistributedDataParallel\(") == {"tolaria/growth/wrapper.py"}
    assert places_of(r"(?<![\w.])Terms\(") == {"tolaria/growth/terms.py"}
    # events.jsonl is appended to, and the doctor tries a file system with the bare calls
    own = {"nissa/jsonl.py", "nissa/spill.py", "doctor.py", "launcher/folder_checks.py"}
    assert places_of(r"os\.fsync\(") <= {"leyline/files.py", *own}
    assert places_of("fmt: skip") == set()


def test_the_public_paths_import() -> None:
    from esper import cli, worker
    from esper.kasmina.attribution import attribute, blended, make_plan, readings
    from esper.kasmina.blueprints import blueprint
    from esper.kasmina.blueprints.parts import LayerScale
    from esper.kasmina.compiler import Compiler
    from esper.kasmina.export import export, save_exported
    from esper.leyline.commands import Command
    from esper.leyline.legality import legal_ops, why_refused
    from esper.leyline.stages import Op
    from esper.leyline.topology import Topology

    assert all(
        map(callable, (cli.main, worker.main, esper.attach, esper.Session, attribute, blended, make_plan, readings))
    )
    assert all(map(callable, (blueprint, LayerScale, Compiler, export, save_exported, Command, legal_ops, why_refused)))
    assert Op.GERMINATE in Op
    assert Topology.SEQUENCE in Topology


def test_scripts_keep_lf_in_a_clone_with_crlf(tmp_path: Path) -> None:
    """As Git for Windows clones; a CR would end up in each command of a shell script that runs under WSL."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    words = ["git", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", "clone", "-q", "--depth=1"]
    done = subprocess.run([*words, f"file://{ROOT}", str(tmp_path / "clone")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scripts = [*(tmp_path / "clone" / "launch").glob("*.sh"), *(tmp_path / "clone" / "slurm").iterdir()]
    assert len(scripts) > 4
    assert [path.name for path in scripts if b"\r" in path.read_bytes()] == []
