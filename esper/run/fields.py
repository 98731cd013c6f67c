"""What the start handshake of a run compares over its ranks: settings, sources, data, weights, and what is computed."""

from functools import partial
from pathlib import Path

import torch

from esper.accord.breaker import BreakerOrder
from esper.config.tree import EsperConfig, load_config
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.blueprints import registry
from esper.kasmina.slots.sites import arguments
from esper.leyline.files import RunDir
from esper.leyline.imports import import_object
from esper.run.attempt import Attempt
from esper.tolaria.data.parts import PART_NAMES, Bundle
from esper.tolaria.ranks.computed import Computation, describe_computed
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.ranks.handshake import describe_code, machine_fields
from esper.tolaria.training.distill import Teacher
from esper.tolaria.training.engine import Engine
from esper.tolaria.training.precision import autocast, dtype_of


def import_named(config: EsperConfig) -> list[str]:
    """Imports every module that a dotted path of the config names; returns the names of the user's own modules.

    Every rank does so before anything that only one of them does, so that all have imported the same modules.
    """
    sections = ("host", "data", "task", "controller", "distill")
    paths = {key: getattr(getattr(config, key), "path", None) for key in sections}
    if config.distill.run is not None:
        teacher, _ = load_config(RunDir(Path(config.distill.run).expanduser()).config)
        paths["host of distill.run"] = getattr(teacher.host, "path", None)
    dotted = {key: path for key, path in paths.items() if path is not None and ":" in path}
    for key, path in dotted.items():
        import_object(path, key if " " in key else f"{key}.path")
    return [*(path.partition(":")[0] for path in dotted.values()), *registry.plugin_modules()]


def handshake_fields(
    config: EsperConfig,
    engine: Engine,
    bundle: Bundle,
    teacher: Teacher | None,
    attempt: Attempt,
    order: BreakerOrder | None,
    *,
    digest: int,
    modules: list[str],
) -> dict[str, str]:
    """The values that must be equal on all ranks, by name.

    Args:
        config: the run's settings.
        engine: before its beginning, with empty slots.
        bundle: the data.
        teacher: of a distillation, or None.
        attempt: this start.
        order: order to the breaker that this rank has read, or None.
        digest: of the config.
        modules: from `import_named`.
    """
    device, precision = engine.world.device, config.trainer.precision
    x = engine.evaluator.to_device(*bundle.train.fetch(torch.arange(2)))[0]
    args, kwargs = arguments(x)
    context = partial(autocast, precision, device)
    model = engine.grown.model
    computations = {
        "the model": Computation(model, lambda: model(*copy_inputs(args), **copy_inputs(kwargs)), context=context)
    }
    if teacher is not None:
        call = teacher.call
        computations["the teacher"] = Computation(
            teacher.module, lambda: call(x.clone()), context=context, modes=("eval",)
        )
    sizes = " ".join(f"{name}={len(getattr(bundle, name))}" for name in PART_NAMES)
    return {
        "run directory": attempt.token,
        "order to the breaker": str(order),
        "config": str(digest),
        "code": describe_code(modules),
        "registry": registry.describe_registry(device, dtype_of(precision)),
        "features": " ".join(f"{slot}={site.describe()}" for slot, site in engine.grown.sites.items()),
        "data": f"{sizes} digest={bundle.digest:x}",
        "teacher": "none" if teacher is None else f"{teacher.source}, {teacher.digest:016x}",
        "observers": " ".join(engine.cycle.observers.names),
        "first weights": str(digest_tensors(model.state_dict().items())),
        **describe_computed(engine.world, computations, on="default"),
        **machine_fields(device),
    }
