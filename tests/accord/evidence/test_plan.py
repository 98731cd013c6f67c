"""The looks that a probe affords."""

import pytest

from esper.accord.config import EvidencePolicy, GateConfig
from esper.accord.evidence.plan import NO_PROBE, check_plan, plan_probe
from esper.leyline.errors import ConfigError
from esper.leyline.stages import Incubation


def test_a_probe_is_cut_into_equal_shares_and_some_are_kept():
    plan = plan_probe(1024, 1024, per_look=128, reserve=0.125)
    assert (plan.shares, plan.looks, plan.reserve, plan.training_looks) == (8, 7, 1, 3)
    assert plan.clusters_in(1) == 128
    assert str(plan) == "1024 samples in 1024 clusters: 7 looks of 128 a life, 1 in reserve"
    assert plan_probe(384, 384, per_look=128, reserve=0.125).reserve == 0, "a small probe keeps nothing back"
    assert plan_probe(100, 100, per_look=128, reserve=0.125).looks == 1
    assert plan_probe(1024, 5, per_look=128, reserve=0.0).looks == 5, "a look has a cluster at least"
    assert plan_probe(1024, 1024, per_look=128, reserve=0.0, units=4).looks == 4, "or a batch, where batches are drawn"
    assert NO_PROBE.clusters_in(3) == 0


@pytest.mark.parametrize(
    ("samples", "clusters", "incubation", "words"),
    [
        (1024, 29, Incubation.IMMEDIATE, "1024 samples in 29 clusters are too few for any seed ever to pass G5"),
        (40, 40, Incubation.IMMEDIATE, "it needs 30 clusters and gates.min_samples = 64 samples"),
        (200, 200, Incubation.SHADOW, "a single look, and G2 would leave none for G5; set gates.probe_samples=50"),
        (200, 200, Incubation.STE, "a single look"),
    ],
)
def test_a_probe_on_which_nothing_could_ever_fossilise_is_refused(samples, clusters, incubation, words):
    plan = plan_probe(samples, clusters, per_look=128, reserve=0.0)
    with pytest.raises(ConfigError, match=words):
        check_plan(plan, GateConfig(), incubation, "data.probe")
    check_plan(plan, GateConfig(evidence=EvidencePolicy.OBSERVE), incubation, "data.probe")


def test_a_probe_that_is_large_enough_or_absent_is_taken():
    check_plan(plan_probe(200, 200, per_look=128, reserve=0.0), GateConfig(), Incubation.IMMEDIATE, "probe")
    check_plan(plan_probe(384, 30, per_look=128, reserve=0.0), GateConfig(), Incubation.SHADOW, "probe")
    check_plan(NO_PROBE, GateConfig(), Incubation.SHADOW, "probe")
