"""Days, weeks and months as a clock on a wall in some time zone shows them.

The standard library reads a zone's rules when a policy is loaded; otherwise there is no I/O here.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from enum import StrEnum
from zoneinfo import ZoneInfo

import msgspec


class Period(StrEnum):
    """How long a budget lasts; a week begins on Monday."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"


_SECONDS = {Period.DAY: 86_400.0, Period.WEEK: 604_800.0, Period.MONTH: 2_678_400.0}
"""At most; a day on which clocks are set has an hour more or less."""


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One period: its name, unique among those of its kind, and the instants that bound it."""

    label: str
    begins_at: float
    ends_at: float


class Calendar:
    """The periods of one kind in one zone; asks the zone once for each of them."""

    __slots__ = ("_window", "_zone", "period")

    def __init__(self, period: Period, zone: ZoneInfo) -> None:
        self.period = period
        self._zone = zone
        self._window = Window(label="", begins_at=0.0, ends_at=0.0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calendar) and (
            (self.period, self._zone.key) == (other.period, other._zone.key)
        )

    def __hash__(self) -> int:
        return hash((self.period, self._zone.key))

    @property
    def seconds(self) -> float:
        """Return about how long a period is."""
        return _SECONDS[self.period]

    def window(self, now: float) -> Window:
        """Return the period that `now` is in."""
        if not self._window.begins_at <= now < self._window.ends_at:
            self._window = self._find(now)
        return self._window

    def _find(self, now: float) -> Window:
        local = datetime.fromtimestamp(now, self._zone)
        midnight = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
        first = _FIRSTS[self.period](midnight)
        after = _FIRSTS[self.period](first + timedelta(days=_LONGEST[self.period]))
        return Window(
            label=f"{self.period}:{first:%Y-%m-%d}",
            begins_at=first.timestamp(),
            ends_at=after.timestamp(),
        )


# Arithmetic on aware datetimes is that of the wall clock, which is what is meant here.
_FIRSTS: dict[Period, Callable[[datetime], datetime]] = {
    Period.DAY: lambda midnight: midnight,
    Period.WEEK: lambda midnight: midnight - timedelta(days=midnight.weekday()),
    Period.MONTH: lambda midnight: midnight.replace(day=1),
}
_LONGEST = {Period.DAY: 1, Period.WEEK: 7, Period.MONTH: 31}
