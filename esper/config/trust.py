"""Which code a run's settings name, and whether RUN/config.yaml may name it.

The settings of a command line are the caller's own words. A config.yaml may be somebody else's: a command that is given
a run directory (resume, export, a teacher, torchrun typed by hand) imports what it names only if the file is the
caller's own, see `esper.leyline.imports.why_foreign`, or if the caller says so. The launcher has asked before it starts
ranks, so it hands them the digest of the settings that they may obey.
"""

import os
from pathlib import Path
from typing import Any

from esper.config.digest import config_digest
from esper.leyline.imports import is_dotted, refuse_foreign_code, why_foreign

TRUST = "ESPER_TRUST"  # variable: digest of the settings that may name code, whoever wrote the file
TRUST_TEACHER = "set distill.trust=true"  # what to do about a foreign teacher's


def named_code(plain: dict[str, Any]) -> dict[str, str]:
    """What a run with these settings (plain data, unchecked) would import, by the name of the setting.

    A trusted teacher counts, since its own config.yaml may name code in turn.
    """
    sections = {name: section for name, section in plain.items() if isinstance(section, dict)}
    paths = {f"{name}.path": section.get("path") for name, section in sections.items()}
    code = {key: path for key, path in paths.items() if isinstance(path, str) and is_dotted(path)}
    distill = sections.get("distill", {})
    if distill.get("trust") and distill.get("run") is not None:
        code["distill.run"] = str(distill["run"])
    return code


def trust_variable(plain: dict[str, Any]) -> dict[str, str]:
    """The variable with which the launcher lets ranks import what these settings name; empty if they name nothing."""
    return {TRUST: str(config_digest(plain))} if named_code(plain) else {}


def check_trust(path: Path, plain: dict[str, Any], instead: str | None = None) -> None:
    """Refuses code that a foreign config.yaml names.

    Args:
        path: of the file.
        plain: its content.
        instead: what a caller types who trusts the file; None: the variable for a torchrun typed by hand.

    Raises:
        ConfigError: the file is not the caller's own, names code, and is not trusted.
    """
    code = named_code(plain)
    digest = str(config_digest(plain)) if code else ""
    if code and os.environ.get(TRUST) != digest:
        instead = instead or f"put {TRUST}={digest} before the command"
        refuse_foreign_code(path, why_foreign(path), code, instead)
