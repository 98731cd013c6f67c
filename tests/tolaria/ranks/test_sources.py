"""The sources of the user's own modules: which files belong together, and that more imports are no difference."""

import importlib
import sys
from pathlib import Path

import pytest

from esper.tolaria.ranks.sources import describe_sources, differing_names


def names(text: str) -> list[str]:
    return sorted(word.rpartition(":")[0] for word in text.split())


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "src_lab"
    (package / "deep").mkdir(parents=True)
    for name in ("__init__", "net", "parts", "unused", "deep/__init__", "deep/one"):
        (package / f"{name}.py").write_text(f"# {name}\n")
    (package / "net.py").write_text("import src_lab.parts, src_lab.deep.one, json\n")
    (tmp_path / "src_single.py").write_text("import src_beside\n")
    (tmp_path / "src_beside.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_package_is_described_by_the_modules_of_it_that_are_imported(lab: Path) -> None:
    importlib.import_module("src_lab.net")
    text = describe_sources(["src_lab.net"])
    assert names(text) == ["src_lab", "src_lab.deep", "src_lab.deep.one", "src_lab.net", "src_lab.parts"]
    (lab / "src_lab" / "parts.py").write_text("# other\n")
    assert differing_names([text, describe_sources(["src_lab.net"])]) == ["src_lab.parts"]


def test_a_single_file_is_described_with_what_it_imports_from_its_folder(lab: Path) -> None:
    importlib.import_module("src_single")
    assert names(describe_sources(["src_single"])) == ["src_beside", "src_single"]


def test_installed_modules_stand_for_themselves_and_esper_for_none() -> None:
    assert names(describe_sources(["json"]))[0].startswith("json")
    assert describe_sources(["esper.worker", "builtins", "no.such.module"]) == ""
    assert names(describe_sources(["typing_extensions"])) == ["typing_extensions"]


def test_a_rank_that_has_imported_more_does_not_differ(lab: Path) -> None:
    importlib.import_module("src_lab.net")
    less = describe_sources(["src_lab.net"])
    importlib.import_module("src_lab.unused")
    more = describe_sources(["src_lab.net"])
    assert less != more
    assert differing_names([f"d1 {less}", f"d1 {more}"]) == []
    assert differing_names([f"d1 {less}", f"d2 {more}"]) == [""]
