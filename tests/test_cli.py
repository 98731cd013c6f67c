"""The command ``esper`` where it starts no run; resume and undo are in ``tests/e2e``."""

import re
import sys
from pathlib import Path

import pytest
import torch

from esper import cli
from esper.kasmina import blueprints
from esper.kasmina.blueprints import registry
from esper.kasmina.blueprints.flex import attention_backend
from esper.leyline.topology import Topology
from tests.kasmina.blueprints.test_blueprints import PLUGIN, install

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[tuple[str, str], list[str]]:
    """Cells after topology and name of every row that `esper blueprints` prints."""
    assert cli.main(["blueprints", *arguments]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    table, *below = re.split(r"(?=\nflex_attention: )", told.out)
    assert len(below) == (attention_backend(DEVICE, torch.float32).why != ""), "a fallback is said, with its reason"
    head, *rows = [line for line in table.splitlines() if re.search(r"\w", line)]
    assert head.split() == ["topology", "name", "arguments", "backend", "version", "parameters", "FLOPs"]
    cells = [re.split(r"  +", row.strip()) for row in rows]
    found = {(first, second): rest for first, second, *rest in cells}
    assert len(found) == len(cells)
    return found


def test_the_catalogue_shows_every_blueprint_with_its_size_at_the_asked_slot(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = listed(capsys, "--dim", "32", "--positions", "100")
    assert set(found) == {(topology.value, name) for topology in Topology for name in blueprints.names(topology)}
    for (place, name), cells in found.items():
        topology = Topology(place)
        entry = blueprints.get(topology, name)
        size = entry.info(32, 1 if topology is Topology.VECTOR else 100)
        arguments = [" ".join(f"{key}={value}" for key, value in entry.arguments.items())] if entry.arguments else []
        chosen = [attention_backend(DEVICE, torch.float32).name] if name == "flex_attention" else []
        assert cells == [*arguments, *chosen, "1", f"{size.parameters:,}", f"{size.flops:,}"]
    assert found["BTC", "lora_large"] == ["rank=32", "1", "2,080", "409,600"], "4 x 100 x 32 x 32"
    assert found["BC", "norm"] == ["1", "96", "0"]


def test_large_numbers_are_whole_and_what_does_not_fit_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert listed(capsys, "--dim", "16384", "--positions", "65536")["BTC", "mlp"][-1] == "281,474,976,710,656"
    small = listed(capsys, "--dim", "1")
    assert small["BTC", "norm"] == ["1", "not at 1"]
    assert small["BTC", "noop"] == ["1", "0", "0"]


def test_plugins_are_in_the_catalogue_and_a_broken_one_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "esper_test_listed", PLUGIN.format(name="theirs"))
    try:
        assert listed(capsys)["BC", "theirs"] == ["1", "64", "0"]
    finally:
        sys.modules.pop("esper_test_listed", None)
    install(tmp_path, "esper_test_unlisted", "import no_such_module_of_ours")
    assert cli.main(["blueprints"]) == 78
    told = capsys.readouterr()
    assert told.out == ""
    assert re.search("config: .*esper_test_unlisted.*no_such_module_of_ours", told.err)


@pytest.mark.parametrize("wrong", [("--dim", "0"), ("--positions", "-3"), ("--dim", "wide"), ("norm",)])
def test_sizes_that_are_no_counts_are_refused(wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["blueprints", *wrong])
    assert caught.value.code == 2
    assert wrong[-1] in capsys.readouterr().err
