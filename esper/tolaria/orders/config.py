"""Settings of orders."""

from dataclasses import dataclass

from esper.leyline.fields import Checks


@dataclass(kw_only=True, slots=True)
class OrdersConfig:
    """Orders that people give to the run while it trains, by ``esper ctl``."""

    enabled: bool = True
    """Whether the run takes orders. Orders that it took before are taken again at their ticks in any case."""

    window_s: float = 60.0
    """Seconds after which an order that has not been read is too old to be taken."""

    skew_s: float = 5.0
    """Seconds by which the clocks of two machines may differ."""

    queue: int = 64
    """Orders that may wait for a tick; further ones are refused."""

    poll_s: float = 1.0
    """Seconds between two looks for new orders."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("window_s", 1 <= self.window_s <= 86_400, "seconds, must be 1 to 86400")
            check("skew_s", 0 <= self.skew_s <= 3600, "seconds, must be 0 to 3600")
            check("queue", 1 <= self.queue <= 10_000, "orders, must be 1 to 10000")
            check("poll_s", 0.01 <= self.poll_s <= 60, "seconds, must be 0.01 to 60")
