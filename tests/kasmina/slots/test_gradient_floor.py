"""What a slot computes and what flows back through it, against models written out by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from esper.kasmina.attach import attach
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.phases import phase_of
from esper.leyline.stages import Incubation, Stage
from esper.leyline.topology import Topology

C = 8
SHAPES = {Topology.FEATURE_MAP: (4, C, 5, 5), Topology.SEQUENCE: (4, 5, C)}
BLUEPRINTS = {Topology.FEATURE_MAP: ("conv_small", "attention"), Topology.SEQUENCE: ("mlp_small", "attention")}
CASES = [(topology, name) for topology, names in BLUEPRINTS.items() for name in names]


class Stack(nn.Module):
    """Two sites in a row, a statistic of the batch and a random number in between; `by_hand` spells it out."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        conv = topology is Topology.FEATURE_MAP
        layer = (lambda: nn.Conv2d(C, C, 1)) if conv else (lambda: nn.Linear(C, C))
        self.below, self.middle, self.above = layer(), layer(), layer()
        self.low, self.high = nn.Tanh(), nn.SiLU()
        self.norm = nn.BatchNorm2d(C) if conv else nn.LayerNorm(C)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.low(self.below(x))
        return self.above(self.high(self.middle(self.drop(self.norm(h)))))

    def by_hand(self, x: Tensor, low: nn.Module, a: float, high: nn.Module, b: float) -> Tensor:
        """The same with h + a * delta(h) at the first site and h + b * delta(h) at the second."""
        h = torch.tanh(self.below(x))  # not self.low: its hook would join the seed a second time
        h = h + a * low(h)
        g = nn.functional.silu(self.middle(self.drop(self.norm(h))))
        return self.above(g + b * high(g))


def stack(topology: Topology, blueprint: str) -> tuple[Grown, Tensor]:
    """Float64, with a seed of ``blueprint`` in both slots."""
    torch.manual_seed(2)
    x = torch.randn(SHAPES[topology], dtype=torch.float64)
    grown = attach(Stack(topology).double(), {"r0c0": "low", "r1c0": "high"}, x, layout=topology.value)
    for slot, holder in grown.slots.items():
        holder.plant(
            build_seed(
                blueprint, dim=C, topology=topology, key=birth_key(5, slot, 1), dtype=torch.float64, device="cpu"
            )
        )
    return grown, x


def seeds(grown: Grown) -> tuple[nn.Module, nn.Module]:
    low, high = (holder.seed for holder in grown.slots.values())
    assert low is not None
    assert high is not None
    return low, high


def blended(grown: Grown, low: float, high: float) -> None:
    for holder, alpha in zip(grown.slots.values(), (low, high), strict=True):
        holder.phase = phase_of(Stage.BLENDING, Incubation.SHADOW)
        holder.set_alpha(alpha)


def objective(output: Tensor) -> Tensor:
    return (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum()


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: torch.zeros_like(named[name]) if g is None else g for name, g in zip(named, found, strict=True)}


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-12, msg=lambda text, n=name: n + text)


@pytest.mark.parametrize("alpha", [1e-3, 0.5, 1.0])
@pytest.mark.parametrize(("topology", "name"), CASES)
def test_output_and_all_gradients_are_those_of_the_closed_form(topology: Topology, name: str, alpha: float) -> None:
    grown, x = stack(topology, name)
    blended(grown, alpha, 0.25)
    torch.manual_seed(9)
    output = grown.model(x)
    torch.manual_seed(9)
    alpha32 = float(torch.tensor(alpha, dtype=torch.float32))  # alpha is agreed as a float32
    wanted = grown.model.by_hand(x, seeds(grown)[0], alpha32, seeds(grown)[1], 0.25)
    torch.testing.assert_close(output, wanted, rtol=1e-12, atol=1e-12)
    close(gradients(grown.model, objective(output)), gradients(grown.model, objective(wanted)))


@pytest.mark.parametrize("incubation", Incubation)
@pytest.mark.parametrize("stage", [stage for stage in Stage if stage.has_seed])
@pytest.mark.parametrize(("topology", "name"), CASES)
def test_no_stage_cuts_the_host_s_gradient(topology: Topology, name: str, stage: Stage, incubation: Incubation) -> None:
    """Below the slot it is the direct path, plus alpha times the path through the seed once it is blended."""
    grown, x = stack(topology, name)
    holder = grown.slots["r0c0"]
    holder.phase = phase_of(stage, incubation)
    low, _ = seeds(grown)
    for alpha in (1.0, 0.5) if stage.is_blended else (0.0,):
        holder.set_alpha(alpha)
        torch.manual_seed(9)
        found = gradients(grown.model, objective(grown.model(x)))
        below = {key: grad for key, grad in found.items() if key.startswith("below")}
        assert all(bool((grad != 0).any()) for grad in below.values())

        feature = torch.nn.functional.tanh(grown.model.below(x))
        leaf = (feature + alpha * low(feature)).detach().requires_grad_()
        torch.manual_seed(9)
        model = grown.model
        rest = model.above(model.high(model.middle(model.drop(model.norm(leaf)))))
        (upstream,) = torch.autograd.grad(objective(rest), leaf)
        named = dict(model.below.named_parameters(prefix="below"))
        direct = torch.autograd.grad(feature, list(named.values()), upstream, retain_graph=True)
        through = torch.autograd.grad(low(feature), list(named.values()), upstream)
        for key, one, other in zip(named, direct, through, strict=True):
            torch.testing.assert_close(below[key], one + alpha * other, rtol=1e-9, atol=1e-12)
            assert bool((one != 0).any())


@pytest.mark.parametrize("other", [Stage.TRAINING, Stage.BLENDING])
@pytest.mark.parametrize(("topology", "name"), CASES)
def test_the_shadow_gradient_is_that_of_the_full_alpha_model_with_a_frozen_host(
    topology: Topology, name: str, other: Stage
) -> None:
    """The other slot: a TRAINING seed does not take part, a blended one does at its own alpha, frozen."""
    grown, x = stack(topology, name)
    aside = grown.slots["r1c0"]
    aside.phase = phase_of(other, Incubation.SHADOW)
    alpha = 0.25 if other.is_blended else 0.0
    aside.set_alpha(alpha)
    before = {key: value.clone() for key, value in grown.model.state_dict().items()}
    torch.manual_seed(9)
    loss = objective(grown.incubate("r0c0", x))
    found = gradients(grown.model, loss)
    for key, value in grown.model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} moved"
    outside = [key for key in found if not key.startswith("esper_slots.r0c0.")]
    assert not any(found[key].any() for key in outside)

    by_hand = copy.deepcopy(grown.model)
    grown_by_hand = Grown(by_hand, grown.sites)
    low, high = seeds(grown_by_hand)
    for holder in grown_by_hand.slots.values():
        holder.uproot()
    torch.manual_seed(9)
    wanted = gradients(low, objective(by_hand.by_hand(x, low, 1.0, high, alpha)))
    assert all(bool((grad != 0).any()) for grad in wanted.values())
    close({key.removeprefix("esper_slots.r0c0.seed."): found[key] for key in found if key not in outside}, wanted)


@pytest.mark.parametrize(("topology", "name"), CASES)
def test_straight_through_teaches_the_seed_as_if_it_had_been_added(topology: Topology, name: str) -> None:
    """To first order: the upstream gradient is the bare host's, the seed's input is detached."""
    grown, x = stack(topology, name)
    low, _ = seeds(grown)
    grown.slots["r0c0"].phase = phase_of(Stage.TRAINING, Incubation.STE)
    torch.manual_seed(9)
    found = gradients(low, objective(grown.model(x)))
    model = grown.model
    leaf = torch.tanh(model.below(x)).detach().requires_grad_()
    torch.manual_seed(9)
    rest = model.above(model.high(model.middle(model.drop(model.norm(leaf)))))
    (upstream,) = torch.autograd.grad(objective(rest), leaf)
    named = dict(low.named_parameters())
    wanted = torch.autograd.grad(low(leaf.detach()), list(named.values()), upstream)
    close(found, dict(zip(named, wanted, strict=True)))
    assert all(bool((grad != 0).any()) for grad in wanted)


@pytest.mark.parametrize(("topology", "name"), CASES)
def test_a_living_model_can_be_copied_cast_and_loaded(topology: Topology, name: str) -> None:
    grown, x = stack(topology, name)
    blended(grown, 0.3, 0.7)
    grown.model.eval()
    wanted = grown.model(x)

    twin = Grown(copy.deepcopy(grown.model), grown.sites)
    assert torch.equal(twin.model(x), wanted)
    twin.slots["r0c0"].set_alpha(1.0)
    assert not torch.equal(twin.model(x), wanted), "the copy's hook reads the copied slot"
    assert torch.equal(grown.model(x), wanted), "and the original its own"

    alpha = grown.slots["r0c0"].alpha.clone()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        cast = Grown(copy.deepcopy(grown.model).to(dtype), grown.sites)
        holder = cast.slots["r0c0"]
        assert holder.alpha.dtype == torch.float32
        assert torch.equal(holder.alpha, alpha), "a cast to bf16 does not round alpha"
        output = cast.model(x.to(dtype))
        assert output.dtype == dtype
        limit = {torch.bfloat16: 0.1, torch.float32: 1e-5, torch.float64: 0.0}[dtype]
        torch.testing.assert_close(output.double(), wanted, rtol=limit, atol=limit)
    back = Grown(copy.deepcopy(grown.model).float().double(), grown.sites)
    assert torch.equal(back.slots["r0c0"].alpha, alpha)

    fresh, _ = stack(topology, name)
    with torch.no_grad():
        for parameter in fresh.model.parameters():
            parameter.normal_()
    fresh.model.load_state_dict(grown.model.state_dict(), strict=True)
    blended(fresh, 0.3, 0.7)
    assert torch.equal(fresh.model.eval()(x), wanted)


def test_a_host_in_half_precision_is_not_widened() -> None:
    grown, x = stack(Topology.FEATURE_MAP, "conv_small")
    grown.model.bfloat16()
    blended(grown, 0.5, 0.5)
    assert grown.model(x.bfloat16()).dtype == torch.bfloat16


def test_the_frozen_parts_of_a_shadow_forward_are_the_model_s_own() -> None:
    """`functional_call` must not put the detached weights into the model for good."""
    grown, x = stack(Topology.SEQUENCE, "mlp_small")
    named = {key: id(value) for key, value in grown.model.named_parameters()}
    grown.incubate("r1c0", x)
    assert named == {key: id(value) for key, value in grown.model.named_parameters()}
    assert all(parameter.requires_grad for parameter in grown.model.parameters())
    assert torch.equal(functional_call(grown.model.eval(), {}, (x,)), grown.model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING])
def test_transforms_of_torch_func_go_through_at_alpha_0_and_straight_through(stage: Stage) -> None:
    grown, x = stack(Topology.SEQUENCE, "mlp_small")
    model = grown.model.eval()
    for holder in grown.slots.values():
        holder.phase = phase_of(stage, Incubation.STE)
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, weights, (x,)).square().sum()

    def at(sample: Tensor) -> Tensor:
        return loss(weights, sample[None])

    gradients = grad(loss)(weights, x)
    model.zero_grad()
    loss(weights, x).backward()
    for name, parameter in weights.items():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-12, rtol=1e-10)
    samples = vmap(grad(at))(x)
    torch.testing.assert_close(samples, grad(lambda x: loss(weights, x))(x))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    slope = jvp(lambda x: loss(weights, x), (x,), (direction,))[1]
    torch.testing.assert_close(slope, (samples * direction).sum())
