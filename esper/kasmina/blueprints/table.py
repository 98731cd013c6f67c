"""The table of registered blueprints, for people."""

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from esper.kasmina import blueprints
from esper.leyline.topology import Topology


def blueprint_table(dim: int, positions: int) -> Table:
    """Returns a table of every registered blueprint, plugins included, with what it would add to a slot.

    Args:
        dim: channels of the slot's features; the row of a blueprint that cannot serve them says so.
        positions: positions of a feature map or a sequence (H*W, T); a vector has one.

    Raises:
        ConfigError: a plugin cannot be imported, or its blueprints are refused.
    """
    blueprints.load_plugins()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for title in ("topology", "name", "arguments", "backend"):
        table.add_column(title, no_wrap=True)
    for title in ("version", "parameters", "FLOPs"):
        table.add_column(title, justify="right", no_wrap=True)
    for topology in Topology:
        table.add_section()
        places = 1 if topology is Topology.VECTOR else positions
        for name in blueprints.names(topology):
            entry = blueprints.get(topology, name)
            arguments = " ".join(f"{key}={value}" for key, value in entry.arguments.items())
            size = entry.info_or_none(dim, places)
            sizes = (f"{size.parameters:,}", f"{size.flops:,}") if size else (f"not at {dim}", "")
            backend = entry.backend(device, torch.float32) if entry.backend else None
            if backend is not None and backend.why:
                table.caption = f"{name}: {backend.name} on this machine's {device.type}, since {backend.why}"
            named = Text(backend.name if backend else "")
            table.add_row(topology.value, name, Text(arguments), named, str(entry.version), *sizes)
    return table
