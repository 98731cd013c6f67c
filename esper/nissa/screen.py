"""Standard output and standard error that never fail: what is printed must not decide what is saved or told.

    with safe_streams():        # around the main function of every process
        print("± is +- where the encoding lacks it; a pipe whose reader has gone takes the text, and drops it")

A run that has trained for days may print to an ASCII terminal, to ``| head``, to a disk that is full, or to a terminal
that was closed. Each would raise in the next ``print``; some libraries even end the process there.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # the reader, or the terminal, will not come back
_PLAIN = str.maketrans(
    {
        "±": "+-",
        "·": "-",
        "×": "x",
        "→": "->",
        "←": "<-",
        "…": "...",
        "≤": "<=",
        "≥": ">=",
        "–": "-",
        "—": "-",
        "━": "-",
        "─": "-",
        "╸": "-",
        "╺": "-",
        "│": "|",
    }
)


def plain_text(text: str, encoding: str) -> str:
    """The text as an encoding can write it: signs that have a spelling in ASCII get it, others become ``?``."""
    written = []
    for sign in text:
        try:
            sign.encode(encoding)
            written.append(sign)
        except UnicodeEncodeError:
            written.append(sign.translate(_PLAIN).encode(encoding, "replace").decode(encoding))
    return "".join(written)


class SafeStream:
    """A text stream whose ``write`` and ``flush`` never raise; all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, in ASCII spelling where the encoding needs that, or leaves it out."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(plain_text(text, self._stream.encoding or "ascii"))
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered, or leaves it out."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Where the reader has gone for good, sends the rest to /dev/null, for the processes below this one, too."""
        if isinstance(error, OSError) and error.errno in _GONE:
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
                self._stream.flush()


def safe(stream: TextIO | None) -> TextIO:
    """The stream with a ``write`` that never raises; a null stream for None, as Python has it where one was closed."""
    if isinstance(stream, SafeStream):
        return cast(TextIO, stream)
    return cast(TextIO, SafeStream(open(os.devnull, "w") if stream is None else stream))


def open_closed_streams() -> None:
    """Opens a standard descriptor that is closed to /dev/null: otherwise the next file that this process opens would
    take its number, and the processes below would print into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(number, True)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Within the block ``sys.stdout`` and ``sys.stderr`` never raise; see `open_closed_streams`, too."""
    open_closed_streams()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = safe(sys.stdout), safe(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
