"""Compares the settings of two runs: a digest of those that change what is computed, and what differs."""

from typing import Any

from esper.config.strict import override_text
from esper.leyline.plain import digest62

# Settings that do not change what is computed; they may differ between the attempts of one run.
OPERATIONAL = (
    "run",
    "telemetry",
    "orders",
    "control.timeout_s",
    "control.slow_timeout_s",
    "control.startup_timeout_s",
    "compile",
    "data.workers",
    "library.background",
    "library.when_idle",
    "library.wait_s",
    "library.memory_mib",
    "distill.trust",
    "world.rdzv_endpoint",
    "world.rdzv_id",
    "world.max_restarts",
    "world.grace_s",
)

# Settings that may be changed where a run goes on. They decide what a run does about trouble and when it saves, so two
# runs that differ in them are two runs; but one run may live under first these and then those.
CHANGEABLE = (*OPERATIONAL, "governor", "checkpoint")

LENGTH = ("trainer.steps", "trainer.epochs")  # a run may become longer, see `length_problem`
_NOT_FOR_LIFE = (*CHANGEABLE, *LENGTH)
_NEVER_TOLD = ("run", "world.rdzv_endpoint", "world.rdzv_id")  # where and under which name, not how


def may_change(key: str) -> bool:
    """Whether a setting, by its dotted path, may be changed where a run goes on."""
    return any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE)


def _leaves(plain: Any, path: str = "", *, without: tuple[str, ...]) -> dict[str, Any]:
    """The leaves of a tree by dotted path, without some of its branches."""
    if path in without:
        return {}
    if not isinstance(plain, dict):
        # 1 and 1.0 are the same setting
        return {path: int(plain) if isinstance(plain, float) and plain.is_integer() else plain}
    leaves: dict[str, Any] = {} if plain or not path else {path: {}}
    for key, value in plain.items():
        leaves |= _leaves(value, f"{path}.{key}" if path else str(key), without=without)
    return leaves


def config_digest(plain: dict[str, Any]) -> int:
    """62-bit digest of all settings that change what is computed; the run directory does not."""
    return digest62(_leaves(plain, without=OPERATIONAL))


def lasting_digest(plain: dict[str, Any]) -> int:
    """62-bit digest of all settings that a run keeps for its whole life."""
    return digest62(_leaves(plain, without=_NOT_FOR_LIFE))


def changeable_settings(plain: dict[str, Any]) -> dict[str, Any]:
    """The settings that may change where a run goes on, and its length, by dotted path; a checkpoint says under which
    it was saved.
    """
    every = _leaves(plain, without=_NEVER_TOLD)
    return {key: value for key, value in every.items() if may_change(key) or key in LENGTH}


def length_of(plain: dict[str, Any]) -> tuple[str, Any]:
    """The setting that decides how long a run is, by its dotted path, and its value: ``steps`` if there are any."""
    steps, epochs = (_leaves(plain, without=()).get(key) for key in LENGTH)
    return (LENGTH[1], epochs) if steps is None else (LENGTH[0], steps)


def same_length(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two trees have the same settings of a run's length."""
    was, now = _leaves(old, without=()), _leaves(new, without=())
    return all(was.get(key) == now.get(key) for key in LENGTH)


def length_problem(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Why a run of one length may not have another; empty if it stays as long, or becomes longer."""
    (key, length), leaves = length_of(old), _leaves(new, without=())
    if same_length(old, new):
        return ""
    for name in LENGTH:
        if name != key and leaves.get(name) != _leaves(old, without=()).get(name):
            return f"{name} = {leaves.get(name)}: the run's length is {key} = {length}; set {key}=<more than {length}>"
    longer = leaves.get(key)
    if longer is None or longer < length:
        return f"{key} = {longer}: the run has {length} and can only become longer; set {key}=<more than {length}>"
    return ""


def differences(old: dict[str, Any], new: dict[str, Any], *, done: bool = False) -> list[str]:
    """The differences between two trees, ``key = new: the run has old; set key=old``, without those that may change,
    and without the length.

    Args:
        old: the settings that a run has.
        new: those that it is to have.
        done: whether it is to stay as it ended, so that only what changes no result may differ.
    """
    without = (*OPERATIONAL, *LENGTH) if done else _NOT_FOR_LIFE
    was, now = _leaves(old, without=without), _leaves(new, without=without)
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
