"""Measures how large a seed is at its birth, against the features at its site, and what that does to the loss.

    python launch/birth_size.py             # a minute on one core

For each host, site and blueprint: |delta| / |h| and the change of the loss at alpha 1, with a layer scale of 0.1 and
with one of a tenth of the features' root mean square (`esper.tolaria.growth.size`).
"""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import esper
from esper.kasmina.axes.feature import take
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.hosts import GPTConfig, ResNet20Config, build_host
from esper.kasmina.slots.phases import Phase
from esper.leyline.alpha import Operator
from esper.leyline.topology import Topology
from esper.tolaria.data.corpus import PySourceConfig, load_pysource
from esper.tolaria.growth.size import set_size

MEASURED = {
    Topology.FEATURE_MAP: ("norm", "attention", "conv_small", "conv_light", "conv_heavy"),
    Topology.SEQUENCE: ("norm", "lora", "attention", "mlp_small", "mlp"),
}


def _keep(outputs: list[Any], _module: nn.Module, _args: Any, output: Any) -> None:
    outputs.append(output)


@torch.no_grad()
def measure(name: str, model: nn.Module, sites: Mapping[str, str], x: Tensor, loss: Callable[[Any], Tensor]) -> None:
    """Prints a line for each site of one host.

    Args:
        name: of the host.
        model: the host, which gets slots.
        sites: slot id -> name of a module.
        x: a batch of its inputs.
        loss: output of the model -> loss, 0-D.
    """
    grown = esper.attach(model, dict(sites), x)
    model.eval()
    for slot, site in grown.sites.items():
        outputs: list[Any] = []
        handle = model.get_submodule(site.module).register_forward_hook(partial(_keep, outputs))
        before = loss(model(x)).item()
        handle.remove()
        h = site.turned(take(outputs[0], site.place))
        rms = h.square().mean().sqrt().item()
        columns = []
        for blueprint in MEASURED[site.topology]:
            pair = []
            for relative in (False, True):
                key = birth_key(1, slot, 1)
                seed = build_seed(
                    blueprint, dim=site.dim, topology=site.topology, key=key, dtype=torch.float32, device="cpu"
                )
                if relative:
                    set_size(seed, Operator.ADD, rms)
                holder = grown.slots[slot]
                holder.plant(seed)
                holder.phase = Phase.BLEND
                holder.set_alpha(1.0)
                change = loss(model(x)).item() - before
                pair.append(f"{(seed.eval()(h).norm() / h.norm()).item():.2f} ({change:+.3f})")
                holder.uproot()
            columns.append(f"{blueprint} {', '.join(pair)}")
        print(f"{name}, {site.module}: RMS {rms:.3g}; {'; '.join(columns)}", flush=True)


def language(tokens: Tensor) -> Callable[[Any], Tensor]:
    """The loss of the next byte."""

    def loss(output: Any) -> Tensor:
        logits = output if isinstance(output, Tensor) else output.logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return loss


def measure_gpts() -> None:
    """Our GPT, fresh and after 400 steps, and a fresh GPT-2 of transformers where that is installed."""
    data = load_pysource(PySourceConfig())
    tokens, _ = data.probe.fetch(torch.arange(64))
    for steps in (0, 400):
        torch.manual_seed(0)
        model = build_host(GPTConfig(layers=2, dim=64, sites=["block", "attention", "mlp"]), (64,), 256)
        optimizer, stream = torch.optim.AdamW(model.parameters(), 3e-3), torch.Generator().manual_seed(0)
        for _ in range(steps):
            x, _ = data.train.fetch(torch.randint(len(data.train), (16,), generator=stream))
            optimizer.zero_grad()
            language(x)(model(x)).backward()
            optimizer.step()
        sites = {point.slot: point.module for point in model.injection_points() if point.slot.startswith("r0")}  # type: ignore[operator]
        measure(f"GPT after {steps} steps", model, sites, tokens, language(tokens))
    try:
        import transformers
    except ImportError:
        return
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    sites = {"r0c0": "transformer.h.0", "r0c1": "transformer.h.0.attn"}
    measure("GPT-2 of transformers", transformers.GPT2LMHeadModel(config), sites, tokens, language(tokens))


def measure_resnet() -> None:
    """ResNet-20 after four epochs of digits."""
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, probe = order[:1200], order[1200:1392]
    torch.manual_seed(0)
    model = build_host(ResNet20Config(width=8), (1, 8, 8), 10)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(4):
        for chosen in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model.train()(x[chosen]), y[chosen]).backward()
            optimizer.step()
    sites = {f"r{stage}c0": f"stages.{stage}" for stage in range(3)}
    measure("ResNet-20", model, sites, x[probe], lambda output: F.cross_entropy(output, y[probe]))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    measure_gpts()
    measure_resnet()
