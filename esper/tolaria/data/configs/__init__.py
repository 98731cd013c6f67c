"""Settings of the built-in data sets, and their places in the registry. Nothing here needs torch.

So the launcher can compose and read a run's settings without it; a loader is imported when it first loads.
"""

from esper.leyline.imports import call_later
from esper.tolaria.data.configs.hf import HFDataConfig
from esper.tolaria.data.configs.images import Augment, Cifar10Config, DigitsConfig, ImagesConfig
from esper.tolaria.data.configs.own import CustomDataConfig, TableConfig, Target
from esper.tolaria.data.configs.text import PySourceConfig, RecallConfig, TextCluster, TextConfig, TokensConfig
from esper.tolaria.data.phases.config import DigitsPhasesConfig, TextPhasesConfig
from esper.tolaria.data.registry import register

__all__ = [
    "Augment",
    "Cifar10Config",
    "CustomDataConfig",
    "DigitsConfig",
    "DigitsPhasesConfig",
    "HFDataConfig",
    "ImagesConfig",
    "PySourceConfig",
    "RecallConfig",
    "TableConfig",
    "Target",
    "TextCluster",
    "TextConfig",
    "TextPhasesConfig",
    "TokensConfig",
]

LOADERS = {
    DigitsConfig: "digits:load_digits",
    ImagesConfig: "images:load_images",
    Cifar10Config: "images:load_images",
    PySourceConfig: "corpus:load_pysource",
    TextConfig: "corpus:load_text",
    RecallConfig: "recall:load_recall",
    CustomDataConfig: "own.custom:load_custom",
    TableConfig: "own.table:load_table",
    TokensConfig: "own.tokens:load_tokens",
    HFDataConfig: "own.hf:load_hf",
    DigitsPhasesConfig: "phases.loading:load_digits_phases",
    TextPhasesConfig: "phases.loading:load_text_phases",
}
for _config_class, _loader in LOADERS.items():
    register(_config_class)(call_later(f"esper.tolaria.data.{_loader}"))
