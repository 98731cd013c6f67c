"""A file of what earlier commands have played, one JSON object a line, with which the next command goes on.

Each line carries a digest of the sources that it was played with, so that one file never mixes two versions of them.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class OtherCode(Exception):
    """The file was begun with other sources than those that are here now."""


def sources_digest() -> str:
    """BLAKE2b over every file of the folders that a played run depends on: the package, the tests, launch and conf."""
    hasher = hashlib.blake2b(digest_size=8)
    for folder in ("esper", "tests", "launch", "conf"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                hasher.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return hasher.hexdigest()


def read_lines(path: Path, code: str) -> list[dict[str, Any]]:
    """The lines of the file, none if there is no file; the last may be torn by a kill.

    Args:
        path: the file.
        code: `sources_digest` of now.

    Raises:
        OtherCode: a line was played with other sources.
    """
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    others = {line.get("code") for line in lines} - {code}
    if others:
        raise OtherCode(
            f"{path}: was recorded with other sources (digest {', '.join(sorted(map(str, others)))}, now {code}); go "
            "back to those, or name another file"
        )
    return lines


def add_line(path: Path, code: str, **entry: Any) -> None:
    """Adds what was just played; a torn line before it is closed off."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps({"code": code, **entry}) + "\n")
