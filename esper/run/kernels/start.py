"""Where a run's kernels go, and who compiles ahead."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esper.accord.state import RunState, Terms
from esper.config.strict import as_plain
from esper.config.tree import EsperConfig
from esper.kasmina.kernels.config import Prepare
from esper.kasmina.kernels.folder import FOLDER, private_folder
from esper.nissa.lane import say
from esper.run.kernels.foresee import Foreseen, foresee
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


@dataclass(frozen=True)
class Ahead:
    """The process that compiles ahead, and by what it is told what to compile.

    Fields:
        helper: the process.
        config: the run's settings.
        terms: of the run.
    """

    helper: Helper
    config: EsperConfig
    terms: Terms

    def begin(self, record: RunState) -> None:
        """Has what this agreed record foresees compiled in its order, which replaces that of the first record."""
        self.helper.tell(_describe(_foresee(self.config, self.terms, record)))

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """See `Helper.watched`."""
        return self.helper.watched()

    def close(self) -> None:
        """See `Helper.close`."""
        self.helper.close()


def _foresee(config: EsperConfig, terms: Terms, record: RunState) -> list[Foreseen]:
    return foresee(config.controller, terms.catalogue, terms.operators, record)


def _describe(foreseen: Sequence[Foreseen]) -> list[dict[str, Any]]:
    """As plain data."""
    return [
        {
            "slot": seed.slot,
            "blueprint": seed.blueprint,
            "operator": seed.operator.name,
            "fades_from": None if seed.fades_from is None else seed.fades_from.name,
        }
        for seed in foreseen
    ]


def start_helper(
    config: EsperConfig,
    world: World,
    bundle: Bundle,
    terms: Terms,
    example: Any,
    sizes: tuple[Sequence[int], Sequence[int]],
) -> Ahead | None:
    """Starts the process that compiles ahead; None on all ranks of a machine but one, or if there is nothing to do.

    It begins with what the first record of a run foresees, while this rank compiles the host and all agree where the
    run begins; `Ahead.begin` then gives the order.

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
    foreseen = _foresee(config, terms, RunState(slots=terms.first_slots()))
    if not foreseen:
        return None
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
        "foreseen": _describe(foreseen),
    }
    try:
        awaited = config.compile.prepare is Prepare.START
        return Ahead(Helper(order, os.environ[FOLDER], awaited=awaited), config, terms)
    except OSError as error:
        say(f"nothing is compiled ahead: {error.strerror or error}")
        return None


def await_helper(config: EsperConfig, world: World, ahead: Ahead | None) -> None:
    """With ``compile.prepare=start``, waits until all that is foreseen is compiled, and says how long that took.

    The other ranks wait meanwhile, each for ``control.startup_timeout_s``, so this one waits for half of that.
    """
    if ahead is None or config.compile.prepare is not Prepare.START:
        return
    helper, seconds, half = ahead.helper, config.compile.seconds, config.control.startup_timeout_s / 2
    told = helper.wait(seconds if world.size == 1 else min(seconds, half))
    if told is None and helper.process.poll() is None:
        helper.step_back()
        say("not all is compiled ahead in half of control.startup_timeout_s, nor waited for any longer; raise that")
    elif told is None:
        say("the process that compiles ahead ended without a word; births compile by themselves")
    else:
        why, took = f"; {told['why']}" if told["why"] else "", f"{told['seconds']:.0f} s"
        say(f"compiled ahead: {told['compiled']} seeds in {took}, {told['memory_mib']} MiB at most{why}")
