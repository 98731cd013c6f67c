"""What a grown model computes, as a plain one: no slot, no class of esper."""

from esper.kasmina.export.exporter import export
from esper.kasmina.export.writing import save_exported

__all__ = ["export", "save_exported"]
