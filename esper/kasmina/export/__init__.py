"""Export: a plain model that computes what a grown model computes, without a slot or a class of esper."""

from esper.kasmina.export.exporter import export
from esper.kasmina.export.writing import save_exported

__all__ = ["export", "save_exported"]
