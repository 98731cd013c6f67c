"""Nonces that have come, so that no order is taken twice; kept in a file that outlives restarts, purged by time.

An entry is kept until its order would be too old to be taken anyway, so the ledger is as long as a window's orders.
Only orders with a good signature come into it, so nobody without the key can make it longer.
"""

from pathlib import Path

from esper.leyline.files import append_synced, write_whole

_SPARE = 256  # dead lines that the file may hold beside as many as live ones


class Ledger:
    """The nonces of one run.

    Args:
        path: of the file; made with the first entry.
        keep_ms: milliseconds for which an order could still be taken.

    Attributes:
        since_ms: orders given before this time are too old; above 0 if the file was damaged, so that none is taken
            twice.
    """

    def __init__(self, path: Path, *, keep_ms: int, now_ms: int) -> None:
        self.path, self.keep_ms, self.since_ms = path, keep_ms, 0
        self._given: dict[str, tuple[int, str]] = {}  # nonce -> when its order was given, and by whom
        self._latest: dict[str, int] = {}  # sender -> when their latest order was given
        self._lines = 0
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return
        for line in lines:
            words = line.decode("ascii", "replace").split()
            if not line.endswith(b"\n") or len(words) != 3 or not words[0].isdecimal():
                self.since_ms = now_ms + keep_ms
                continue
            self._note(int(words[0]), words[1], words[2])
        self._lines = len(lines)
        self.purge(now_ms)

    def __len__(self) -> int:
        return len(self._given)

    def __contains__(self, nonce: str) -> bool:
        return nonce in self._given

    def latest(self, sender: str) -> int:
        """When the latest order of a sender was given; 0 if there was none lately."""
        return self._latest.get(sender, 0)

    def add(self, time_ms: int, nonce: str, sender: str) -> None:
        """Notes an order; it is on the disk when this returns.

        Raises:
            OSError: the disk refuses; the order must not be taken.
        """
        append_synced(self.path, f"{time_ms} {nonce} {sender}\n".encode("ascii"), mode=0o600)
        self._lines += 1
        self._note(time_ms, nonce, sender)

    def _note(self, time_ms: int, nonce: str, sender: str) -> None:
        self._given[nonce] = (time_ms, sender)
        self._latest[sender] = max(time_ms, self.latest(sender))

    def purge(self, now_ms: int) -> None:
        """Forgets what is too old to come again, in the file too once it holds many such lines.

        Raises:
            OSError: the disk refuses; the file is as before.
        """
        oldest = now_ms - self.keep_ms
        if self._given and min(self._given.values())[0] < oldest:
            self._given = {nonce: given for nonce, given in self._given.items() if given[0] >= oldest}
            self._latest = {name: given for name, given in self._latest.items() if given >= oldest}
        if self._lines <= 2 * len(self._given) + _SPARE:
            return
        lines = [f"{given} {nonce} {name}\n" for nonce, (given, name) in self._given.items()]
        write_whole(self.path, "".join(lines), mode=0o600)
        self._lines = len(lines)
