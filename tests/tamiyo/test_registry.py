"""Kinds, their config classes, and controllers by dotted path."""

import pytest
from omegaconf import OmegaConf

from esper.leyline.errors import ConfigError, EsperError
from esper.leyline.protocols import Controller
from esper.leyline.stages import Stage
from esper.tamiyo import build_controller, controller_config_class, controller_kinds
from esper.tamiyo.custom import CustomConfig
from esper.tamiyo.none import NoneConfig
from esper.tamiyo.random import RandomConfig
from esper.tamiyo.registry import register
from tests.support.observations import World, observe, slot_view

BUILT_IN = ("heuristic", "none", "random", "schedule")


class Lazy:
    """Satisfies the protocol; waits, and remembers what it was given."""

    name = "lazy"

    def __init__(self, *, slots, seed, nap):
        self.given = (slots, seed, nap)

    def decide(self, observation):
        return []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Deaf:
    """Takes the arguments, is no controller."""

    def __init__(self, **given):
        self.given = given

    def decide(self, observation):
        return []


def custom(name, **options):
    return CustomConfig(path=f"{__name__}:{name}", options=options)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_each_kind_builds_from_its_defaults_and_satisfies_the_protocol(kind):
    controller = build_controller(controller_config_class(kind)(), slots=("r1c0", "r0c0"), seed=3)
    assert isinstance(controller, Controller)
    assert controller.name == kind
    controller.load_state_dict(controller.state_dict())
    assert controller.decide(observe(slot_view("r0c0"), slot_view("r1c0"), tick=0)) == []


@pytest.mark.parametrize("kind", controller_kinds())
def test_config_classes_compose_with_omegaconf(kind):
    cls = controller_config_class(kind)
    node = OmegaConf.structured(cls)
    if kind == "custom":
        node.path = "a.b:C"
    merged = OmegaConf.to_object(OmegaConf.merge(node, OmegaConf.create(OmegaConf.to_yaml(node))))
    assert type(merged) is cls
    assert merged == OmegaConf.to_object(node)
    assert merged.kind == kind


def test_an_unknown_kind_lists_the_names():
    for ask in (lambda: controller_config_class("clever"), lambda: build_controller(object(), slots=(), seed=0)):
        with pytest.raises(ConfigError, match="custom, heuristic, none, policy, random, schedule"):
            ask()


def test_a_config_of_another_kind_is_refused():
    with pytest.raises(ConfigError, match="needs a RandomConfig, got NoneConfig"):
        build_controller(NoneConfig(kind="random"), slots=("r0c0",), seed=0)


def test_a_kind_is_registered_once():
    with pytest.raises(ConfigError, match="registered twice"):
        register("random", RandomConfig)(lambda config, *, slots, seed: None)


@pytest.mark.parametrize("kind", BUILT_IN)
def test_an_observation_of_another_version_or_other_slots_is_an_error(kind):
    controller = build_controller(controller_config_class(kind)(), slots=("r0c0",), seed=0)
    with pytest.raises(EsperError, match="version 99: controllers here read version 6"):
        controller.decide(observe(slot_view("r0c0"), version=99))
    with pytest.raises(EsperError, match="slots r0c1: the controller was built for r0c0"):
        controller.decide(observe(slot_view("r0c1")))


@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_foreign_state_is_an_error_that_names_the_key(kind):
    controller = build_controller(controller_config_class(kind)(), slots=("r0c0",), seed=0)
    with pytest.raises(ValueError, match="surprise"):
        controller.load_state_dict(controller.state_dict() | {"surprise": 1})


def test_a_custom_controller_gets_slots_seed_and_options():
    controller = build_controller(custom("Lazy", nap=2), slots=("r1c0", "r0c0"), seed=7)
    assert type(controller).__name__ == "Lazy"
    assert controller.given == (("r0c0", "r1c0"), 7, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CustomConfig(path="no_such_package.x:Y"), "cannot import no_such_package.x .*PYTHONPATH"),
        (custom("Lasy", nap=2), "has no Lasy; it has .*Lazy"),
        (custom("Lazy", nap=2, dream=1), "must take slots.*dream"),
        (custom("Lazy"), "must take slots.*nap"),
        (custom("Deaf"), "Deaf is no Controller; it lacks state_dict, load_state_dict, name"),
        (custom("BUILT_IN"), "must take slots"),
    ],
)
def test_what_is_wrong_with_a_custom_controller_is_said(config, message):
    with pytest.raises(ConfigError, match=message):
        build_controller(config, slots=("r0c0",), seed=0)


@pytest.mark.parametrize("path", ["", "package.module.Class", ":Class", "package:not a name"])
def test_a_custom_path_has_one_form(path):
    with pytest.raises(ConfigError, match=r"write package\.module:Class"):
        CustomConfig(path=path)


def test_custom_options_do_not_override_the_run():
    with pytest.raises(ConfigError, match="given by the run"):
        CustomConfig(path="a:B", options={"seed": 3})


def test_none_never_asks_for_anything():
    world = World(("r0c0", "r1c0"), worth=lambda slot, name: 1.0)
    assert world.run(build_controller(NoneConfig(), slots=("r0c0", "r1c0"), seed=0), 50) == []
    assert world.history == {"r0c0": [Stage.EMPTY], "r1c0": [Stage.EMPTY]}
