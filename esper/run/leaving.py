"""The end of a rank's process, past the point where libraries are taken down in an order that nobody chose.

    leave_with(75)      # the code that the process ends with, whatever happens in the interpreter's teardown

What a rank has to say is written by then: result, STATUS, checkpoint. Afterwards Python frees modules while threads of
libraries in C++ may still want the interpreter, and then the process aborts ("terminate called without an active
exception", seldom): torchrun would restart a run that is done. So the process ends right after the
last function registered with `atexit` (https://docs.python.org/3/library/atexit.html), when all threads that are not
daemons have been joined. Import this module before any other, so that its own function is the last.
"""

import atexit
import contextlib
import os
import sys

_code: int | None = None


def leave_with(code: int) -> None:
    """Sets the code with which this process ends; without it the process ends as Python's do.

    Args:
        code: from 0 to 255.
    """
    global _code
    _code = code


@atexit.register
def _leave() -> None:
    if _code is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a reader that is gone decides nothing
            stream.flush()
    os._exit(_code)
