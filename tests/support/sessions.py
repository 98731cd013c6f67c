"""Small sessions for tests: a convolutional host in float64 on noise that has a pattern, a scheduled life, a replica.

session = make(host(), loader_steps...)      # alone, or inside `tests.support.dist.run_distributed`
train(session, range(0, 20))                 # the user's loop, step by step, on this rank's share of each global batch
replica(session)                             # every bit that must be equal on all ranks
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import esper
from esper.leyline.events import Event, StageChanged
from esper.leyline.plain import to_plain
from tests.support.tiny import act, bits

A, B = "r0c0", "r1c0"
SITES = {A: "0", B: "3"}
EVERY = 2
LIFE = (
    act(1, A, "GERMINATE", blueprint="conv_light", ticks=2),
    act(3, A, "ADVANCE"),
    act(3, B, "GERMINATE", blueprint="norm", ticks=1),
    act(5, A, "ADVANCE"),
    act(5, B, "ADVANCE"),
    act(7, B, "ADVANCE"),
    act(8, A, "ADVANCE"),
    act(9, A, "FOSSILIZE"),
    act(9, B, "PRUNE", ticks=0),
)
STAGES = [
    (A, "GERMINATED"),
    (A, "TRAINING"),
    (B, "GERMINATED"),
    (A, "BLENDING"),
    (B, "TRAINING"),
    (B, "BLENDING"),
    (A, "HOLDING"),
    (A, "FOSSILIZED"),
    (B, "PRUNED"),
    (B, "EMBARGOED"),
    (B, "RESETTING"),
    (B, "EMPTY"),
]
LIFE_STEPS = 14 * EVERY
GATES = {"evidence": "observe", "probe_samples": 16, "min_samples": 8, "first_look": 1, "look_every": 1}


def host(*, dropout: float = 0.0, batch_norm: bool = False, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Equal weights wherever it is built; no other random stream moves."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4) if batch_norm else nn.ReLU(), nn.Dropout(dropout)]
        layers += [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)]
        return nn.Sequential(*layers).to(dtype)


def batch(step: int, size: int = 8, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The global batch of a step."""
    generator = torch.Generator().manual_seed(1000 + step)
    y = torch.randint(3, (size,), generator=generator)
    x = torch.randn(size, 1, 6, 6, generator=generator) + y.view(-1, 1, 1, 1) * 0.7
    return x.to(dtype), y


def shard(data: tuple[Tensor, Tensor], rank: int, world: int) -> tuple[Tensor, ...]:
    """A rank's share of a batch."""
    return tuple(tensor.chunk(world)[rank] for tensor in data)


def probe(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    return [batch(-1 - index, 8, dtype=dtype) for index in range(8)]


def loss(model: Any, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, y = data
    output = model(x)
    return F.cross_entropy(output, y, reduction="none"), (output.argmax(1) == y).double()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def scheduled(actions: Iterable[dict[str, Any]] = LIFE) -> dict[str, Any]:
    return {"kind": "schedule", "actions": list(actions)}


def make(
    model: nn.Module | None = None,
    *,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    actions: Iterable[dict[str, Any]] = LIFE,
    **more: Any,
) -> esper.Session:
    """A session whose controller follows a schedule, its gates observing."""
    model = host() if model is None else model
    dtype = next(model.parameters()).dtype
    grown = esper.attach(model, SITES, batch(0, 2, dtype=dtype)[0])
    made = optimizer(model)
    settings: dict[str, Any] = {
        "controller": scheduled(actions),
        "loss": loss,
        "probe": probe(dtype),
        "gates": GATES,
        "slots": {"incubation": "shadow", "max_live": None, "embargo_ticks": 1},
        "control": {"timeout_s": 20.0, "slow_timeout_s": 20.0},
        "every": EVERY,
        "seed_lr_scale": 1.0,
        "seed_warmup_steps": 2,
        "scheduler": None if scheduler is None else scheduler(made),
        **more,
    }
    return esper.Session(grown, made, **settings)


def train(session: esper.Session, steps: Iterable[int], size: int = 8) -> list[float]:
    """The user's loop; returns the losses as the user reads them."""
    world, dtype, losses = session.world, next(session.grown.model.parameters()).dtype, []
    for step in steps:
        found = session.loss(shard(batch(step, size, dtype=dtype), world.rank, world.size))
        found.backward()
        session.step()
        losses.append(found.item())
    return losses


def stages(session: esper.Session) -> list[tuple[str, str]]:
    return [(event.slot, event.target.name) for event in of(session, StageChanged)]


def of(session: esper.Session, kind: type[Event]) -> list[Any]:
    """Events of one class, in order."""
    return [event for event in session.events if isinstance(event, kind)]


def moments(session: esper.Session) -> dict[str, Tensor]:
    named = session._loop.owner.state_by_name()
    return {f"{name}.{k}": v for name, entry in named.items() for k, v in entry.items() if isinstance(v, Tensor)}


def replica(session: esper.Session) -> dict[str, Any]:
    """Everything that must be equal: parameters, buffers, moments, groups, phases, scheduler, the agreed state."""
    model, owner = session.grown.model, session._loop.adopted
    options = [{k: v for k, v in group.items() if k != "params"} for group in owner.optimizer.param_groups]
    return {
        "steps": session.steps,
        "parameters": bits(model.named_parameters()),
        "buffers": bits(model.named_buffers()),
        "learning": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "moments": bits(moments(session).items()),
        "groups": [(len(group["params"]), options[i]) for i, group in enumerate(owner.optimizer.param_groups)],
        "slots": {slot: (holder.phase.value, holder.level) for slot, holder in session.grown.slots.items()},
        "scheduler": None if owner.scheduler is None else owner.scheduler.state_dict(),
        "state": to_plain(session.state),
    }
