"""Compares the settings of two runs: a digest of those that change what is computed, and what differs."""

from typing import Any

from esper.config.strict import override_text
from esper.leyline.plain import digest62

# Settings that do not change what is computed; they may differ between the attempts of one run.
OPERATIONAL = (
    "run",
    "telemetry",
    "control.timeout_s",
    "control.slow_timeout_s",
    "control.startup_timeout_s",
    "library.background",
    "library.wait_s",
    "library.memory_mib",
    "distill.trust",
    "world.rdzv_endpoint",
    "world.rdzv_id",
    "world.max_restarts",
    "world.grace_s",
)


def _leaves(plain: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree by dotted path, without the operational ones."""
    if path in OPERATIONAL:
        return {}
    if not isinstance(plain, dict):
        # 1 and 1.0 are the same setting
        return {path: int(plain) if isinstance(plain, float) and plain.is_integer() else plain}
    leaves: dict[str, Any] = {} if plain or not path else {path: {}}
    for key, value in plain.items():
        leaves |= _leaves(value, f"{path}.{key}" if path else str(key))
    return leaves


def config_digest(plain: dict[str, Any]) -> int:
    """62-bit digest of all settings that change what is computed; the run directory does not."""
    return digest62(_leaves(plain))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The differences between two trees, ``key = new: the run has old; set key=old``, without operational settings."""
    was, now = _leaves(old), _leaves(new)
    lines = []
    for key in dict.fromkeys([*was, *now]):
        if key not in now:
            lines.append(f"{key}: missing; the run has {was[key]!r}; set {key}={override_text(was[key])}")
        elif key not in was:
            lines.append(f"{key} = {now[key]!r}: the run does not have this setting; leave it out")
        elif was[key] != now[key]:
            lines.append(f"{key} = {now[key]!r}: the run has {was[key]!r}; set {key}={override_text(was[key])}")
    return lines


def same_file(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether ``old`` can stay where ``new`` would be written: only run.dir and run.resume may differ."""

    def kept(plain: dict[str, Any]) -> dict[str, Any]:
        run = {key: value for key, value in plain["run"].items() if key not in ("dir", "resume")}
        return {**plain, "run": run}

    return kept(old) == kept(new)
