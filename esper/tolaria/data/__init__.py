"""Data sets in four disjoint parts, and which sample is seen on which rank at which step."""

from esper.tolaria.data.augment import Augment
from esper.tolaria.data.corpus import PySourceConfig, TextConfig
from esper.tolaria.data.digits import DigitsConfig
from esper.tolaria.data.images import Cifar10Config, ImagesConfig
from esper.tolaria.data.own.custom import CustomDataConfig, Data
from esper.tolaria.data.own.hf import HFDataConfig
from esper.tolaria.data.own.table import TableConfig
from esper.tolaria.data.own.tokens import TokensConfig
from esper.tolaria.data.parts import Bundle, Part
from esper.tolaria.data.phases import loading  # noqa: F401, it registers
from esper.tolaria.data.phases.config import DigitsPhasesConfig, TextPhasesConfig
from esper.tolaria.data.recall import RecallConfig
from esper.tolaria.data.registry import DATASETS, DataConfig, data_config_class, load_data, register
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
