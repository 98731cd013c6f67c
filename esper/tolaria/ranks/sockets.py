"""The connections under a process group, so that a wait in it can be ended from another thread.

gloo offers no way to end a wait before its limit: `abort` leaves the waiting thread where it is. What ends it is the
end of its connections. So the sockets that came up with a group are noted, and `cut` shuts them down: every rank that
waits in the group has an error at once. Only Linux tells a process its sockets; elsewhere none are found, and waits
end by their limit.
"""

import contextlib
import os
import socket

Connections = frozenset[tuple[int, str]]  # descriptor, and the name of what it stood for


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
