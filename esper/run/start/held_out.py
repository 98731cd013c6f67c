"""A target that is none is told before anything is trained, and not when the first seed is born, hours later.

Data of a user's own are read sample by sample. Those that training reads show themselves in the first epoch, those that
are held out only when they are looked at: the probe at a birth, the test part at the very end. So each is read once, as
a new run begins, as far as a few seconds go.
"""

import time

import torch
import torch.distributed as dist

from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.data.parts import PART_NAMES, Bundle
from esper.tolaria.data.sampler import bounds
from esper.tolaria.ranks.world import World

OWN = "custom"  # the kind of data whose parts are read sample by sample
MOST = 4096  # samples of each part that are read
PIECE = 16
SECONDS = 10.0  # for all parts of a rank; what is left over is checked when it is used


def check_held_out(bundle: Bundle, world: World) -> None:
    """Reads the samples that are held out, each on one rank. Other data sets have checked theirs when they were loaded.

    Args:
        bundle: joined to its task.
        world: the ranks.

    Raises:
        DataError: one cannot be read, or its target is none; the same on all ranks.
    """
    if bundle.name != OWN:
        return
    wrong, until = "", time.monotonic() + SECONDS
    try:
        for name in PART_NAMES[1:]:
            part = getattr(bundle, name)
            rows = torch.arange(*bounds(min(len(part), MOST), world.rank, world.size))
            for piece in rows.split(PIECE) if len(rows) else ():
                if time.monotonic() > until:
                    break
                part.fetch(piece)
    except (ConfigError, DataError) as error:
        wrong = str(error)
    count = torch.tensor([bool(wrong)], dtype=torch.int64)
    if int(world.all_reduce(count, dist.ReduceOp.MAX, what="samples held out", on="default")):
        raise DataError(next(filter(None, world.gather_text(wrong, what="samples held out", width=1024))))
