"""Whether a call is refused: by its own kind of error, in one line that matches."""

import re
from collections.abc import Callable
from typing import Any

import pytest


def fails(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    """Makes a call and checks the one line of its error."""
    with pytest.raises(kind) as caught:
        call()
    (line,) = str(caught.value).splitlines()
    assert re.search(text, line), line
