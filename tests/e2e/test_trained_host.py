"""A trained GPT-2 grows by two blocks on two ranks, from settings alone, and plain transformers loads the result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esper.config.tree import load_config
from esper.kasmina.hosts import HFConfig
from esper.run.export import export_run
from esper.run.rebuild import rebuild_run
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data import load_data
from tests.kasmina.export.test_native import READ
from tests.support.killed_runs import live, prepare_run
from tests.support.tiny import act, schedule, tiny_plain

SHAPE = {"vocab_size": 256, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
GROWING = schedule(
    act(1, "r0c0", "GERMINATE", blueprint="copy", ticks=1),
    act(1, "r1c0", "GERMINATE", blueprint="copy", ticks=1),
    *(act(tick, slot, "ADVANCE") for tick in (3, 4, 6) for slot in ("r0c0", "r1c0")),
    *(act(7, slot, "FOSSILIZE") for slot in ("r0c0", "r1c0")),
)


@pytest.mark.slow
def test_a_trained_model_comes_back_deeper(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    common = {
        "trainer__steps": 20,
        "trainer__batch": 8,
        "checkpoint__every_ticks": 2,
        "slots__incubation": "immediate",
        "trainer__objective": "validation_loss",
    }
    first = prepare_run(tmp_path / "first", tiny_plain("gpt", host=HFConfig(path="gpt2", options=SHAPE), **common))
    assert live(first, 1) == [0]
    export_run(first, None, tmp_path / "trained", fold=True, partial=False, as_native=True)
    host = HFConfig(path=str(tmp_path / "trained"), weights=str(tmp_path / "trained"))
    plain = tiny_plain("gpt", host=host, controller=GROWING, slots__blocks=["copy"], **common)
    second = prepare_run(tmp_path / "second", plain)
    assert live(second, 2) == [0, 0]
    said = export_run(second, 20, tmp_path / "deeper", fold=True, partial=False, as_native=True)
    assert "model.transformer.h.3" in said
    record = json.loads((second / "result.json").read_text())["origin"]
    assert record["weights"] == str(tmp_path / "trained")

    config, _ = load_config(second / "config.yaml")
    grown, _, _ = rebuild_run(config, load_data(config.data), CheckpointStore.of_run(second), 20)
    tokens, out = torch.arange(12).view(2, 6), tmp_path / "out.pt"
    words = [sys.executable, "-c", READ, str(tmp_path / "deeper"), json.dumps(tokens.tolist()), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={"HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-1500:]
    found = torch.load(out)
    with torch.no_grad():
        assert torch.equal(found["logits"], grown.model.eval()(tokens))
        inner = grown.model.model
        more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": False}
        assert found["said"].shape == (2, 12)
        assert torch.equal(found["said"], inner.generate(tokens, **more))
