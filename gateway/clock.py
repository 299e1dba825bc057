"""The only reader of time. Everything that needs an instant is handed a `Clock`."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where instants come from: wall-clock seconds, and a monotonic count for durations."""

    def now(self) -> float:
        """Return seconds since the epoch (UTC)."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back."""


class SystemClock:
    """The machine's own clocks."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)
