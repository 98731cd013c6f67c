import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.leyline.plain import digest62
from esper.tolaria.data.augment import crop_flip
from esper.tolaria.data.hashing import hash_positions, hashed_order, seeded_order

BITS = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """The generator of the paper, one number at a time."""
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & BITS
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & BITS
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & BITS
        numbers.append(z ^ (z >> 31))
    return numbers


def images(count: int, height: int = 6, width: int = 5) -> torch.Tensor:
    """Every pixel has a value of its own, none is zero."""
    return torch.arange(1, count * 3 * height * width + 1, dtype=torch.float32).view(count, 3, height, width)


def test_the_reference_generator_gives_its_published_numbers():
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@given(st.integers(0, 10**9), st.integers(1, 50))
@settings(max_examples=20, deadline=None)
def test_hashed_is_splitmix64(seed, count):
    assert hash_positions(torch.arange(count), "x", seed).tolist() == splitmix64(digest62(["x", seed]), count)


def test_orders_are_permutations_and_follow_their_key():
    for order in (hashed_order, seeded_order):
        assert sorted(order(100, "a", 1).tolist()) == list(range(100))
        assert torch.equal(order(100, "a", 1), order(100, "a", 1))
        assert not torch.equal(order(100, "a", 1), order(100, "a", "1"))
        assert not torch.equal(order(100, "a", 1), order(100, "a", 2))


def test_the_split_order_is_pinned():
    numbers = splitmix64(digest62(["split", 0]), 12)
    assert hashed_order(12, "split", 0).tolist() == sorted(range(12), key=numbers.__getitem__)


def test_augmentation_does_not_depend_on_the_batch():
    x, ids = images(40), torch.arange(40)
    whole = crop_flip(x, ids, seed=3, epoch=2, pad=2)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for piece in (*shuffled.split(7), torch.tensor([5, 5])):
        assert torch.equal(crop_flip(x[piece], piece, seed=3, epoch=2, pad=2), whole[piece])


@pytest.mark.parametrize("other", [{"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 1}])
def test_augmentation_follows_seed_and_epoch(other):
    x, ids = images(40), torch.arange(40)
    first, second = crop_flip(x, ids, seed=3, epoch=2, pad=2), crop_flip(x, ids, pad=2, **other)
    assert (first != second).flatten(1).any(1).sum() > 20


def test_each_result_is_a_crop_of_the_padded_image_or_its_mirror_and_all_occur():
    count, pad = 2000, 2
    x = images(1).expand(count, -1, -1, -1)
    out = crop_flip(x, torch.arange(count), seed=0, epoch=0, pad=pad)
    padded = np.pad(x[0].numpy(), ((0, 0), (pad, pad), (pad, pad)))
    crops = {}
    for top in range(2 * pad + 1):
        for left in range(2 * pad + 1):
            crop = padded[:, top : top + 6, left : left + 5]
            crops[np.ascontiguousarray(crop).tobytes()] = (top, left, False)
            crops[np.ascontiguousarray(crop[:, :, ::-1]).tobytes()] = (top, left, True)
    seen = [crops[image.numpy().tobytes()] for image in out]
    counts = np.array([seen.count(place) for place in crops.values()])
    assert len(counts) == 2 * 25
    assert (counts > 0).all()
    chi_square = float(((counts - 40.0) ** 2 / 40.0).sum())  # 49 degrees of freedom: 99.9 % lie below 85.4
    assert chi_square < 85.4


def test_augmentation_keeps_shape_dtype_and_input():
    x = images(4, 8, 8)
    before = x.clone()
    out = crop_flip(x, torch.arange(4), seed=0, epoch=0, pad=4)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    assert torch.equal(x, before)
