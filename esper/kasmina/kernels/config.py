"""Settings of compiled kernels."""

from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.fields import Checks


class Prepare(StrEnum):
    """When kernels of seeds that may be born are compiled, beside the births themselves."""

    AHEAD = "ahead"
    START = "start"
    OFF = "off"


@dataclass(kw_only=True, slots=True)
class CompileConfig:
    """Where compiled kernels are kept, and who compiles them ahead (``trainer.compile`` with ``inductor``)."""

    cache: str | None = None
    """Folder of compiled kernels, which ranks, runs and requeues share. Kernels are code: it must be yours, and open to
    nobody else (mode 0700), or nothing in it is read. null: ~/.cache/esper/kernels, or that below XDG_CACHE_HOME.
    """

    prepare: Prepare = Prepare.AHEAD
    """``ahead``: a niced process beside the ranks of each machine compiles what may be born next; ``start``: training
    begins once it has done so, with several ranks after half of ``control.startup_timeout_s`` at the latest; ``off``: a
    seed is compiled at its birth. The numbers of the run are the same.
    """

    seconds: float = 1800.0
    """Seconds after which that process ends, done or not."""

    memory_mib: int = 4096
    """MiB of memory, its compilers included, above which it ends."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            named = self.cache is None or self.cache.strip() != ""
            check("cache", named, "must name a folder, or null for ~/.cache/esper/kernels")
            check("seconds", self.seconds > 0, "must be > 0")
            check("memory_mib", self.memory_mib >= 1, "MiB, must be >= 1")
