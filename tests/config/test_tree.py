"""Every setting in one tree: conf and the dataclasses name the same keys, and every problem is told at once."""

import copy
import dataclasses
import itertools
import stat
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from esper.config.digest import (
    changeable_settings,
    config_digest,
    differences,
    lasting_digest,
    length_problem,
    same_length,
)
from esper.config.strict import Reader, as_plain, defaults_of
from esper.config.tree import (
    FIXED_SECTIONS,
    KINDS,
    Resume,
    build_config,
    config_classes,
    cross_check,
    load_config,
    write_config,
)
from esper.launcher.compose import conf_folder, plain_of
from esper.leyline.errors import ConfigError
from esper.tolaria.data import CustomDataConfig

CONF = conf_folder()


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = compose("config", overrides=["run.dir=/tmp/run", *overrides])
    for key in OmegaConf.missing_keys(tree):  # the user's to set
        OmegaConf.update(tree, key, "set")
    plain = plain_of(tree)
    plain.pop("launch")
    return plain


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def default() -> dict[str, Any]:
    return composed()


def problems(plain: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        build_config(plain)
    return list(caught.value.problems)


def keys(cls: type) -> dict[str, Any]:
    """Field names, nested dataclasses opened."""
    hints = typing.get_type_hints(cls)
    return {
        field.name: keys(hints[field.name]) if dataclasses.is_dataclass(hints[field.name]) else None
        for field in dataclasses.fields(cls)
    }


def shape(plain: Any, like: Any) -> Any:
    return {key: shape(plain[key], like.get(key)) for key in plain} if isinstance(like, dict) else None


# ---------------------------------------------------------------- conf and the dataclasses

CHOICES = [f"{group}={option}" for group in (*KINDS, *FIXED_SECTIONS) if group != "run" for option in options(group)]


@pytest.fixture(scope="module")
def sections() -> dict[str, Any]:
    """The section of each choice; one tree has a choice of every group that has so many."""
    by_group = [[choice for choice in CHOICES if choice.startswith(f"{group}=")] for group in (*KINDS, *FIXED_SECTIONS)]
    found: dict[str, Any] = {}
    for choices in itertools.zip_longest(*by_group):
        plain = composed(*filter(None, choices))
        found |= {choice: plain[choice.split("=")[0]] for choice in choices if choice}
    return found


@pytest.mark.parametrize("choice", CHOICES)
def test_every_group_option_names_every_field_and_no_other(choice: str, sections: dict[str, Any]) -> None:
    group, section = choice.split("=")[0], sections[choice]
    cls = FIXED_SECTIONS.get(group) or KINDS[group][0](section["kind"])
    wanted = keys(cls)
    assert shape(section, wanted) == wanted


@pytest.mark.parametrize("group", KINDS)
def test_every_registered_kind_has_a_group_option(group: str) -> None:
    assert set(KINDS[group][1]()) <= set(options(group))


@pytest.mark.parametrize("choice", CHOICES)
def test_a_file_of_a_group_holds_nothing_that_is_the_default_of_its_class(choice: str) -> None:
    group, option = choice.split("=")
    own = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
    first = own.pop("defaults")[0]
    if first.startswith("/"):  # others add to another option of their group
        (cls,) = {cls for cls in config_classes() if cls.__name__ == first[1:].split("@")[0].split("_needs_")[0]}
        own.pop("kind", None)  # says what the file is about
        defaults = defaults_of(cls)
        assert [key for key, value in own.items() if value == defaults[key]] == []


@pytest.mark.parametrize("name", [name for name in FIXED_SECTIONS if name not in ("run", "telemetry")])
def test_values_of_default_options_are_those_of_the_classes(name: str, default: dict[str, Any]) -> None:
    assert default[name] == as_plain(FIXED_SECTIONS[name]())


def test_classes_that_hydra_knows_have_a_name_each() -> None:
    names = [cls.__name__ for cls in config_classes()]
    assert len(names) == len(set(names))


def test_a_config_that_is_read_back_gets_no_default_for_a_missing_setting(default: dict[str, Any]) -> None:
    sections = (*KINDS, *FIXED_SECTIONS)
    plain = {**default, **{name: {} for name in FIXED_SECTIONS}}
    plain |= {name: {"kind": default[name]["kind"]} for name in KINDS}
    missing = {line.partition(":")[0] for line in problems(plain)}
    wanted = {f"{name}.{key}" for name in sections for key in default[name] if key != "kind" or name not in KINDS}
    assert missing == wanted


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_experiment_is_sound(experiment: str) -> None:
    assert build_config(composed(f"experiment={experiment}")).seed == 1


def test_config_returns_to_the_same_plain_data(default: dict[str, Any]) -> None:
    assert as_plain(build_config(default)) == default


# ---------------------------------------------------------------- what is refused

BAD = [
    ("optim.lr", -1.0, "optim.lr = -1.0: must be > 0; for example optim.lr=0.001"),
    ("optim.lr", "fast", "optim.lr = 'fast': expected a finite number; for example optim.lr=0.001"),
    ("optim.lr", float("nan"), "expected a finite number"),
    ("optim.kind", "adam", "optim.kind = 'adam': expected one of sgd, adamw; for example optim.kind=adamw"),
    ("optim.kind", "ADAMW", "expected one of sgd, adamw"),
    ("trainer.epochs", 2.5, "trainer.epochs = 2.5: expected a whole number; for example trainer.epochs=100"),
    ("trainer.epochs", True, "trainer.epochs = True: expected a whole number"),
    ("trainer.deterministic", 1, "trainer.deterministic = 1: expected true or false"),
    ("run.name", 12, "run.name = 12: expected text or null; for example run.name=\"'12'\""),
    ("seed", -1, "seed = -1: expected a whole number"),
    ("optim.lrr", 1, "optim.lrr = 1: no such setting; did you mean optim.lr?"),
    ("telemetry.wandb.zzz", 1, "telemetry.wandb.zzz = 1: no such setting; telemetry.wandb has mode"),
    ("extra", {}, "extra = {}: no such section; sections are seed, host"),
    ("host.kind", "resnet", "host.kind = 'resnet': unknown; known are cnn, "),
    ("slots.ids", ["early"], "slots.ids = ['early']: slot 'early': not a slot id; this host has r0c0, r0c1, r1c0"),
    ("slots.ids", ["r00c1"], "slot 'r00c1': not a slot id"),
    ("slots.ids", ["r0c0", "r0c0"], "slot r0c0: named twice"),
    ("slots.ids", ["r7c0"], "slots.ids = ['r7c0']: r7c0 is no slot of this host, which has r0c0, r0c1, r1c0"),
    ("slots.channels", {"r0c0": "1,2"}, "slots.channels = {r0c0: ...}: channel 1 is '2', must be a number in [0, 1]"),
    ("slots.channels", {"r7c0": "1"}, "slots.channels = {r7c0: ...}: r7c0 is no slot in use"),
    ("slots.incubation", "shade", "expected one of shadow, ste, immediate; for example slots.incubation=immediate"),
    ("trainer.batch", 1, "trainer.batch = 1: fewer samples than the 2 ranks that share them; set trainer.batch=2"),
    ("data.probe", 20, "data.probe: 20 samples in 20 clusters are too few for any seed ever to pass G5; it needs 30"),
    ("controller.blueprints", ["conv_huge"], "controller.blueprints = 'conv_huge': no blueprint for the slots in use"),
    ("controller.curve", "round", "expected one of linear, cosine, sigmoid; for example controller.curve=cosine"),
    ("library.wait_s", 0, "library.wait_s = 0"),
    ("library.memory_mib", -1, "library.memory_mib = -1: MiB, must be >= 0"),
    ("host", 3, "host.kind = None: unknown"),
    ("optim", [], "optim = []: expected a section of settings"),
]


def put(plain: dict[str, Any], path: str, value: Any) -> None:
    *sections, key = path.split(".")
    for section in sections:
        plain = plain[section]
    plain[key] = value


@pytest.mark.parametrize(("path", "value", "text"), BAD, ids=[f"{path}={value}" for path, value, _ in BAD])
def test_a_bad_value_gives_one_line_that_says_where_what_and_how_to_fix_it(
    default: dict[str, Any], path: str, value: Any, text: str
) -> None:
    plain = copy.deepcopy(default)
    put(plain, path, value)
    (line,) = problems(plain)
    assert text in line
    assert "\n" not in line


def test_all_problems_of_all_sections_come_together(default: dict[str, Any]) -> None:
    plain = copy.deepcopy(default)
    for path, value in (("optim.lr", -1.0), ("slots.ids", ["early"]), ("trainer.batch", 1), ("run.resume", "maybe")):
        put(plain, path, value)
    del plain["gates"]["look_every"], plain["world"]["threads"]
    del plain["checkpoint"]
    starts = ("optim.lr", "slots.ids", "trainer.batch", "run.resume", "gates.look_every", "world.threads", "checkpoint")
    found = problems(plain)
    for start in starts[:2] + starts[3:]:
        assert [line for line in found if line.startswith(start)], (start, found)
    assert not [line for line in found if line.startswith("trainer.batch")]  # world is broken, so nobody can tell
    put(plain, "world.threads", 1)
    assert [line for line in problems(plain) if line.startswith("trainer.batch")]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (("host=gpt",), "host.kind = 'gpt': needs sequences of shape (T,), the data has (1, 8, 8); set host=cnn"),
        (("data=pysource",), "host.kind = 'cnn': needs images of shape (C, H, W), the data has (64,); set host=gpt"),
        (
            ("host=gpt", "data=pysource", "data.block=128"),
            "host.block = 64: shorter than data.block = 128; set host.block=128, or data.block=64",
        ),
        (("host=resnet20", "data=pysource"), "needs images of shape (C, H, W), the data has (64,); set host=gpt"),
        (
            ("host=gpt", "data=pysource", "host.sites=[heads]"),
            "host.sites = ['heads']: one or more of block, attention",
        ),
        (("host.widths=[2,2,2,2,2]",), "4 halvings need images of at least 16 pixels a side"),
        (
            ("library.enabled=true", "library.wait_s=31"),
            "library.wait_s = 31: the other ranks would give this one up after control.timeout_s = 60; set "
            "library.wait_s=30 or less",
        ),
        (("trainer.batch=3", "trainer.accumulate=2"), "the 2 ranks x trainer.accumulate = 2 that share them"),
        (("trainer.steps=50", "optim.warmup_steps=50"), "would end in warm-up; set optim.warmup_steps=5"),
        (
            ("controller=schedule", "controller.actions=[{tick:1,slot:r0c0,op:GERMINATE,blueprint:conv_huge}]"),
            "controller.actions[0].blueprint = 'conv_huge': no blueprint for the slots in use",
        ),
        (("controller=schedule", "controller.actions=[{tick:1,slot:early,op:PRUNE}]"), "slot 'early': not a slot id"),
        (
            ("host=custom", "host.path=tests.kasmina.hosts.test_custom:large", "host.sites={r0c0: '0'}"),
            "test_custom has no large; it has",
        ),
        (("world.find_unused=true", "slots.incubation=shadow"), "does not go with slots.incubation = shadow"),
        (
            (
                "host=custom",
                "host.path=tests.kasmina.hosts.test_custom:small",
                "host.sites={r0c0: '0'}",
                "host.may_skip=[r0c0]",
                "trainer.compile=true",
            ),
            "trainer.compile = true: what runs where a site is left out",
        ),
        (("world.nnodes=2",), "world.rdzv_endpoint = None: needed when world.nnodes > 1"),
    ],
)
def test_impossible_combinations(overrides: tuple[str, ...], text: str) -> None:
    assert any(text in line for line in problems(composed(*overrides)))


def test_a_host_of_the_users_own_has_the_slots_that_its_sites_name() -> None:
    own = ("host=custom", "host.path=tests.kasmina.hosts.test_custom:small", "host.sites={r0c0: layer1, r3c0: layer2}")
    assert build_config(composed(*own, "slots.ids=[r3c0]")).slots.ids == ["r3c0"]
    (line,) = problems(composed(*own, "slots.ids=[r1c0]"))
    assert "r1c0 is no slot of this host, which has r0c0, r3c0" in line


def test_the_slots_of_a_gpt_are_those_of_its_sites() -> None:
    chosen = ("host=gpt", "data=pysource", "host.sites=[attention,mlp]")
    assert build_config(composed(*chosen, "slots.ids=[r0c1,r1c2]")).host.sites == ["attention", "mlp"]
    (line,) = problems(composed(*chosen, "slots.ids=[r0c0]"))
    assert "r0c0 is no slot of this host, which has r0c1, r0c2, r1c1, r1c2" in line


def test_a_sound_config_made_unsound_is_found_by_cross_check(default: dict[str, Any]) -> None:
    config = build_config(default)
    assert cross_check(config) == []
    config.trainer.batch = 1
    config.slots.ids = ["r9c0"]
    assert [line.split(" ")[0] for line in cross_check(config)] == ["trainer.batch", "slots.ids"]


# ---------------------------------------------------------------- digest, differences, file


def test_digest_changes_with_what_is_computed_and_with_nothing_else(default: dict[str, Any]) -> None:
    before = config_digest(default)
    assert 0 <= before < 2**62
    for path, value in (
        ("run.dir", "/elsewhere"),
        ("run.resume", "must"),
        ("telemetry.console", "off"),
        ("world.rdzv_id", "job7"),
        ("control.timeout_s", 5.0),
    ):
        moved = copy.deepcopy(default)
        put(moved, path, value)
        assert config_digest(moved) == before, path
        assert differences(default, moved) == []
    for path, value in (("optim.lr", 0.5), ("slots.ids", ["r0c0"]), ("seed", 2), ("world.nproc_per_node", 3)):
        other = copy.deepcopy(default)
        put(other, path, value)
        assert config_digest(other) != before, path
        assert [line.split(" ")[0] for line in differences(default, other)] == [path]


def test_what_a_run_does_about_trouble_and_when_it_saves_may_change_where_it_goes_on(default: dict[str, Any]) -> None:
    for path, value in (("governor.enabled", False), ("governor.rise", 0.3), ("checkpoint.every_ticks", 7)):
        other = copy.deepcopy(default)
        put(other, path, value)
        assert config_digest(other) != config_digest(default), "two runs that differ in it are two runs"
        assert lasting_digest(other) == lasting_digest(default)
        assert differences(default, other) == []
        assert changeable_settings(other)[path] == value
    assert not {key for key in changeable_settings(default) if key.startswith(("run.", "optim.", "world.rdzv"))}


def test_a_length_may_only_grow(default: dict[str, Any]) -> None:
    """By the setting that decides; either is in a checkpoint, and neither in the digest of what lasts."""
    by_epochs, by_steps = copy.deepcopy(default), copy.deepcopy(default)
    put(by_epochs, "trainer.epochs", 10)
    put(by_steps, "trainer.steps", 50)
    for old, path, value, problem in (
        (by_epochs, "trainer.epochs", 11, ""),
        (by_epochs, "trainer.epochs", 9, "trainer.epochs = 9: the run has 10"),
        (by_epochs, "trainer.steps", 9_000, "trainer.steps = 9000: the run's length is trainer.epochs = 10"),
        (by_steps, "trainer.steps", 51, ""),
        (by_steps, "trainer.steps", 49, "trainer.steps = 49: the run has 50 and can only become longer"),
        (by_steps, "trainer.steps", None, "trainer.steps = None: the run has 50"),
        (by_steps, "trainer.epochs", 900, "trainer.epochs = 900: the run's length is trainer.steps = 50"),
    ):
        new = copy.deepcopy(old)
        assert same_length(old, new)
        put(new, path, value)
        assert not same_length(old, new)
        assert length_problem(old, new).startswith(problem)
        assert bool(length_problem(old, new)) == bool(problem)
        assert lasting_digest(new) == lasting_digest(old)
        assert config_digest(new) != config_digest(old)
        assert differences(old, new) == []
        assert changeable_settings(new)[path] == value


def test_differences_say_how_to_return(default: dict[str, Any]) -> None:
    new = copy.deepcopy(default)
    new["optim"]["lr"] = 0.5
    new["slots"]["max_live"] = None
    new["controller"] = {"kind": "none"}
    lines = differences(default, new)
    assert "optim.lr = 0.5: the run has 0.001; set optim.lr=0.001" in lines
    assert "slots.max_live = None: the run has 2; set slots.max_live=2" in lines
    assert "controller.curve: missing; the run has 'cosine'; set controller.curve=cosine" in lines


def test_whole_numbers_and_floats_of_one_value_are_one_setting(default: dict[str, Any]) -> None:
    new = copy.deepcopy(default)
    new["optim"]["clip_norm"] = 1
    assert config_digest(new) == config_digest(default)
    assert differences(default, new) == []


def test_file_returns_what_was_written_and_a_moved_run_is_where_its_file_is(
    default: dict[str, Any], tmp_path: Path
) -> None:
    plain = copy.deepcopy(default)
    plain["run"] |= {"name": "off", "group": "1e3"}
    plain["optim"]["eps"] = 1e-8
    plain["telemetry"]["wandb"]["tags"] = ["yes", "12", "ümlaut: #"]
    path = tmp_path / "config.yaml"
    write_config(path, plain)
    config, read = load_config(path)
    assert read == {**plain, "run": {**plain["run"], "dir": str(tmp_path)}}
    assert config.run.dir == str(tmp_path)
    assert config.run.resume is Resume.AUTO
    assert config_digest(read) == config_digest(plain)
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]
    write_config(path, default)  # an atomic replacement does not mind that it is read-only
    assert load_config(path)[1]["run"]["name"] is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "No such file"),
        ("seed: [", "not a resolved config"),
        ("run: {dir: '${nobody:%Y}'}", "not a resolved config"),
        ("seed: ???", "not a resolved config"),
        ("- 1", "expected a mapping"),
        ("seed: 1", "host: missing"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, text: str | None, problem: str) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_config(path)


@pytest.mark.parametrize(
    "override",
    [
        "slots.planted={r0c0:conv_light}",
        "slots.channels={r0c0:'1,0,1,0.5'}",
        "distill.features={r0c0:layer1}",
        "distill.options={depth:20}",
        "host.options={width:16}",
        "controller.options={nap:2}",
    ],
)
def test_a_mapping_that_is_empty_by_default_can_be_set_by_an_override(override: str) -> None:
    section, _, setting = override.partition("=")[0].partition(".")
    custom = {
        "host": ["host=custom", "host.path=os.path:join", "host.sites={r0c0:layer1}"],
        "controller": ["controller=custom", "controller.path=tests.tamiyo.test_registry:Lazy"],
        "distill": ["distill.path=os.path:join"],
    }
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        plain = plain_of(compose("config", [*custom.get(section, []), override]))
    plain.pop("launch")
    assert getattr(getattr(build_config(plain), section), setting) == plain[section][setting] != {}


def test_a_teacher_that_was_asked_for_and_not_named_is_missing() -> None:
    with (
        initialize_config_dir(str(conf_folder()), version_base="1.3"),
        pytest.raises(ConfigError, match=r"distill\.run"),
    ):
        plain_of(compose("config", ["distill=default"]))


def test_options_of_ones_own_hold_finite_numbers(default: dict[str, Any]) -> None:
    """Hydra reads {mode: nan} as a number."""
    data = {**composed("data=custom", "data.path=my.module:build", "task=regression")["data"]}
    data["options"] = {"mode": float("nan"), "limits": [1.0, float("inf")], "name": "nan"}
    reader = Reader()
    assert reader.section(CustomDataConfig, data, "data") is None
    told = "data.options.{0} = {1}: expected a finite number; for example data.options.{0}=\"'{1}'\" if it is text"
    assert reader.problems == [told.format("mode", "nan"), told.format("limits.1", "inf")]
