"""Features tell measured from stale from absent, in units that every host shares, and keep their meaning."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

from esper.leyline.errors import ConfigError, EsperError
from esper.leyline.evidence import ABSENT, Reading, Status, measured
from esper.leyline.files import package_folder
from esper.leyline.observation import BlueprintInfo, HostInfo, Observation
from esper.leyline.plain import digest62, from_plain, to_plain
from esper.leyline.stages import Stage
from esper.leyline.topology import Reach
from esper.tamiyo.policy import features
from esper.tamiyo.policy.arrays import BOUND, array_shapes, arrays_of, stack
from esper.tamiyo.policy.columns import Feature, Sight
from esper.tamiyo.policy.features import KINDS, LAYOUT, TABLES, read_layout, unread
from esper.tamiyo.policy.memory import Memory
from esper.tamiyo.policy.reference import page
from tests.support.any_observations import any_observation, any_reading
from tests.support.observations import observe, slot_view

PINNED = Path(__file__).with_name("meanings.json")


def remember(*observations: Observation) -> Memory:
    memory = Memory()
    for observation in observations:
        memory.note(observation)
    return memory


def columns(kind: str, row: np.ndarray) -> dict[str, float]:
    return dict(zip(LAYOUT.columns(kind), row.tolist(), strict=True))


def run_columns(*observations: Observation) -> dict[str, float]:
    return columns("run", arrays_of(observations[-1], remember(*observations))["run"])


def slot_columns(*observations: Observation) -> dict[str, float]:
    return columns("slot", arrays_of(observations[-1], remember(*observations))["slots"][0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_the_observation_is_considered(kind: str) -> None:
    assert unread(kind) == set()
    names = {field.name for field in dataclasses.fields(features.READ[kind])}
    assert set(features.LEFT_OUT[kind]) <= names  # nothing is left out that is not there


@pytest.mark.parametrize("field", ["contribution", "running", "lasting", "gate_mean", "gradient_ratio"])
def test_measured_stale_and_absent_are_told_apart(field: str) -> None:
    zero = {"value": 0.0, "tick": 3, "n": 5, "se": 0.1}
    readings = [Reading(status=Status.MEASURED, **zero), Reading(status=Status.STALE, **zero), ABSENT]
    rows = [
        arrays_of(o, remember(o))["slots"][0].tobytes() for o in (observe(slot_view(**{field: r})) for r in readings)
    ]
    assert len(set(rows)) == 3


def test_losses_look_alike_in_any_unit() -> None:
    losses = [2.3, 2.0, 1.9, 1.6, 1.55]

    def told(scale: float) -> list[Observation]:
        return [
            observe(
                slot_view(contribution=measured(0.03 * scale, tick=tick, n=9, se=0.01 * scale)),
                tick=tick,
                train_loss=measured(loss * scale, tick=tick, n=9),
                validation_loss=measured(loss * scale, tick=tick, n=9, se=0.02 * scale),
                together=measured(0.2 * scale, tick=tick, n=9),
            )
            for tick, loss in enumerate(losses, 1)
        ]

    cnn, gpt = told(1.0), told(4.7)
    for name in ("run", "slots"):
        assert np.allclose(
            arrays_of(cnn[-1], remember(*cnn))[name], arrays_of(gpt[-1], remember(*gpt))[name], atol=1e-6
        )
    row = run_columns(*cnn)
    assert row["validation_loss.level"] == pytest.approx(1 - 1.55 / 2.3, rel=1e-5)
    assert row["validation_loss.fall_known"] == 1.0
    assert row["validation_loss.fall"] > 0
    assert run_columns(*cnn[:2])["validation_loss.fall_known"] == 0.0  # no noise is known of two values
    assert slot_columns(*cnn)["contribution.of_error"] == pytest.approx(np.arcsinh(3.0), rel=1e-5)


def test_noise_is_that_of_the_metric_about_its_trend() -> None:
    rng, memory = random.Random(0), Memory()
    for tick in range(1, 400):
        memory.note(
            observe(tick=tick, validation_loss=measured(3.0 - 0.005 * tick + rng.gauss(0, 0.01), tick=tick, n=1))
        )
    assert memory.validation.noise_sq is not None
    assert memory.validation.noise_sq**0.5 == pytest.approx(0.01, rel=0.5)


def test_a_stale_reading_is_not_taken_for_a_new_one() -> None:
    fresh = measured(2.0, tick=1, n=1)
    memory = remember(observe(tick=1, validation_loss=fresh))
    before = to_plain(memory)
    memory.note(observe(tick=2, validation_loss=fresh))
    memory.note(observe(tick=3, validation_loss=dataclasses.replace(fresh, status=Status.STALE)))
    assert to_plain(memory) == before


def test_blueprints_are_told_by_what_they_are() -> None:
    def entry(name: str, scale: int = 1) -> np.ndarray:
        info = BlueprintInfo(name=name, parameters=20 * scale, flops=300 * scale, reach=Reach.NEAR)
        host = HostInfo(parameters=100 * scale, flops=3000 * scale)
        o = observe(slot_view(catalogue=(info,)), host=host)
        return arrays_of(o, remember(o))["entries"][0, 0]

    assert entry("conv").tobytes() == entry("something_new").tobytes()
    assert np.allclose(entry("conv"), entry("conv", 1000))  # the same share of a larger host
    row = columns("entry", entry("conv"))
    assert (row["kind.near"], row["kind.unsaid"], row["kind.flops_known"]) == (1.0, 0.0, 1.0)
    o = observe(slot_view(catalogue=(BlueprintInfo(name="x", parameters=1, flops=1, reach=None),)))
    o = dataclasses.replace(o, host=HostInfo(parameters=100, flops=None))
    row = columns("entry", arrays_of(o, remember(o))["entries"][0, 0])
    assert (row["kind.unsaid"], row["kind.flops_known"]) == (1.0, 0.0)


def test_what_was_tried_is_remembered_by_slot() -> None:
    def at(stage: Stage, name: str | None, other: Stage = Stage.EMPTY, other_name: str | None = None) -> Observation:
        return observe(
            slot_view("r0c0", stage=stage, blueprint=name), slot_view("r0c1", stage=other, blueprint=other_name)
        )

    lived = [at(Stage.EMPTY, None), at(Stage.TRAINING, "light"), at(Stage.PRUNED, None), at(Stage.EMPTY, None)]
    kept = at(Stage.EMPTY, None, Stage.FOSSILIZED, "light")
    memory = remember(*lived, kept)
    arrays = arrays_of(kept, memory)
    names = [info.name for info in kept.slots[0].catalogue]
    here = columns("entry", arrays["entries"][0, names.index("light")])
    assert (
        here["tried.births"] == here["tried.failures"] == here["tried.elsewhere_kept"] == pytest.approx(np.log(2) / 3)
    )
    there = columns("entry", arrays["entries"][1, names.index("light")])
    assert there["tried.failures"] == there["tried.elsewhere_kept"] == 0.0
    assert there["tried.elsewhere_failures"] == here["tried.failures"]
    assert not arrays["entries"][0, names.index("heavy"), -5:].any()
    assert from_plain(Memory, json.loads(json.dumps(to_plain(memory)))) == memory


def test_arrays_are_finite_bounded_and_of_the_promised_shapes() -> None:
    rng = random.Random(5)
    memory, rows = Memory(), []
    for _ in range(60):
        observation = any_observation(rng)
        memory.note(observation)
        rows.append(arrays_of(observation, memory, slots=5, entries=6))
        for name, (shape, dtype) in array_shapes(5, 6).items():
            assert (rows[-1][name].shape, rows[-1][name].dtype) == (shape, dtype), name
        present = rows[-1]["present_slots"]
        assert not rows[-1]["slots"][~present].any()
        assert not rows[-1]["entries"][~rows[-1]["present_entries"]].any()
    batch = stack(rows)
    for name in ("run", "slots", "entries"):
        assert np.isfinite(batch[name]).all()
        assert np.abs(batch[name]).max() <= BOUND


def test_a_feature_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    o = observe(slot_view())
    broken = dataclasses.replace(o, remaining=float("nan"))
    with pytest.raises(EsperError, match=r"feature run.remaining.share: not a finite number"):
        arrays_of(broken, remember(o))
    with pytest.raises(EsperError, match="there is room for 1 with 2"):
        arrays_of(o, remember(o), slots=1, entries=2)


def test_an_older_checkpoint_leaves_newer_features_out() -> None:
    plain = LAYOUT.plain()
    old = plain | {"run": plain["run"][:-1], "slot": plain["slot"][1:]}
    layout = read_layout(json.loads(json.dumps(old)), "p.pt")
    o = observe(slot_view())
    arrays = arrays_of(o, remember(o), layout=layout)
    whole = arrays_of(o, remember(o))
    assert arrays["run"].tolist() == whole["run"][: layout.width("run")].tolist()
    assert arrays["slots"].shape[-1] == LAYOUT.width("slot") - 2
    assert layout.digest() != LAYOUT.digest()


def test_a_changed_meaning_is_refused_by_name() -> None:
    plain = LAYOUT.plain()
    changed = plain | {"slot": [["verdict", 7], ["aura", 1]]}
    with pytest.raises(
        ConfigError, match=r"p.pt: features of another meaning: slot.verdict \(version 7, here 1\), slot.aura"
    ):
        read_layout(changed, "p.pt")
    with pytest.raises(ConfigError, match="FEATURES version 0, this code makes version 1"):
        read_layout(plain | {"version": 0}, "p.pt")


def meaning(feature: Feature, kind: str) -> list[object]:
    """What a feature computes of fixed observations, to six digits."""
    rng, memory, told = random.Random(11), Memory(), []
    for tick in range(12):
        change = {"tick": 30 + tick, "train_loss": any_reading(rng, 2.0, least=0.1)}
        o = any_observation(rng, slots=3, **change)
        memory.note(o)
        sight = Sight(o, memory, memory.unit, memory.tallies())
        for view in o.slots if kind != "run" else o.slots[:1]:
            sight.slot = view
            for entry in view.catalogue if kind == "entry" else (None,):
                sight.entry = entry
                told.append([f"{value:.6g}" for value in feature.values(sight)])
    return [feature.version, digest62([feature.columns, told])]


def test_a_meaning_that_changes_raises_its_version() -> None:
    """After a change that is meant: raise the feature's version, then write what this test prints to meanings.json."""
    now = {f"{kind}.{one.name}": meaning(one, kind) for kind in KINDS for one in TABLES[kind].features.values()}
    pinned = json.loads(PINNED.read_text())
    silent = [name for name in pinned if now.get(name) != pinned[name] and now.get(name, [0])[0] == pinned[name][0]]
    assert silent == [], f"{silent} compute something else under the same version"
    assert now == pinned, json.dumps(now, indent=0)


def test_the_page_of_features_is_made_from_them() -> None:
    committed = (package_folder().parent / "docs" / "features.md").read_text()
    assert committed == page(), "python -m esper.tamiyo.policy.reference > docs/features.md"
