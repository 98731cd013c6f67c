"""A user's loop and the trainer's are one engine: the same batches, the same network, to the bit, after every step."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import esper
from esper.kasmina.hosts import build_host
from esper.leyline.events import CommandRefused, RampCommitted, StageChanged
from tests.support.tiny import act, bits, events, make_engine, schedule, tiny_config

A, B = "r0c0", "r1c0"
STEPS = 28
LIFE = [
    act(1, A, "GERMINATE", blueprint="conv_light", operator="GATE", ticks=2, target=0.5),
    act(1, B, "GERMINATE", blueprint="norm", operator="MULTIPLY", ticks=1),
    act(3, A, "ADVANCE"),
    act(3, B, "ADVANCE"),
    act(5, A, "ADVANCE"),
    act(6, B, "ADVANCE"),
    act(8, A, "SET_ALPHA_TARGET", target=1.0, operator="CONFIDENCE", ticks=2),
    act(8, B, "ADVANCE"),
    act(9, B, "FOSSILIZE"),
    act(11, A, "PRUNE", ticks=1),
]


def per_sample(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    output = model(batch[0])
    return F.cross_entropy(output, batch[1], reduction="none"), (output.argmax(1) == batch[1]).double()


def told(found: list[Any]) -> list[Any]:
    return [event for event in found if isinstance(event, StageChanged | RampCommitted | CommandRefused)]


def test_a_session_trains_what_the_engine_trains_bit_for_bit(tmp_path: Path) -> None:
    config = tiny_config(
        "cnn",
        controller=schedule(*LIFE),
        trainer__steps=STEPS,
        trainer__precision="fp64",
        optim__kind="adamw",
        optim__warmup_steps=0,
        optim__schedule="constant",
        optim__clip_norm=0.5,
    )
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    wanted = []
    for _ in range(STEPS):
        engine.train_step()
        if engine.tick_due():
            engine.tick()
        wanted.append(bits(engine.grown.model.named_parameters()))

    bundle, optim = engine.bundle, config.optim
    torch.manual_seed(config.seed)
    host = build_host(config.host, bundle.input_shape, bundle.classes).double()
    sites = {slot: site.module for slot, site in engine.grown.sites.items()}
    grown = esper.attach(host, sites, bundle.example().double())
    parts = [[p for p in host.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False)]
    groups = [{"params": ps, "weight_decay": wd} for ps, wd in zip(parts, (optim.weight_decay, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    probe = [bundle.probe.fetch(torch.arange(first, first + 16)) for first in range(0, 64, 16)]
    session = esper.Session(
        grown,
        optimizer,
        controller=schedule(*LIFE),
        loss=per_sample,
        probe=[(x.double(), y) for x, y in probe],
        every=config.control.every,
        seed=config.seed,
        steps=STEPS,
        clip_norm=optim.clip_norm,
        class_logits=True,
        seed_lr_scale=optim.seed_lr_scale,
        seed_warmup_steps=optim.seed_warmup_steps,
        slots=config.slots,
        gates=config.gates,
        seed_weight_decay=optim.seed_weight_decay,
    )
    for step in range(STEPS):
        x, y = bundle.train_batch(engine.plan.indices(step), seed=config.seed, epoch=engine.plan.locate(step)[0])
        session.loss((x.double(), y)).backward()
        session.step()
        assert bits(grown.model.named_parameters()) == wanted[step], f"step {step}"
    session.close()

    mine = [(type(e).__name__, e.tick, e.slot) for e in told(list(session.events))]
    assert mine == [(type(e).__name__, e.tick, e.slot) for e in told(events(engine).events)]
    assert [entry.stage.name for entry in session.state.slots] == ["RESETTING", "EMPTY", "FOSSILIZED"]
