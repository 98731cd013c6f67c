"""The key of a run's orders, and signatures by it (HMAC-SHA256).

The key is 32 random bytes in RUN/orders/key, mode 0600: whoever can read it may give orders. Three kinds of text are
signed, each under a heading of its own, so that none can pass for another: orders, lines of the journal, and answers.
"""

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from pathlib import Path

from esper.leyline.errors import RunDirError

BYTES = 32


class NoKey(RunDirError):
    """There is no key that is its owner's alone."""


def sign(key: bytes, text: bytes) -> str:
    """The signature of a text, 64 hexadecimal digits."""
    return hmac.new(key, text, hashlib.sha256).hexdigest()


def is_signed(key: bytes, text: bytes, signature: str) -> bool:
    """Whether a signature is that of a text; takes the same time wherever it differs."""
    return hmac.compare_digest(sign(key, text).encode(), signature.encode("utf-8", "replace"))


def _is_private(handle: int) -> bool:
    status = os.fstat(handle)
    return stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o600 and status.st_uid == os.geteuid()


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _read(handle: int, path: Path) -> bytes:
    text = os.read(handle, 2 * BYTES + 2).decode("ascii", "replace").strip()
    if not re.fullmatch(f"[0-9a-f]{{{2 * BYTES}}}", text):
        raise NoKey(f"{path}: holds no key; restore it from a copy, or remove its folder and with it all orders")
    return bytes.fromhex(text)


def read_key(path: Path) -> bytes:
    """Reads a run's key, to give orders.

    Raises:
        NoKey: there is none, or others may read it, or it is somebody else's.
    """
    try:
        handle = _open(path)
    except OSError as error:
        raise NoKey(f"{path}: no key can be read there ({error.strerror}); orders need it") from None
    try:
        if not _is_private(handle):
            raise NoKey(f"{path}: is not yours alone (mode 0600, your own file), so orders are off")
        return _read(handle, path)
    finally:
        os.close(handle)


def make_key(path: Path) -> tuple[bytes | None, str]:
    """Reads a run's key, or makes one; its folder is made with it, for its owner alone.

    Returns:
        The key, None if none can be kept there, and why no orders may be taken by it; "" if they may.

    Raises:
        NoKey: the file holds something else.
        OSError: the disk refuses.
    """
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        handle, fresh = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), True
    except FileExistsError:
        handle, fresh = _open(path), False
    try:
        with contextlib.suppress(OSError):
            os.fchmod(handle, 0o600)
        why = "" if _is_private(handle) else f"{path}: a file there cannot be its owner's alone (mode 0600)"
        if not fresh:
            return _read(handle, path), why
        if not why:
            os.write(handle, secrets.token_bytes(BYTES).hex().encode() + b"\n")
            os.lseek(handle, 0, os.SEEK_SET)
            return _read(handle, path), ""
    finally:
        os.close(handle)
    path.unlink(missing_ok=True)
    return None, why
