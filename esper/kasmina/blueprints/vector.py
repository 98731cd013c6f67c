"""Blueprints for vectors, x_BC -> delta_BC: sequence blueprints that look at one position at a time.

    name        delta (gamma is the layer scale)                                parameters at C = 64
    noop        0                                                                                  0
    norm        gamma LN(x)                                                                      192
    lora        gamma U D x                             rank 4, linear, foldable                 576
    mlp         gamma W2 gelu(W1 LN(x))                 4 C wide                              33,280

Their modules work on the last axis alone, which is C in both topologies, so they share classes, arguments and formulas
with `esper.kasmina.blueprints.sequence`; ``positions`` is 1.
"""

from esper.kasmina.blueprints import sequence  # noqa: F401, importing it registers the entries reused here
from esper.kasmina.blueprints.registry import blueprint, get
from esper.leyline.topology import Topology

for _name in ("noop", "norm", "lora", "mlp"):
    _entry = get(Topology.SEQUENCE, _name)
    blueprint(
        _name,
        topology=Topology.VECTOR,
        parameters=_entry.parameters,
        flops=_entry.flops,
        version=_entry.version,
        min_dim=_entry.min_dim,
        arguments=_entry.arguments,
    )(_entry.factory)
