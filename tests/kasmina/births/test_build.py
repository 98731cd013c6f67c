"""Birth: a pure function of its key, and no other random stream moves."""

import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from esper.kasmina.births.build import PrivateGenerator, birth_key, build_seed
from esper.kasmina.blueprints import names
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology

EVERY = [(topology, name) for topology in Topology for name in names(topology)]

# Every call draws: in place and out of place, with and without a generator overload, through autograd and init.
DRAWS = {
    "rand": lambda: torch.rand(5),
    "randn": lambda: torch.randn(5),
    "randn float64": lambda: torch.randn(5, dtype=torch.float64),
    "randn out": lambda: torch.randn(5, out=torch.empty(5)),
    "randint high": lambda: torch.randint(1000, (5,)),
    "randint low": lambda: torch.randint(10, 1000, (5,)),
    "randperm": lambda: torch.randperm(50),
    "uniform_": lambda: torch.empty(5).uniform_(-1, 1),
    "normal_": lambda: torch.empty(5).normal_(),
    "random_": lambda: torch.empty(5).random_(),
    "random_ to": lambda: torch.empty(5).random_(1000),
    "random_ from to": lambda: torch.empty(5).random_(10, 1000),
    "bernoulli_": lambda: torch.empty(50).bernoulli_(0.5),
    "bernoulli": lambda: torch.bernoulli(torch.full((50,), 0.5)),
    "exponential_": lambda: torch.empty(5).exponential_(),
    "normal floats": lambda: torch.normal(0.0, 1.0, (5,)),
    "normal tensors": lambda: torch.normal(torch.zeros(5), torch.ones(5)),
    "multinomial": lambda: torch.multinomial(torch.ones(50), 20),
    "poisson": lambda: torch.poisson(torch.full((50,), 9.0)),
    "trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(5)),
    "orthogonal_": lambda: nn.init.orthogonal_(torch.empty(4, 4)),
    "dropout": lambda: nn.functional.dropout(torch.ones(50)),
    "explicit global": lambda: torch.rand(5, generator=torch.default_generator),
    "rrelu": lambda: nn.functional.rrelu(torch.full((9,), -1.0), training=True),
}


def streams() -> tuple[object, ...]:
    return (torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state()))


def bits(module: nn.Module) -> list[tuple[str, bytes]]:
    return [(name, tensor.detach().numpy().tobytes()) for name, tensor in module.state_dict().items()]


@pytest.mark.parametrize("name", DRAWS)
def test_every_random_operator_draws_from_the_private_generator(name: str) -> None:
    draw = DRAWS[name]

    def drawn(key: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        before = streams()
        with PrivateGenerator(key):
            first, second = draw(), draw()
        assert streams() == before
        assert not torch.equal(first, second), "the private stream must move on"
        return first

    assert torch.equal(drawn(1, 0), drawn(1, 99))
    assert not torch.equal(drawn(1, 0), drawn(2, 0))


def test_a_generator_of_the_callers_own_is_kept() -> None:
    def own() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    with PrivateGenerator(1):
        drawn = torch.rand(5, generator=own())
    assert torch.equal(drawn, torch.rand(5, generator=own()))


def test_a_random_operator_without_a_generator_is_refused_by_name() -> None:
    x = torch.ones(8, requires_grad=True)
    before = streams()
    with PrivateGenerator(1), pytest.raises(RuntimeError, match=r"aten\.native_dropout.*takes no generator"):
        torch.native_dropout(x, 0.5, True)
    assert streams() == before


def test_keys_differ_in_every_part_and_fit_63_bits() -> None:
    keys = {
        birth_key(seed, slot, generation)
        for seed in (0, 1, 2**40)
        for slot in ("r0c0", "r0c1", "r1c0", "r10c0")
        for generation in (0, 1, 2)
    }
    assert len(keys) == 36
    assert all(0 <= key < 2**63 for key in keys)
    assert birth_key(0, "r0c0", 0) == 8606074862262482770, "keys must not change: resumed runs are reborn from them"
    with pytest.raises(ConfigError, match="early"):
        birth_key(0, "early", 0)


@pytest.mark.parametrize(("topology", "name"), EVERY)
def test_a_seed_is_a_pure_function_of_its_key(topology: Topology, name: str) -> None:
    def born(key: int, global_seed: int) -> nn.Module:
        torch.manual_seed(global_seed)
        before = streams()
        seed = build_seed(name, dim=8, topology=topology, key=key, dtype=torch.float32, device="cpu")
        assert streams() == before
        return seed

    assert bits(born(7, 0)) == bits(born(7, 123))
    drawn = name not in ("noop", "norm")  # these two hold constants only
    assert (bits(born(7, 0)) != bits(born(8, 0))) == drawn


def test_a_seed_is_built_in_float32_on_cpu_whatever_the_callers_defaults() -> None:
    def born(dtype: torch.dtype) -> nn.Module:
        return build_seed("mlp", dim=8, topology=Topology.SEQUENCE, key=7, dtype=dtype, device="cpu")

    plain = bits(born(torch.float32))
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.inference_mode():
            seed = born(torch.float32)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert bits(seed) == plain
    assert all(tensor.requires_grad and not tensor.is_inference() for tensor in seed.parameters())

    wide = born(torch.float64)
    assert {tensor.dtype for tensor in wide.parameters()} == {torch.float64}
    assert bits(wide.float()) == plain, "cast after the draw, not drawn in another format"


def test_a_blueprint_that_cannot_serve_the_slot_is_an_error_that_says_so() -> None:
    with pytest.raises(ConfigError, match="registered are attention, block, bottleneck, conv_heavy"):
        build_seed("mlp", dim=8, topology=Topology.FEATURE_MAP, key=0, dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match=r"blueprint norm \(BTC\) cannot serve dim = 1"):
        build_seed("norm", dim=1, topology=Topology.SEQUENCE, key=0, dtype=torch.float32, device="cpu")


def test_a_private_generator_is_this_threads_alone_and_sets_no_flag_of_the_process() -> None:
    inside, done, drawn = threading.Event(), threading.Event(), []

    def build() -> None:
        with PrivateGenerator(7):
            inside.set()
            assert done.wait(60)
            drawn.append(torch.rand(5))

    thread = threading.Thread(target=build)
    thread.start()
    assert inside.wait(60)
    torch.manual_seed(11)
    here = torch.rand(5)
    flagged = is_in_torch_dispatch_mode()
    compiled = CompileCounter()
    torch.compile(torch.sin, backend=compiled, fullgraph=True)(here)
    done.set()
    thread.join()
    torch.manual_seed(11)
    assert torch.equal(here, torch.rand(5))
    assert torch.equal(drawn[0], torch.rand(5, generator=torch.Generator().manual_seed(7)))
    assert not flagged
    assert compiled.frame_count == 1, "a compiled region in this thread would go eager"
