"""Kind of host x operator x incubation x precision: the contracts that hold for all of them, and a life to a fossil.

The standing suite takes each kind once, so that operators, incubations and precisions take turns; the full product is
under ``slow``.
"""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.export.exporter import export
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Operator
from esper.leyline.stages import Stage
from tests.support.bitwise import bits
from tests.support.host_kinds import KINDS, Kind, ask, logits_of
from tests.support.sessions import GATES
from tests.support.tiny import act
from tests.support.tiny import bits as digests
from tests.support.working_seeds import set_to_work

SLOT, EVERY = "r0c0", 2
INCUBATIONS = ("immediate", "shadow", "ste")
PRECISIONS = {"float32": torch.float32, "autocast": torch.float32, "bfloat16": torch.bfloat16}
LANGUAGE = {name for name, kind in KINDS.items() if kind.language}  # CONFIDENCE needs class logits [B, K]
FULL = [
    cell
    for cell in itertools.product(KINDS, Operator, INCUBATIONS, PRECISIONS)
    if not (cell[0] in LANGUAGE and cell[1] is Operator.CONFIDENCE)
]


def standing() -> set[tuple[str, Operator, str, str]]:
    """A cell for each kind; operators, incubations and precisions take turns."""
    cells = {("Conv1d", Operator.MULTIPLY, "shadow", "bfloat16")}  # a factor that bfloat16 rounds
    for index, name in enumerate(KINDS):
        turn = list(Operator)[index % 5]
        operator = Operator.ADD if name in LANGUAGE and turn is Operator.CONFIDENCE else turn
        precision = "bfloat16" if name == "Llama" else list(PRECISIONS)[(index // 2) % 3]
        cells.add((name, operator, INCUBATIONS[index % 3], precision))
    return cells


STANDING = standing()
CELLS = [
    pytest.param(
        *cell,
        id="-".join([cell[0], cell[1].name, *cell[2:]]),
        marks=[] if cell in STANDING else [pytest.mark.slow],
    )
    for cell in FULL
]
pytestmark = pytest.mark.filterwarnings("ignore:.*lazily initialized:UserWarning")


def test_the_standing_cells_meet_every_kind_operator_incubation_and_precision() -> None:
    assert set(FULL) >= STANDING
    for column, wanted in enumerate((set(KINDS), set(Operator), set(INCUBATIONS), set(PRECISIONS))):
        assert {cell[column] for cell in STANDING} == wanted


def around(precision: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()


def runs_here(kind: Kind, precision: str) -> str:
    """Why torch cannot train this host without slots in this precision here (an LSTM without bf16); "" where it can."""
    try:
        model, dtype = kind.make(PRECISIONS[precision]), PRECISIONS[precision]
        with around(precision):
            loss, _ = ask(model, kind.batch(0, dtype))
        loss.mean().backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def seed_for(grown: Grown, kind: Kind) -> nn.Module:
    site = grown.sites[SLOT]
    dtype = next(p.dtype for p in grown.model.parameters())
    key = birth_key(1, SLOT, 1)
    return build_seed(kind.blueprint, dim=site.dim, topology=site.topology, key=key, dtype=dtype, device="cpu")


def learnt(grown: Grown, kind: Kind, precision: str, shadow: bool = False) -> dict[str, Tensor]:
    """Loss and gradients of one step in train(), from the same random numbers."""
    model, batch = grown.model.train(), kind.batch(1, PRECISIONS[precision])
    model.zero_grad()
    logits = torch.randn(len(batch[0]), 3, generator=torch.Generator().manual_seed(0))
    with around(precision), grown.logits(logits):
        torch.manual_seed(4)
        total = found = ask(model, batch)[0].mean()
        if shadow:
            torch.manual_seed(4)
            total = total + grown.shadow_loss(SLOT, lambda call: ask(call, batch)[0].mean())
    total.backward()
    named = model.named_parameters()
    return {"loss": found.detach(), **{name: p.grad.clone() for name, p in named if p.grad is not None}}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Whether all that ``wanted`` names has the same bits."""
    for name, tensor in wanted.items():
        assert bits(found[name], tensor), name


def check_one_step(kind: Kind, operator: Operator, precision: str) -> None:
    """Identity at alpha 0, isolation of a shadow and of straight-through, and the floor under the host's gradient."""
    dtype = PRECISIONS[precision]
    grown = esper.attach(kind.make(dtype), {SLOT: kind.site}, kind.batch(0, dtype)[0], may_skip=kind.may_skip)
    bare = learnt(grown, kind, precision)
    set_to_work(grown, SLOT, seed_for(grown, kind), 0.0, operator)
    holder = grown.slots[SLOT]
    own = {f"{CONTAINER}.{SLOT}.{name}" for name, _ in holder.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in kind.make(dtype).named_buffers()}

    def step(phase: Phase, alpha: float, shadow: bool = False) -> dict[str, Tensor]:
        with torch.no_grad():  # running statistics begin anew
            for name, buffer in buffers.items():
                grown.model.get_buffer(name).copy_(buffer)
        holder.phase = phase
        holder.operator = operator if phase is Phase.BLEND or not operator.is_gated else Operator.ADD
        holder.set_alpha(alpha)
        return learnt(grown, kind, precision, shadow)

    same(step(Phase.BLEND, 0.0), bare)
    same(step(Phase.STRAIGHT, 0.0), bare)
    found = step(Phase.OFF, 0.0, shadow=True)
    same(found, bare)
    seeds = {name for name in own if ".seed." in name}
    assert {name for name in found if name.startswith(CONTAINER)} == seeds
    assert all(bool(found[name].any()) for name in seeds)
    for alpha in (0.5, 1.0):
        found = step(Phase.BLEND, alpha)
        assert own <= set(found)
        below = [grad for name, grad in found.items() if name.startswith(kind.below) and bare[name].any()]
        assert below
        assert all(bool(grad.any()) for grad in below)
        assert not bits(found["loss"], bare["loss"])


class Life:
    """A user's loop through the life of one seed."""

    def __init__(self, kind: Kind, operator: Operator, incubation: str, precision: str, *, grow: bool) -> None:
        torch.manual_seed(6)
        self.kind, self.dtype = kind, PRECISIONS[precision]
        model = kind.make(self.dtype)
        grown = esper.attach(model, {SLOT: kind.site}, kind.batch(0, self.dtype)[0], may_skip=kind.may_skip)
        self.ran = 0
        model.get_submodule(kind.site).register_forward_hook(self._count)
        actions = [
            act(1, SLOT, "GERMINATE", blueprint=kind.blueprint, ticks=2, operator=operator.name),
            *(act(tick, SLOT, "ADVANCE") for tick in (3, 5, 8)),
            act(9, SLOT, "FOSSILIZE"),
        ]

        def loss(called: Any, batch: Any) -> Any:
            with around(precision):
                return ask(called, batch)

        self.session = esper.Session(
            grown,
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01),
            controller={"kind": "schedule", "actions": actions} if grow else "none",
            loss=loss,
            probe=[kind.batch(100 + index, self.dtype) for index in range(4)],
            every=EVERY,
            gates=GATES,
            slots={"incubation": incubation, "channels": {SLOT: ",".join(["0.5"] * grown.sites[SLOT].dim)}},
            class_logits=not kind.language,
        )
        self.grown = grown

    def _count(self, module: nn.Module, *call: Any) -> None:
        self.ran += module.training

    def train(self, first: int, last: int) -> None:
        for number in range(first, last):
            self.session.loss(self.kind.batch(number, self.dtype)).backward()
            self.session.step()

    def host(self) -> dict[str, str]:
        tensors = (*self.grown.model.named_parameters(), *self.grown.model.named_buffers())
        return digests((name, tensor) for name, tensor in tensors if not name.startswith(CONTAINER))

    @property
    def stage(self) -> Stage:
        return self.session.state.slot(SLOT).stage


def check_life(kind: Kind, operator: Operator, incubation: str, precision: str) -> nn.Module:
    """The host's weights and statistics are those of the run without growth while the seed incubates; then it lives."""
    one = Life(kind, operator, incubation, precision, grow=True)
    other = Life(kind, operator, incubation, precision, grow=False)
    until = 3 * EVERY - 1 if incubation == "immediate" else 5 * EVERY - 1
    one.train(0, until)
    streams = torch.get_rng_state()
    torch.manual_seed(6)
    other.train(0, until)
    assert one.stage is (Stage.GERMINATED if incubation == "immediate" else Stage.TRAINING)
    assert one.host() == other.host()
    other.session.close()
    torch.set_rng_state(streams)
    one.train(until, 10 * EVERY)
    assert one.stage is Stage.FOSSILIZED
    assert (one.ran < 10 * EVERY) == kind.may_skip
    one.session.close()
    return one.grown


@pytest.mark.parametrize(("name", "operator", "incubation", "precision"), CELLS)
def test_a_kind_of_host_keeps_the_contracts_and_grows(
    name: str, operator: Operator, incubation: str, precision: str
) -> None:
    kind = KINDS[name]
    if kind.needs is not None:
        pytest.importorskip(kind.needs, reason=f"{kind.needs} is not among the project's dependencies")
    if why := runs_here(kind, precision):
        pytest.skip(f"torch cannot train this host without slots here: {why}")
    check_one_step(kind, operator, precision)
    grown = check_life(kind, operator, incubation, precision)
    model, x = grown.model.eval(), kind.batch(200, PRECISIONS[precision])[0]
    plain = export(grown, fold=False).module.eval()
    assert not [part for part in plain.modules() if type(part).__module__.startswith("esper")]
    with torch.no_grad(), plain_attention():
        assert bits(logits_of(plain(x)), logits_of(model(x)))
        with grown.disabled():
            assert not bits(logits_of(plain(x)), logits_of(model(x)))
    if kind.generates:
        check_generation(model, plain, x)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fused path of encoder layers, which a layer with an active slot does not take."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def check_generation(model: Any, plain: Any, x: Tensor) -> None:
    """With a cache as without, grown and exported; in float32, where a cache changes no choice by its rounding."""
    model, plain = copy.deepcopy(model).float(), copy.deepcopy(plain).float()
    words = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(x)}
    with torch.no_grad():
        expected = model.generate(x, use_cache=False, **words)
        for each in (model, plain):
            assert torch.equal(each.generate(x, use_cache=True, **words), expected)
