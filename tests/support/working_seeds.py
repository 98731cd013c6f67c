"""Puts a working seed into every slot of a model, and runs scripts in a process that has no esper."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from esper.kasmina.births.build import birth_key, build_gate, build_seed, gate_key
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Operator
from esper.leyline.topology import Topology
from tests.support.patience import run_patiently

USUAL = {Topology.FEATURE_MAP: "conv_light", Topology.SEQUENCE: "mlp_small", Topology.VECTOR: "mlp"}
BLOCKED = "import sys; sys.modules['esper'] = None\n"  # an import of it fails from here on


def born(grown: Grown, slot: str, blueprint: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A seed of the blueprint for a slot."""
    site = grown.sites[slot]
    name = blueprint or USUAL[site.topology]
    return build_seed(name, dim=site.dim, topology=site.topology, key=birth_key(1, slot, 1), dtype=dtype, device="cpu")


def set_to_work(
    grown: Grown, slot: str, seed: nn.Module, alpha: float = 1.0, operator: Operator = Operator.ADD
) -> None:
    """Plants a seed that takes part in the forward; CHANNEL gets a vector, GATE a gate."""
    holder, site = grown.slots[slot], grown.sites[slot]
    holder.plant(seed)
    holder.phase, holder.operator = Phase.BLEND, operator
    if operator is Operator.CHANNEL:
        holder.set_channels([index / site.dim for index in range(site.dim)])
    if operator is Operator.GATE:
        dtype = next((p.dtype for p in seed.parameters()), torch.float32)
        key = gate_key(1, slot, 1, 0)
        holder.gate = build_gate(dim=site.dim, topology=site.topology, key=key, dtype=dtype, device="cpu")
    holder.set_alpha(alpha)


def grow_all(grown: Grown, alpha: float = 1.0, blueprints: Mapping[str, str] | None = None) -> Grown:
    """A seed at work in every slot."""
    for slot in grown.slots:
        set_to_work(grown, slot, born(grown, slot, (blueprints or {}).get(slot)), alpha)
    return grown


def without_esper(script: str, folder: Path) -> str:
    """Runs a script in a process where `import esper` fails; what it printed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [sys.executable, "-I", "-W", "ignore", "-c", BLOCKED + script]
    done = run_patiently(words, cwd=folder, env=kept | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout
