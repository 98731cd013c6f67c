"""Turns a task for a growth policy into the config of a run.

Everything but host, data and length is the same in all tasks: one process, a constant learning rate after a warm-up,
since growth makes steps dearer and nobody knows how many a budget buys, and gates that bind.
"""

from collections.abc import Mapping
from typing import Any

from esper.config.strict import as_plain
from esper.config.tree import FIXED_SECTIONS, EsperConfig, RunConfig, build_config
from esper.kasmina.hosts import CNNConfig, GPTConfig
from esper.simic.env.tasks import Family, GrowthTask
from esper.tamiyo.none import NoneConfig
from esper.tolaria.data import DigitsConfig, PySourceConfig, RecallConfig
from esper.tolaria.tasks import OfDataConfig

BLOCK = 16  # bytes that a host sees
VALIDATION, PROBE, TEST = 192, 384, 256  # samples
DIGITS = 1797
SETTINGS: dict[str, Any] = {
    "trainer.batch": 32,
    "trainer.objective": "validation_loss",
    "control.max_steps": 1000,
    "checkpoint.every_ticks": 0,
    "governor.snapshot_ticks": 1_000_000,  # a trial never goes back: a panic ends it
    "slots.incubation": "immediate",
    "slots.embargo_ticks": 2,
    "gates.probe_samples": 64,
    "optim.schedule": "constant",
    "optim.warmup_steps": 20,
    "optim.seed_lr_scale": 1.0,
    "optim.seed_warmup_steps": 10,
    "world.nproc_per_node": 1,
    "telemetry.level": "off",
    "telemetry.console": "off",
    "telemetry.wandb.mode": "disabled",
}
RATES = {Family.DIGITS: 0.02, Family.BYTES: 0.01, Family.RECALL: 0.01}


def host_of(task: GrowthTask) -> Any:
    """The host's settings."""
    if task.family is Family.DIGITS:
        return CNNConfig(widths=[task.width * 2**stage for stage in range(task.depth)])
    length = BLOCK if task.family is Family.BYTES else data_of(task).length
    return GPTConfig(layers=task.depth, heads=2, dim=task.width, block=length)


def data_of(task: GrowthTask) -> Any:
    """The data's settings; the training part has ``task.samples``, the parts for judging are the same in all tasks."""
    if task.family is Family.DIGITS:
        test = DIGITS - VALIDATION - PROBE - task.samples
        return DigitsConfig(validation=VALIDATION, probe=PROBE, test=test, label_noise=task.noise)
    if task.family is Family.BYTES:
        most = (VALIDATION + PROBE + TEST + task.samples) * (BLOCK + 1)
        return PySourceConfig(validation=VALIDATION, probe=PROBE, test=TEST, block=BLOCK, max_bytes=most)
    return RecallConfig(
        validation=VALIDATION,
        probe=PROBE,
        test=TEST,
        train=task.samples,
        label_noise=task.noise,
        chains=3,
        keys=6,
        values=4,
        questions=4,
    )


def trial_config(task: GrowthTask, seed: int, settings: Mapping[str, Any] | None = None) -> EsperConfig:
    """The config of a trial; ``trainer.steps`` is the budget in steps of the bare host.

    Args:
        task: the task.
        seed: of first weights, order of the data and seeds' weights.
        settings: further ones by dotted path, such as {"slots.incubation": "shadow"}; they win.

    Raises:
        ConfigError: a setting is unknown or wrong, or settings contradict each other.
    """
    sections = {name: cls() for name, cls in FIXED_SECTIONS.items() if cls is not RunConfig}
    plain: dict[str, Any] = as_plain(
        {
            "seed": seed,
            "run": RunConfig(dir="unused", name=task.name),
            "host": host_of(task),
            "data": data_of(task),
            "task": OfDataConfig(),
            "controller": NoneConfig(),
            **sections,
        }
    )
    own = {"trainer.steps": task.steps, "control.every": task.every, "optim.lr": RATES[task.family]}
    for path, value in {**SETTINGS, **own, **(settings or {})}.items():
        *names, key = path.split(".")
        place = plain
        for name in names:
            place = place.setdefault(name, {})
        place[key] = as_plain(value)
    return build_config(plain)
