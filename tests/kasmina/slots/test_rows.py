"""An alpha per sample: each sample gets what a forward with its alpha gives, and 0 means the host's own bits."""

import math

import pytest
import torch
from torch import nn

from esper.kasmina.attribution.coalitions import make_plan
from esper.kasmina.attribution.prefixes import How
from esper.kasmina.attribution.worth import blended, readings
from esper.kasmina.births.build import build_gate
from esper.kasmina.export.join import current_alphas
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError
from tests.support.grown_hosts import attribute, batches_for, classify, grown_for
from tests.support.tiny import bits

SEEDS = {
    "BCHW": {"r0c0": 1.0, "r0c1": 0.25, "r1c0": 0.5},
    "BTC": {"r0c0": 0.75, "r1c0": 1.0},
    "BC": {"r0c0": 1.0, "r1c0": 0.5, "r3c0": 0.75},
    "cnn": {"r0c1": 0.5, "r1c1": 0.75, "r2c0": 1.0},
    "resnet20": {"r0c0": 0.5, "r1c0": 1.0, "r2c0": 1.0},
    "gpt": {"r0c1": 1.0, "r1c0": 0.5, "r2c2": 0.75},
}
ALPHAS = [0.0, 0.25, 1.0, 0.0, 0.5, 0.25]


def inputs_of(kind):
    inputs, _ = batches_for(kind)[0]
    return inputs if isinstance(inputs, tuple) else (inputs,)


@pytest.mark.parametrize("operator", Operator)
@pytest.mark.parametrize("kind", ["BCHW", "BTC", "BC"])
def test_each_sample_gets_what_a_forward_with_its_alpha_gives(kind, operator):
    grown, args = grown_for(kind, SEEDS[kind]), inputs_of(kind)
    slot = "r1c0"
    holder, site = grown.slots[slot], grown.sites[slot]
    holder.operator = operator
    if operator is Operator.GATE:
        holder.gate = build_gate(dim=site.dim, topology=site.topology, key=3, dtype=torch.float64, device="cpu")
    if operator is Operator.CHANNEL:
        holder.set_channels([i / site.dim for i in range(site.dim)])
    logits = torch.randn(6, 4, dtype=torch.float64)
    grown.model.eval()
    with torch.no_grad(), grown.logits(logits):
        expected = {}
        for alpha in set(ALPHAS):
            with grown.override({slot: alpha}):
                expected[alpha] = grown.model(*args)
        shapes = [(6,), (6, *[1] * (site.topology.ndim - 1))]
        for shape in shapes:
            given = torch.tensor(ALPHAS, dtype=torch.float64).view(shape)
            with grown.override({slot: given}):
                found = grown.model(*args)
                assert f"{holder.overridden}" == "per sample"
            assert given.flatten().tolist() == ALPHAS
            for i, alpha in enumerate(ALPHAS):
                torch.testing.assert_close(found[i], expected[alpha][i], rtol=1e-12, atol=1e-12)
        assert holder.overridden is None
    assert not torch.allclose(expected[0.0], expected[1.0])


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_at_alpha_0_a_sample_keeps_the_hosts_bits_whatever_the_seed_computes(broken):
    grown = grown_for("BC", {"r1c0": 1.0})
    nn.init.constant_(grown.slots["r1c0"].seed.map.weight, broken)
    feature = torch.randn(6, 5, dtype=torch.float64)
    feature[0, 0], feature[3, 1] = -0.0, math.nan
    before = bits([("", feature)])
    with torch.no_grad(), grown.override({"r1c0": torch.tensor(ALPHAS)}):
        found = grown.slots["r1c0"](feature, feature)
    off = [i for i, alpha in enumerate(ALPHAS) if alpha == 0.0]
    assert bits([("", found[off])]) == bits([("", feature[off])])
    assert not found[1].isfinite().all() or not found[1].equal(feature[1])
    assert bits([("", feature)]) == before, "the caller's tensor"


def test_the_seed_runs_on_those_samples_alone_whose_alpha_is_not_0():
    grown, args = grown_for("BCHW", SEEDS["BCHW"]), inputs_of("BCHW")
    seen: list[int] = []
    grown.slots["r0c0"].seed.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    with torch.no_grad():
        for alphas in (ALPHAS, [0.0] * 6):
            with grown.override({"r0c0": torch.tensor(alphas)}):
                grown.model.eval()(*args)
    assert seen == [4]


@pytest.mark.parametrize(
    ("kind", "alphas", "error", "text"),
    [
        ("BCHW", torch.ones(6, 1), ConfigError, r"torch.float32 \[6, 1\]: need floats, \[B\] or \[B, 1, 1, 1\]"),
        ("BCHW", torch.ones(6, 4, 1, 1), ConfigError, r"\[6, 4, 1, 1\]: need floats, \[B\] or \[B, 1, 1, 1\]"),
        ("BTC", torch.ones(6, 5, 1), ConfigError, r"\[6, 5, 1\]: need floats, \[B\] or \[B, 1, 1\]"),
        ("BC", torch.ones(6, 5), ConfigError, r"\[6, 5\]: need floats, \[B\] or \[B, 1\]"),
        ("BC", torch.ones(()), ConfigError, r"\[\]: need floats"),
        ("BC", torch.ones(6, dtype=torch.int64), ConfigError, r"torch.int64 \[6\]: need floats"),
        ("BC", torch.tensor([0.0, math.nan]), ValueError, "nan for sample 1: must be a finite number in"),
        ("BC", torch.tensor([0.0, 0.5, 1.5]), ValueError, "1.5 for sample 2: must be a finite number in"),
    ],
)
def test_alphas_of_another_shape_or_range_are_one_clear_line(kind, alphas, error, text):
    grown = grown_for(kind, SEEDS[kind])
    before = grown.slots["r0c0"].overridden
    with (
        pytest.raises(error, match=rf"\Aalpha override of r1c0 (is|=) .*{text}[^\n]*\Z"),
        grown.override({"r0c0": 0.5, "r1c0": alphas}),
    ):
        pass
    assert grown.slots["r0c0"].overridden is before is None


def test_another_batch_and_a_gradient_are_refused_by_name():
    grown, args = grown_for("BCHW", SEEDS["BCHW"]), inputs_of("BCHW")
    with (
        grown.override({"r0c1": torch.ones(5)}),
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"override of r0c1 has 5 alphas, the features there are \(6,"),
    ):
        grown.model(*args)
    with (
        grown.override({"r0c1": torch.ones(6)}),
        pytest.raises(ConfigError, match="r0c1, one per sample: for evaluation"),
    ):
        grown.model(*args)


@pytest.mark.parametrize("pairs", [0, 2])
@pytest.mark.parametrize("kind", SEEDS)
def test_stacked_coalitions_agree_with_full_forwards_to_rounding(kind, pairs):
    grown, batches = grown_for(kind, SEEDS[kind]), batches_for(kind)
    plan = make_plan(blended(grown), pairs=pairs)
    stacked, full = (attribute(grown, plan, batches, classify, how=how) for how in (How.STACKED, How.FULL))
    assert stacked.vector() == pytest.approx(full.vector(), abs=1e-12)
    assert stacked.how is How.STACKED
    assert readings(stacked, tick=1, min_samples=2).shapley.keys() == SEEDS[kind].keys()


def test_stacked_is_one_forward_a_batch():
    grown, batches = grown_for("BC", SEEDS["BC"]), batches_for("BC")
    seen: list[int] = []
    grown.model.head.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    attribute(grown, make_plan(SEEDS["BC"]), batches, classify, how=How.STACKED)
    assert seen == [8 * 6, 8 * 6, 8 * 3]


def test_an_input_that_is_not_one_row_per_sample_cannot_be_stacked():
    grown = grown_for("BC", SEEDS["BC"])
    (x, shift), target = batches_for("BC")[0]
    plan = make_plan(SEEDS["BC"])
    with pytest.raises(ConfigError, match=r"an input or target is \[1, 5\] in a batch of 6; need one row per sample"):
        attribute(grown, plan, [((x, shift[:1]), target)], classify, how=How.STACKED)
    assert attribute(grown, plan, [((x, shift[:1]), target)], classify).samples == 6


def test_an_export_under_alphas_per_sample_is_refused_by_name():
    grown = grown_for("BC", SEEDS["BC"])
    with (
        grown.override({"r0c0": torch.ones(6)}),
        pytest.raises(ConfigError, match="slot r0c0: its override has an alpha"),
    ):
        current_alphas(grown)
    with grown.override({"r0c0": 0.25}):
        assert current_alphas(grown) == SEEDS["BC"] | {"r0c0": 0.25}
