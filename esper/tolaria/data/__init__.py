"""Data sets in four disjoint parts, and which sample is seen on which rank at which step.

Their settings come without torch; loaders and samplers are imported when they are first asked for.
"""

from typing import TYPE_CHECKING

from esper.leyline.imports import export_later
from esper.tolaria.data.configs import (
    Augment,
    Cifar10Config,
    CustomDataConfig,
    DigitsConfig,
    DigitsPhasesConfig,
    HFDataConfig,
    ImagesConfig,
    PySourceConfig,
    RecallConfig,
    TableConfig,
    TextConfig,
    TextPhasesConfig,
    TokensConfig,
)
from esper.tolaria.data.registry import DATASETS, DataConfig, data_config_class, register

if TYPE_CHECKING:
    from esper.tolaria.data.own.custom import Data
    from esper.tolaria.data.parts import Bundle, Part, load_data
    from esper.tolaria.data.sampler import BatchPlan, draw, eval_shards, microbatches, shard

__all__ = [
    "DATASETS",
    "Augment",
    "BatchPlan",
    "Bundle",
    "Cifar10Config",
    "CustomDataConfig",
    "Data",
    "DataConfig",
    "DigitsConfig",
    "DigitsPhasesConfig",
    "HFDataConfig",
    "ImagesConfig",
    "Part",
    "PySourceConfig",
    "RecallConfig",
    "TableConfig",
    "TextConfig",
    "TextPhasesConfig",
    "TokensConfig",
    "data_config_class",
    "draw",
    "eval_shards",
    "load_data",
    "microbatches",
    "register",
    "shard",
]
__getattr__ = export_later(
    __name__,
    {"Data": "own.custom"}
    | dict.fromkeys(("Bundle", "Part", "load_data"), "parts")
    | dict.fromkeys(("BatchPlan", "draw", "eval_shards", "microbatches", "shard"), "sampler"),
)
