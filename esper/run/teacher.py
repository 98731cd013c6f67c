"""Builds a run's teacher: the network of another run's checkpoint, or what a function of the user returns.

Every rank builds it by itself from the same files; the start handshake compares the digests.
"""

from pathlib import Path

import torch
from torch import Tensor

from esper.config.tree import EsperConfig, load_config
from esper.config.trust import TRUST_TEACHER
from esper.kasmina.hosts.custom import call_builder
from esper.kasmina.slots.confidence import confident
from esper.leyline.errors import CheckpointError, ConfigError
from esper.leyline.files import RunDir
from esper.run.rebuild import rebuild_run
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data.parts import Bundle
from esper.tolaria.training.distill import Teacher
from esper.tolaria.training.precision import dtype_of


def build_teacher(config: EsperConfig, bundle: Bundle, device: torch.device) -> Teacher | None:
    """Builds the teacher that the section ``distill`` names, on the device, in the run's dtype; None if it names none.

    It may draw from torch's global random stream; `esper.run.assembly.assemble` seeds that anew.

    Raises:
        ConfigError: the teacher cannot be built; the text names the setting.
        CheckpointError: the teacher cannot be loaded; the text names the file.
    """
    teacher = None
    if config.distill.run is not None:
        teacher = _load_teacher(config, bundle)
    elif config.distill.path is not None:
        torch.manual_seed(config.seed)
        module = call_builder(
            config.distill.path, config.distill.options or {}, bundle.input_shape, bundle.classes, section="distill"
        )
        teacher = Teacher(module, config.distill.path)
    if teacher is not None:
        teacher.module.to(device=device, dtype=dtype_of(config.trainer.precision))
    return teacher


def _load_teacher(config: EsperConfig, bundle: Bundle) -> Teacher:
    """The network of the checkpoint that ``distill.run`` and ``distill.step`` name."""
    run = Path(str(config.distill.run)).expanduser().absolute()
    teacher_config, _ = load_config(RunDir(run).config, trusted=config.distill.trust, instead=TRUST_TEACHER)
    store = CheckpointStore.of_run(run)
    step = config.distill.step or store.best()
    steps = ", ".join(map(str, sorted(store.steps()))) or "none"
    if step not in store.steps():
        what = "no checkpoint with a validation score" if step is None else f"no checkpoint of step {step}"
        raise CheckpointError(f"distill.run = {str(run)!r}: {what}; there are {steps}; set distill.step to one of them")
    store.verify(step, ("state.pt",))
    try:
        grown, _, _ = rebuild_run(teacher_config, bundle, store, step)
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"distill.run = {str(run)!r}: its network does not fit this run's data; {error}") from error

    def call(x: Tensor) -> Tensor:
        with confident(grown, x):
            logits: Tensor = grown.model(x)
        return logits

    return Teacher(grown.model, f"{run}, step {step}", call)
