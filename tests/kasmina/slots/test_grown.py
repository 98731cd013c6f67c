"""A grown model computes the host plus alpha times each seed's delta, under overrides, copies and casts too."""

import copy

import pytest
import torch

from esper.kasmina.attach import attach
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import Phase, SeedSlot
from tests.support.stateful_model import IMAGES, WHERE, images, seed_for

# what a grown model computes --------------------------------------------------------------------------------------


def grown_and_host(phase: Phase = Phase.BLEND):
    host = images().eval()
    grown = attach(copy.deepcopy(host), WHERE, IMAGES)
    for slot, alpha in (("r0c0", 1.0), ("r1c0", 0.5)):
        grown.slots[slot].plant(seed_for(grown, slot))
        grown.slots[slot].phase = phase
        grown.slots[slot].set_alpha(alpha)
    return grown, host


def test_empty_slots_compute_the_host():
    host = images().eval()
    grown = attach(copy.deepcopy(host), WHERE, IMAGES)
    assert torch.equal(grown.model(IMAGES).view(torch.int32), host(IMAGES).view(torch.int32))


def test_disabled_equals_the_host_bit_for_bit_and_ends_with_its_block():
    grown, host = grown_and_host()
    before = grown.model(IMAGES)
    assert not torch.equal(before, host(IMAGES))
    with grown.disabled():
        assert torch.equal(grown.model(IMAGES).view(torch.int32), host(IMAGES).view(torch.int32))
    assert torch.equal(grown.model(IMAGES), before)


def test_disabled_silences_a_broken_seed():
    grown, host = grown_and_host()
    with torch.no_grad():
        for parameter in grown.slots["r0c0"].seed.parameters():
            parameter.fill_(float("nan"))
    assert grown.model(IMAGES).isnan().all()
    with grown.disabled():
        assert torch.equal(grown.model(IMAGES).view(torch.int32), host(IMAGES).view(torch.int32))


def test_a_slot_adds_alpha_times_its_seeds_delta():
    grown, host = grown_and_host()
    x = host.norm(host.stem(IMAGES))
    x = x + 1.0 * grown.slots["r0c0"].seed(x)
    x = host.blocks[1](host.blocks[0](x))
    x = x + 0.5 * grown.slots["r1c0"].seed(x)
    assert torch.equal(grown.model(IMAGES), host.head(x.mean((2, 3))))


def test_an_override_counts_in_any_phase_and_gives_way_to_one_inside_it_only_for_its_block():
    grown, host = grown_and_host(Phase.OFF)
    assert torch.equal(grown.model(IMAGES), host(IMAGES))
    blended, _ = grown_and_host(Phase.BLEND)
    with grown.override({"r0c0": 1.0, "r1c0": 0.5}):
        full = grown.model(IMAGES)
        assert torch.equal(full, blended.model(IMAGES))
        with grown.disabled():
            assert torch.equal(grown.model(IMAGES), host(IMAGES))
        assert torch.equal(grown.model(IMAGES), full)
    assert torch.equal(grown.model(IMAGES), host(IMAGES))


@pytest.mark.parametrize("alpha", [float("nan"), -0.1, 1.5])
def test_an_impossible_override_is_refused_and_leaves_none_behind(alpha):
    grown, _ = grown_and_host()
    before = grown.model(IMAGES)
    with pytest.raises(ValueError, match=r"alpha override of r1c0 = .*: must be a finite number in \[0, 1\]"):  # noqa: SIM117
        with grown.override({"r0c0": 0.0, "r1c0": alpha}):
            raise AssertionError
    assert torch.equal(grown.model(IMAGES), before)


def test_a_deep_copy_binds_its_own_slots():
    grown, host = grown_and_host()
    twin = copy.deepcopy(grown.model)
    before = grown.model(IMAGES)
    assert torch.equal(twin(IMAGES), before)
    slot = twin.get_submodule(f"{CONTAINER}.r0c0")
    assert isinstance(slot, SeedSlot)
    assert slot is not grown.slots["r0c0"]
    slot.set_alpha(0.0)
    twin.get_submodule(f"{CONTAINER}.r1c0").set_alpha(0.0)
    assert torch.equal(twin(IMAGES), host(IMAGES))
    assert torch.equal(grown.model(IMAGES), before)


def test_a_model_moves_to_another_dtype_in_mid_life_and_alpha_stays_float32():
    grown, _ = grown_and_host()
    single = grown.model(IMAGES)
    double = grown.model.double()(IMAGES.double())
    assert double.dtype is torch.float64
    assert torch.allclose(double.float(), single, atol=1e-5)
    holder = grown.slots["r1c0"]
    assert (holder.alpha.dtype, holder.alpha.item(), holder.level) == (torch.float32, 0.5, 0.5)
