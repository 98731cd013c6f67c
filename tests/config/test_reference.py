"""The page of settings is what its command prints, and every setting of every config class says what it means."""

import dataclasses

import pytest

from esper.compare.arms import Arm, CompareConfig
from esper.config import reference
from esper.config.tree import EsperConfig, config_classes
from esper.leyline.fields import class_doc, field_docs
from esper.leyline.files import package_folder
from esper.nissa.config import WandbConfig
from esper.session.config import SessionConfig

CLASSES = [*config_classes(), EsperConfig, WandbConfig, SessionConfig, Arm, CompareConfig]


def test_the_committed_page_is_what_the_command_prints() -> None:
    committed = (package_folder().parent / "docs" / "configuration.md").read_text()
    assert committed == reference.page(), "python -m esper.config.reference > docs/configuration.md"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_setting_has_a_docstring(cls: type) -> None:
    assert class_doc(cls)
    docs = field_docs(cls)
    assert [field.name for field in dataclasses.fields(cls) if not docs.get(field.name)] == []


def test_every_setting_stands_on_the_page_with_its_default() -> None:
    page = reference.page()
    for cls in config_classes():
        for field in dataclasses.fields(cls):
            assert f"| `{field.name}` |" in page or field.name in ("wandb", "health"), (cls.__name__, field.name)
    assert "| `wandb.mode` | one of offline, online, disabled or null | `null` |" in page
    assert "- `optim=adamw` (unless you choose another)" in page
    assert "- `optim=sgd`: Sets `optim.lr=0.05`." in page
