"""Digests see bits, not values: every exchange, shift and flip, names, dtypes and shapes."""

import math

import pytest
import torch
import xxhash
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esper.tolaria.ranks import digest
from esper.tolaria.ranks.digest import digest_tensors, weighted_sum

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_tensor(dtype: torch.dtype, n: int = 37) -> Tensor:
    raw = torch.randn(n, generator=generator(3))
    return raw > 0 if dtype is torch.bool else (raw * 40).to(dtype)


def one(tensor: Tensor, name: str = "w") -> int:
    return digest_tensors([(name, tensor)])


def xxh3(tensor: Tensor, name: str) -> int:
    """The definition, written out: 62 bits of xxh3 over the description and the bytes."""
    data = bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).tolist())
    return xxhash.xxh3_64_intdigest(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode() + data) % 2**62


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_the_cpu_it_is_xxh3_of_description_and_bytes(dtype):
    tensor = random_tensor(dtype)
    assert one(tensor) == xxh3(tensor, "w")
    assert 0 <= one(tensor) < 2**62


DIFFERENT = {
    "a negative zero": (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])),
    "one unit in the last place": (torch.tensor([1.0]), torch.nextafter(torch.tensor([1.0]), torch.tensor([2.0]))),
    "an exchange": (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])),
    "a shift": (torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 2.0, 0.0])),
    "a shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "a dtype of equal bytes": (torch.zeros(4, dtype=torch.float32), torch.zeros(4, dtype=torch.int32)),
    "a transposition": (torch.arange(9.0).view(3, 3), torch.arange(9.0).view(3, 3).T),
    "a payload of NaN": (torch.tensor([math.nan]), torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)),
}


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_what_differs_in_bits_differs(pair):
    assert one(pair[0]) != one(pair[1])


def test_equal_bits_are_equal_also_where_values_are_not_and_whatever_the_memory_format():
    nan = torch.tensor([math.nan, 1.0])
    assert one(nan) == one(nan.clone())
    image = torch.randn(2, 3, 4, 4, generator=generator(1))
    assert one(image) == one(image.to(memory_format=torch.channels_last))
    assert one(image[:, :, ::2]) == one(image[:, :, ::2].clone())
    assert one(torch.nn.Parameter(image)) == one(image)


def test_names_order_and_borders_between_tensors_count():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    assert one(a, "w") != one(a, "v")
    assert digest_tensors([("a", a), ("b", b)]) != digest_tensors([("b", b), ("a", a)])
    assert digest_tensors([("a", a), ("b", b)]) != digest_tensors([("a", b), ("b", a)])
    assert digest_tensors([("a", torch.tensor([1.0])), ("b", torch.tensor([2.0, 3.0]))]) != digest_tensors(
        [("a", a), ("b", b)]
    )
    assert digest_tensors([("a", a), ("b", torch.zeros(0))]) != digest_tensors([("a", a)])
    assert digest_tensors([]) == digest_tensors(iter([]))


# the sum that accelerators use ------------------------------------------------------------------------------------


def definition(words: list[int]) -> int:
    """The weighted sum in Python's own integers, as an int64."""
    odd = -7046029254386353131 % 2**64
    total = 0
    for index, word in enumerate(words):
        for _ in range(2):
            word = word * odd % 2**64
            word ^= word >> 32
        total += word * (2 * index + 1) * odd
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_weighted_sum_is_its_definition_padded_to_whole_words(dtype):
    tensor = random_tensor(dtype)
    raw = bytes(tensor.view(torch.uint8).tolist())
    raw += b"\0" * (-len(raw) % 8)
    words = [int.from_bytes(raw[at : at + 8], "little", signed=True) for at in range(0, len(raw), 8)]
    result = weighted_sum(tensor)
    assert (result.dtype, result.ndim, result.item()) == (torch.int64, 0, definition(words))


def test_the_weighted_sum_sees_every_single_bit():
    tensor = torch.randn(16, generator=generator(2))
    seen = {weighted_sum(tensor).item()}
    for index in range(16):
        for bit in range(32):
            flipped = tensor.clone()
            flipped.view(torch.int32)[index] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
            seen.add(weighted_sum(flipped).item())
    assert len(seen) == 1 + 16 * 32


AWKWARD = {
    "random": torch.randn(24, generator=generator(4), dtype=torch.float64),
    "one magnitude, both signs": torch.randn(24, generator=generator(5), dtype=torch.float64).sign(),
    "powers of two": 2.0 ** torch.arange(-12, 12, dtype=torch.float64),
    "small integers": torch.arange(24, dtype=torch.float64),
    "both zeros": torch.tensor([0.0, -0.0] * 12, dtype=torch.float64),
}


@pytest.mark.parametrize("tensor", AWKWARD.values(), ids=AWKWARD.keys())
def test_the_weighted_sum_sees_every_exchange(tensor):
    whole = weighted_sum(tensor)
    exchanged = 0
    for i in range(24):
        for j in range(i):
            other = tensor.clone()
            other[[i, j]] = other[[j, i]]
            if not torch.equal(other.view(torch.int64), tensor.view(torch.int64)):
                exchanged += 1
                assert weighted_sum(other) != whole, (i, j)
    assert exchanged >= 100


def test_the_weighted_sum_sees_an_exchange_at_every_distance_that_is_a_power_of_two():
    words = torch.zeros(1 << 15, dtype=torch.float64)
    for value in (-0.0, 1.0, -2.0):
        sums = set()
        places = [0, *(1 << k for k in range(15))]
        for place in places:
            other = words.clone()
            other[place] = value
            sums.add(weighted_sum(other).item())
        assert len(sums) == len(places)


@pytest.mark.parametrize("tensor", [AWKWARD["random"], AWKWARD["powers of two"], AWKWARD["small integers"]])
def test_the_weighted_sum_sees_every_shift(tensor):
    sums = {weighted_sum(tensor.roll(shift)).item() for shift in range(24)}
    assert len(sums) == 24
    padded = torch.cat([torch.zeros(1, dtype=torch.float64), tensor])
    assert weighted_sum(padded) != weighted_sum(tensor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_weighted_sum_of_a_device_is_that_of_the_cpu():
    tensor = torch.randn(1001, generator=generator(6))
    assert weighted_sum(tensor.cuda()).item() == weighted_sum(tensor).item()
    assert one(tensor.cuda()) != one(tensor.cuda() + 1)


class Sizes(TorchDispatchMode):
    """Bytes of the largest tensor that an operator makes, in memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in before:
            self.largest = max(self.largest, result.nbytes)
        return result


@pytest.mark.parametrize("size", [8 * 16 - 1, 8 * 16, 8 * 16 + 1, 1000])
def test_the_weighted_sum_goes_by_pieces_and_comes_to_the_same(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator(5))
    whole = weighted_sum(tensor)
    monkeypatch.setattr(digest, "PIECE", 128)
    with Sizes() as sizes:
        assert weighted_sum(tensor) == whole
    assert sizes.largest <= 128
