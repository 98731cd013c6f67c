"""The connections under a process group, so that a wait in it can be ended from another thread.

gloo offers no way to end a wait before its limit: `abort` leaves the waiting thread where it is. What ends it is the
end of its connections. So the sockets that came up with a group are noted, and `cut` shuts them down: every rank that
waits in the group has an error at once. Only Linux tells a process its sockets; elsewhere none are found, and waits
end by their limit.
"""

import contextlib
import os
import socket

from esper.leyline.errors import ConfigError

with contextlib.suppress(ImportError):  # not on Windows
    import resource

OWN_FILES = 256  # of a process beside its connections: data, caches, logs, pipes, the libraries of a GPU
Connections = frozenset[tuple[int, str]]  # descriptor, and the name of what it stood for


def allow_connections(ranks: int, meshes: int) -> None:
    """Raises this process's limit of open files to what its groups need: gloo connects each rank to every other one.

    Args:
        ranks: number of ranks.
        meshes: groups over gloo that exist at one time.

    Raises:
        ConfigError: the machine does not allow so many.
    """
    needed = meshes * (ranks - 1) + OWN_FILES
    try:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except NameError:
        return
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ConfigError(
            f"{ranks} ranks need {needed:,} open files in each process ({meshes} meshes of connections and {OWN_FILES} "
            f"of its own), and this machine allows {hard:,}: raise its hard limit (ulimit -Hn; under Slurm LimitNOFILE "
            "of slurmd)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def connections() -> Connections:
    """The sockets of this process that have a peer."""
    found = set()
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{name}")
                if target.startswith("socket:") and _has_peer(int(name)):
                    found.add((int(name), target))
    return frozenset(found)


def _has_peer(number: int) -> bool:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as copy:
        copy.getpeername()
        return True
    return False


def cut(which: Connections) -> None:
    """Shuts down those that are still open."""
    for number, target in which & connections():
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}") == target:
                with socket.socket(fileno=os.dup(number)) as copy:
                    copy.shutdown(socket.SHUT_RDWR)
