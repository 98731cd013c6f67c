"""Models of the timm library, with random weights, where it imports."""

import copy

import pytest
import torch

from esper.kasmina.attach import attach
from esper.kasmina.export.exporter import export
from tests.support.bitwise import bits
from tests.support.working_seeds import grow_all

try:
    import timm
except Exception as error:  # a torchvision built for another torch fails with more than an ImportError
    pytest.skip(f"timm does not import here: {type(error).__name__}: {error}", allow_module_level=True)

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "pattern", "options"),
    [
        ("resnet10t", r"layer\d", {}),
        ("convnext_atto", r"stages\.\d", {}),
        ("vit_tiny_patch16_224", r"blocks\.\d+", {"img_size": 64, "depth": 3}),
    ],
)
def test_a_model_from_timm_grows_and_is_exported(name, pattern, options):
    torch.manual_seed(0)
    host = timm.create_model(name, num_classes=3, **options)
    grown = attach(copy.deepcopy(host), pattern, IMAGES)
    assert list(grown.model.state_dict()) == list(host.state_dict())
    assert len(grown.slots) >= 3
    assert grown.parameters_without_gradient(IMAGES) == []
    grow_all(grown)
    with torch.no_grad():
        with grown.disabled():
            assert bits(grown.model.eval()(IMAGES), host.eval()(IMAGES))
        assert not bits(grown.model(IMAGES), host(IMAGES))
        assert bits(export(grown, fold=False).module(IMAGES), grown.model(IMAGES))
