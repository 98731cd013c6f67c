"""A rank whose agent died while it was importing does not train as an orphan."""

import ast
import os
import sys
from pathlib import Path

import pytest

from esper import worker
from esper.leyline.errors import EsperError
from esper.run import leaving, parent


def test_an_agent_that_died_during_the_imports_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[int] = []
    monkeypatch.setattr(parent, "_prctl", lambda option, value: asked.append(option))
    monkeypatch.setattr(worker, "PARENT", os.getppid() + 1)
    monkeypatch.setattr(worker, "run", lambda path: pytest.fail("it begins"))
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path / "config.yaml")])
    with pytest.raises(SystemExit) as ended:
        worker.main()
    assert ended.value.code == EsperError.exit_code
    assert len(asked) == 1


def test_the_parent_is_remembered_before_all_that_takes_time() -> None:
    source = ast.parse(Path(str(worker.__file__)).read_text())
    imports = [node for node in source.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    assert set(modules[: modules.index("esper.run.parent")]) <= {"esper.run.leaving"}
    for module in (leaving, parent):
        found = ast.parse(Path(str(module.__file__)).read_text()).body
        names = {node.names[0].name for node in found if isinstance(node, ast.Import)}
        names |= {str(node.module).split(".")[0] for node in found if isinstance(node, ast.ImportFrom)}
        assert names <= sys.stdlib_module_names
