"""Hydra's commonest complaints in this project's words: where, what, what to do.

Hydra prints its errors to stderr and exits; it raises nothing that a caller could read. So its text is matched, and a
text that matches nothing is shown as it is. See docs/hydra.md.
"""

import difflib
import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

_OVERRIDE = re.compile(r"Could not override '([^']+)'")
_SYSTEM = re.compile(r"^(?:OSError|\w+Error): \[Errno (\d+)\] (.+?): '([^'\n]+)'$", re.M)
_OPTION = re.compile(r"Could not find '([\w/]+)/([^']+)'.*?Available options in '[^']+':\n((?:\t\S+\n?)+)", re.S)

_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")


def reword(text: str, conf: Path) -> str:
    """One line for an unknown setting or an unknown option of a group; any other text as it is.

    Args:
        text: Hydra's complaint.
        conf: the folder of Hydra's groups, for the settings that exist.
    """
    override = _OVERRIDE.search(text)
    if override:
        with initialize_config_dir(str(conf), version_base="1.3"):
            tree = compose("config")
        keys = dotted_keys(OmegaConf.to_container(tree, resolve=False))
        if override[1] in keys:  # a mapping that has no such key, or the name of a group where a setting was meant
            return f"esper: config: {override[1]}: cannot take this value; see --cfg job for what stands there"
        near = difflib.get_close_matches(override[1], keys, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}" if near else "see --cfg job for all of them"
        return f"esper: config: {override[1]}: no such setting; {hint}"
    option = _OPTION.search(text)
    if option:
        return f"esper: config: {option[1]}={option[2]}: no such option; there are {', '.join(option[3].split())}"
    system = _SYSTEM.search(text)
    if system:
        name = max(system[3].split("/"), key=lambda part: len(part.encode()))
        long = int(system[1]) == errno.ENAMETOOLONG
        what = f"the name {name[:40]}... has {len(name.encode())} bytes, and 255 are allowed" if long else system[3]
        advice = "hydra.sweep.subdir=${hydra.job.num}" if long else "hydra.sweep.dir=<a folder that can be written>"
        return f"esper: config: hydra: {system[2]}: {what}; set {advice}"
    return text


def words_in_order(words: Sequence[str]) -> list[str]:
    """A command line with its flags before its settings; Hydra takes settings in one place only."""
    flags, settings, left = list[str](), list[str](), list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("-"):
            settings.append(word)
            continue
        flags.append(word)
        if word in _WITH_VALUE and left:
            flags.append(left.pop(0))
        elif word in ("--info", "-i"):
            flags[-1] = f"--info={left.pop(0) if left and left[0] in _INFO else 'all'}"
    return [*flags, *settings]


def dotted_keys(plain: Any, path: str = "") -> list[str]:
    """The keys of nested mappings, sections and leaves, as they are typed in an override (``optim.lr``)."""
    if not isinstance(plain, dict):
        return [path]
    keys = [path] if path else []
    for key, value in plain.items():
        keys += dotted_keys(value, f"{path}.{key}" if path else str(key))
    return keys
