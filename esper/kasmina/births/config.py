"""Settings of the seed library."""

from dataclasses import dataclass

from esper.leyline.fields import Checks


@dataclass(kw_only=True, slots=True)
class LibraryConfig:
    """Where births are kept, and who builds them."""

    enabled: bool = False
    """Births go through the library; otherwise each seed is built where it is staged, and nothing is kept."""

    root: str | None = None
    """Folder of the library, which runs may share; null: RUN/library."""

    require: bool = False
    """An entry that is missing fails the germination instead of being built (a pinned library)."""

    background: bool = True
    """A thread builds while training goes on; otherwise the tick that stages a seed builds it."""

    when_idle: bool = True
    """The thread works only while a core of the machine is idle; a seed that it has not begun is built at its tick."""

    wait_s: float = 20.0
    """Seconds that the following tick waits for the thread before it says NOT_READY."""

    memory_mib: int = 256
    """MiB of births that stay in memory, those used last; 0: none."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("root", self.root is None or self.root.strip() != "", "must name a folder, or null for RUN/library")
            check("require", not self.require or self.enabled, "needs library.enabled=true")
            check("require", not self.require or self.root is not None, "needs library.root; RUN/library begins empty")
            check("wait_s", self.wait_s > 0, "seconds, must be > 0")
            check("memory_mib", self.memory_mib >= 0, "MiB, must be >= 0")
