"""Where a run's kernels go, and who compiles ahead."""

import os
from collections.abc import Sequence
from typing import Any

from esper.accord.state import Terms
from esper.config.strict import as_plain
from esper.config.tree import EsperConfig
from esper.kasmina.kernels.config import Prepare
from esper.kasmina.kernels.folder import FOLDER, private_folder
from esper.nissa.lane import say
from esper.run.kernels.foresee import foresee
from esper.run.kernels.helper import Helper
from esper.run.kernels.wire import describe_batch
from esper.tolaria.data.parts import Bundle
from esper.tolaria.ranks.world import World

KEPT_BY = "inductor"  # the one backend that keeps what it has compiled


def keep_kernels(config: EsperConfig, world: World, sizes: Sequence[int]) -> None:
    """Has torch keep what it compiles in this process in the folder of ``compile.cache``.

    Args:
        config: the run's settings.
        world: the ranks.
        sizes: batch sizes of rank 0, for which graphs are made.
    """
    if config.trainer.compile_backend != KEPT_BY:
        return
    folder, why = private_folder(config.compile.cache, world.device, sizes)
    if why and world.local_rank == 0:
        say(why)
    os.environ[FOLDER] = str(folder)


def start_helper(
    config: EsperConfig,
    world: World,
    bundle: Bundle,
    terms: Terms,
    example: Any,
    sizes: tuple[Sequence[int], Sequence[int]],
) -> Helper | None:
    """Starts the process that compiles ahead; None on all ranks of a machine but one, or if there is nothing to do.

    Args:
        config: the run's settings.
        world: the ranks.
        bundle: the data, of which only shapes are told.
        terms: of the run; they say what may be born.
        example: one batch of the model's input.
        sizes: batch sizes in training and evaluation, in the order in which they are rehearsed.
    """
    if config.trainer.compile_backend != KEPT_BY or config.compile.prepare is Prepare.OFF or world.local_rank:
        return None
    foreseen = foresee(config.controller, terms.catalogue, terms.operators)
    if not foreseen:
        return None
    names = [
        {
            "slot": seed.slot,
            "blueprint": seed.blueprint,
            "operator": seed.operator.name,
            "fades_from": None if seed.fades_from is None else seed.fades_from.name,
        }
        for seed in foreseen
    ]
    try:
        batch = describe_batch(example)
    except ValueError as error:
        say(f"nothing is compiled ahead: {error}")
        return None
    order = {
        "config": as_plain(config),
        "device": str(world.device),
        "input_shape": list(bundle.input_shape),
        "classes": bundle.classes,
        "example": batch,
        "train_sizes": list(sizes[0]),
        "eval_sizes": list(sizes[1]),
        "foreseen": names,
    }
    try:
        return Helper(order, os.environ[FOLDER])
    except OSError as error:
        say(f"nothing is compiled ahead: {error.strerror or error}")
        return None


def await_helper(config: EsperConfig, world: World, helper: Helper | None) -> None:
    """With ``compile.prepare=start``, waits until all that is foreseen is compiled, and says how long that took.

    The other ranks wait meanwhile, each for ``control.startup_timeout_s``, so this one waits for half of that.
    """
    if helper is None or config.compile.prepare is not Prepare.START:
        return
    seconds, half = config.compile.seconds, config.control.startup_timeout_s / 2
    told = helper.wait(seconds if world.size == 1 else min(seconds, half))
    if told is None and helper.process.poll() is None:
        say("not all is compiled ahead in half of control.startup_timeout_s, nor waited for any longer; raise that")
    elif told is None:
        say("the process that compiles ahead ended without a word; births compile by themselves")
    else:
        why = f"; {told['why']}" if told["why"] else ""
        say(f"compiled ahead: {told['compiled']} seeds in {told['seconds']:.0f} s{why}")
