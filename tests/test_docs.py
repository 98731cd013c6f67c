"""README and pages say what is there: links, paths, names of modules, and every room in the map."""

import importlib
import re
from pathlib import Path

import pytest

from tests.support.dist import ROOT

PAGES = [ROOT / name for name in ("README.md", "BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "RESULTS.md")]
PAGES += [ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TREE = re.compile(r"(?<![\w/.-])(?:esper|tests|launch|slurm|conf|docs)/[\w./-]*[\w/]")
MODULE = re.compile(r"`(esper(?:\.[A-Za-z_]\w*)+)`")
GROUPS = {"esper.blueprints"}  # entry points are not modules
MADE = {"docs/configuration.md", "docs/events.md"}  # from the code, by a script; a checkout may be without them
OLD = {"esper/session_config.py", "esper.kasmina.coalitions.make_plan", "esper.kasmina.writing.save_exported"}


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def ids(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_relative_links_lead_to_a_file_and_its_heading(page):
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if ids(target.resolve()) in MADE and not target.exists():
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_paths_that_a_page_names_exist(page):
    named = set(TREE.findall(page.read_text(encoding="utf-8"))) - OLD - MADE
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            value = getattr(value, part, None)
        return value is not None
    return False


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_names_of_modules_that_a_page_names_exist(page):
    named = set(MODULE.findall(page.read_text(encoding="utf-8"))) - OLD - GROUPS
    assert not [name for name in sorted(named) if not exists(name)]


def test_the_readme_is_a_first_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def test_every_room_is_in_the_map():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    house = text.split("## The house\n")[1].split("\n## ")[0]
    rooms = sorted({path.parent.name for path in (ROOT / "esper").glob("*/*.py")})
    assert rooms
    assert not [room for room in rooms if f"`esper/{room}/`" not in house]


def test_every_page_is_in_the_index():
    index = set(LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not pages - index
