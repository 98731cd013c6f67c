"""The sources of the user's own modules, compared over ranks: a host's copy may be stale though esper's is not.

A module stands for its family: the modules of its top-level package that are imported, or, if it is a file by itself,
the modules imported from its folder. A rank may have imported more than another (a controller lives on rank 0 alone),
so only modules that several ranks have are compared.
"""

import hashlib
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

_INSTALLED = tuple({Path(sysconfig.get_path(key)).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib")})


def _file(module: ModuleType | None) -> Path | None:
    """The file that a module was read from; None if it has none."""
    path = getattr(module, "__file__", None)
    return Path(path).resolve() if isinstance(path, str) else None


def _family(name: str) -> list[str]:
    """Names of the imported modules that belong to the module ``name``, itself among them."""
    top = name.partition(".")[0]
    if top in ("esper", *sys.builtin_module_names):
        return []
    loaded = {other: module for other, module in list(sys.modules.items()) if isinstance(module, ModuleType)}
    if hasattr(loaded.get(top), "__path__"):
        return [other for other in loaded if other == top or other.startswith(f"{top}.")]
    own = _file(loaded.get(name))
    if own is None or own.parent in _INSTALLED:
        return [name]
    beside = []
    for other, module in loaded.items():
        file = _file(module)
        installed = file is None or any(file.is_relative_to(folder) for folder in _INSTALLED)
        if file is not None and not installed and file.is_relative_to(own.parent) and other.split(".")[0] != "esper":
            beside.append(other)
    return beside


def describe_sources(modules: Iterable[str]) -> str:
    """Words ``name:digest``, sorted, one for each file of the families of these imported modules."""
    words = set()
    for name in {member for module in modules for member in _family(module)}:
        file = _file(sys.modules.get(name))
        if file is not None and file.is_file():
            words.add(f"{name}:{hashlib.blake2b(file.read_bytes(), digest_size=5).hexdigest()}")
    return " ".join(sorted(words))


def split_word(word: str) -> tuple[str, str]:
    """Name and digest of a word; a word without a name is the digest of esper's own sources."""
    name, _, digest = word.rpartition(":")
    return name, digest


def differing_names(texts: Sequence[str]) -> list[str]:
    """The names that have unequal digests in these texts, sorted; a name that a text lacks is no difference there."""
    digests: dict[str, set[str]] = {}
    for text in texts:
        for name, digest in map(split_word, text.split()):
            digests.setdefault(name, set()).add(digest)
    return sorted(name for name, values in digests.items() if len(values) > 1)
