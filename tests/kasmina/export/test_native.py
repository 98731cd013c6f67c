"""A native model: what grew by copies comes back as the host's own class with more blocks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from esper.kasmina.attach import attach
from esper.kasmina.export.exporter import export
from esper.kasmina.export.native import native, save_native
from esper.kasmina.slots.slot import Phase
from esper.leyline.errors import ConfigError
from tests.kasmina.blocks.test_copies import plant
from tests.support.bitwise import bits
from tests.support.block_hosts import block_host
from tests.support.dist import ROOT
from tests.support.working_seeds import born


@pytest.mark.parametrize("kind", ["stack", "gpt2", "llama", "vit", "resnet"])
def test_it_is_the_hosts_own_class_with_more_blocks(kind: str) -> None:
    host = block_host(kind)
    length = len(host.model.get_submodule(host.blocks))
    grown = attach(host.model, host.sites, host.example)
    for slot in grown.slots:
        plant(grown, slot, alpha=1.0)
    made = native(grown)
    blocks = made.module.get_submodule(host.blocks)
    assert len(blocks) == length + len(grown.slots)
    assert type(made.module) is type(grown.model)
    assert bits(host.output(made.module), host.output(grown.model.eval()))
    assert not any(type(module).__module__.startswith("esper") for module in made.module.modules())
    assert not any("esper" in key for key in made.module.state_dict())
    numbers = [{m.layer_idx for m in b.modules() if isinstance(getattr(m, "layer_idx", None), int)} for b in blocks]
    assert not any(numbers) or numbers == [{index} for index in range(len(blocks))]


READ = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
assert "esper" not in sys.modules
folder, tokens = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder).eval()
assert "esper" not in sys.modules
with torch.no_grad():
    torch.save({
        "logits": model(tokens).logits,
        "said": model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None),
    }, sys.argv[3])
"""


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_plain_transformers_loads_it_in_a_process_without_esper(kind: str, tmp_path: Path) -> None:
    host = block_host(kind)
    grown = attach(host.model, host.sites, host.example)
    for slot in grown.slots:
        plant(grown, slot, alpha=1.0)
    folder = save_native(native(grown), tmp_path / "native")
    tokens = host.example["input_ids"]
    out = tmp_path / "out.pt"
    words = [sys.executable, "-c", READ, str(folder), json.dumps(tokens.tolist()), str(out)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env={"PATH": "", "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-1500:]
    found = torch.load(out)
    with torch.no_grad():
        assert bits(found["logits"], grown.model.eval()(tokens).logits)
        said = grown.model.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(found["said"], said)


def test_what_cannot_be_native_says_which_seed_and_why() -> None:
    host = block_host("gpt2")
    grown = attach(host.model, host.sites, host.example)
    assert native(grown).places == {}, "what has not grown is the host"
    plant(grown, "r0c0", alpha=0.5)
    with pytest.raises(ConfigError, match=r"slot r0c0: its copy is at alpha 0\.5"):
        native(grown)
    grown.slots["r0c0"].set_alpha(1.0)
    other = grown.slots["r1c0"]
    other.plant(born(grown, "r1c0", "mlp_small"))
    other.phase = Phase.BLEND
    other.set_alpha(1.0)
    with pytest.raises(ConfigError, match="slot r1c0 holds a MLP, not a copy"):
        native(grown)
    other.set_alpha(0.0)
    assert list(native(grown).places) == ["r0c0"]
    assert (ROOT / "esper").is_dir()


class Plain(nn.Module):
    """A residual stack whose blocks take the feature alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_the_ordinary_export_takes_a_copy_that_is_called_with_the_feature_alone() -> None:
    torch.manual_seed(0)
    grown = attach(Plain().double().eval(), r"blocks\.\d", torch.randn(2, 5, 8, dtype=torch.float64), layout="BTC")
    plant(grown, "r0c0", alpha=1.0)
    exported = export(grown)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    assert exported.exact
    assert torch.equal(exported.module(x), grown.model.eval()(x))
    host = block_host("gpt2")
    other = attach(host.model, host.sites, host.example)
    plant(other, "r0c0", alpha=1.0)
    with pytest.raises(ConfigError, match="export --native makes it one more"):
        export(other)
