"""The same host, data and task of one's own, by hand in a session and by the trainer: the same bits at every step."""

from pathlib import Path
from typing import Any

import torch

import esper
from esper.kasmina.hosts import build_host
from tests.support.tiny import bits, make_engine
from tests.support.toy_tasks import Counting, toy_config

STEPS = 50


def test_a_task_by_hand_is_the_trainers_bit_for_bit(tmp_path: Path) -> None:
    config = toy_config(
        "counting",
        controller={"kind": "none"},
        trainer__steps=STEPS,
        trainer__batch=13,
        optim__kind="adamw",
        optim__warmup_steps=0,
        optim__schedule="constant",
        optim__clip_norm=0.5,
        control__every=10,
    )
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    wanted, losses = [], []
    score = engine.task.score

    def noted(output: Any, target: Any) -> esper.Scores:
        found = score(output, target)
        if torch.is_grad_enabled():
            losses.append(found.loss.detach().sum().item())
        return found

    engine.task.score = noted  # type: ignore[method-assign]
    for _ in range(STEPS):
        engine.train_step()
        wanted.append(bits(engine.grown.model.named_parameters()))
        if engine.tick_due():
            engine.tick()

    bundle, optim, task = engine.bundle, config.optim, Counting(scale=2.0)
    torch.manual_seed(config.seed)
    host = build_host(config.host, bundle.input_shape, bundle.classes).double()
    grown = esper.attach(host, {"r0c0": "hidden"}, bundle.example())
    parts = [[p for p in host.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False)]
    groups = [{"params": ps, "weight_decay": wd} for ps, wd in zip(parts, (optim.weight_decay, 0.0), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    sums = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        found = task.score(model(batch[0]), batch[1]).loss
        sums.append(found.detach().sum().item())
        return found

    session = esper.Session(
        grown,
        optimizer,
        controller={"kind": "none"},
        loss=loss,
        every=10,
        seed=config.seed,
        steps=STEPS,
        clip_norm=optim.clip_norm,
        slots=config.slots,
        gates=config.gates,
    )
    for step in range(STEPS):
        batch = bundle.train_batch(engine.plan.indices(step), seed=config.seed, epoch=engine.plan.locate(step)[0])
        session.loss(batch).backward()
        session.step()
        assert bits(grown.model.named_parameters()) == wanted[step], f"step {step}"
    session.close()
    assert sums == losses
