"""A table of a grown model's slots, for people."""

from rich.table import Table

from esper.kasmina.slots.grown import Grown


def status_table(grown: Grown) -> Table:
    """Returns a table with a line for each slot: site, layout, dim, phase, alpha in force, parameters of the seed."""
    table = Table(title=f"{type(grown.model).__name__}: {len(grown.slots)} slots")
    for column in ("slot", "site", "layout"):
        table.add_column(column, overflow="fold")
    table.add_column("dim", justify="right")
    table.add_column("phase")
    table.add_column("alpha", justify="right")
    table.add_column("parameters", justify="right")
    for slot, site in grown.sites.items():
        holder = grown.slots[slot]
        module = site.module if site.place is None else f"{site.module}[{site.place}]"
        phase, alpha, parameters = "empty", "-", "-"
        if holder.seed is not None:
            phase, parameters = holder.phase.value, f"{grown.seed_parameters(slot):,}"
            alpha = f"{holder.level:.3f}"
        if holder.seed is not None and holder.overridden is not None:
            phase, alpha = f"{phase} (override)", f"{holder.overridden:.3f}"
        table.add_row(slot, module, site.layout, str(site.dim), phase, alpha, parameters)
    return table
