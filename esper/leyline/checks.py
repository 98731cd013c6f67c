"""Range checks for config classes: every failed check of a class is reported at once."""

from typing import Any

from esper.leyline.errors import ConfigError


class Checks:
    """Collects failed checks of one config object, then raises them together.

    Example:
        >>> def __post_init__(self):
        ...     with Checks(self) as check:
        ...         check("lr", self.lr > 0, "must be > 0")
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._problems: list[str] = []

    def __enter__(self) -> "Checks":
        return self

    def __call__(self, field: str, ok: bool, expected: str) -> None:
        """Notes a problem unless ``ok``; ``expected`` says what value the field must have."""
        if not ok:
            self._problems.append(f"{field} = {getattr(self._owner, field)!r}: {expected}")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None and self._problems:
            raise ConfigError(self._problems)
