"""What limits measure, and the arithmetic of it: rates, counts of what runs at once, and budgets.

A **rate** is GCRA, weighted: it keeps one number for each key, the theoretical arrival time (TAT), at
which the key would be as good as unused. A call passes while TAT is no further ahead than the burst
allows, and moves it by an interval for each unit that it takes; a call that took more or less than
was reserved for it moves TAT once more when it ends. **Concurrency** counts calls that run. A
**budget** has what was spent in a calendar window, and what is held for calls that run.

Amounts are whole numbers of a unit: requests, tokens, bytes, or millionths of a US dollar. No clock
is read here; `now` comes in. No I/O.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import msgspec

from policies.calendar import Calendar

MAX_PER_SECOND: Final = 1_000_000
"""Requests above what one process can carry; faster paces would drown in the rounding of the clock."""

MAX_QUOTA: Final = 10**12
"""Keeps every figure of a header within the 15 digits of RFC 9651, 3.3.1, and every sum of a store
within the 53 bits of a double."""

SLACK: Final = 1e-4
"""Share of an interval that a call may come early: far above what a clock of months rounds away,
far below what a caller could gain, because the TAT moves by whole intervals all the same."""


class Unit(StrEnum):
    """What an amount is of, as `RateLimit-Policy` names it."""

    REQUESTS = "requests"
    CALLS = "concurrent-requests"
    TOKENS = "tokens"
    BYTES = "content-bytes"
    MONEY = "micro-usd"


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a call takes: expected when it is admitted, true when it is settled.

    `input` includes what was read from a cache or written to one, `output` includes reasoning.
    Costs are millionths of a US dollar; `is_priced` is false where nobody knows the price.
    """

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    input_cost: int = 0
    output_cost: int = 0
    is_priced: bool = True


NOTHING: Final = Usage()


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """One for each call, whatever becomes of it."""

    unit: Unit = Unit.REQUESTS

    def reserve(self, _expected: Usage) -> int:
        """Return what to take when the call is admitted."""
        return 1

    def charge(self, _actual: Usage) -> int:
        """Return what it took in the end."""
        return 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Tokens by weight; `reserve_output` is the share of the possible answer that is held for it."""

    input: float = 1.0
    output: float = 1.0
    cache_read: float = 1.0
    cache_write: float = 1.0
    reserve_output: float = 1.0
    unit: Unit = Unit.TOKENS

    def reserve(self, expected: Usage) -> int:
        """Return what to take when the call is admitted."""
        output = expected.output * self.output * self.reserve_output
        return math.ceil(expected.input * self.input + output)

    def charge(self, actual: Usage) -> int:
        """Return what it took in the end."""
        read, written = actual.cache_read, actual.cache_write
        fresh = max(0, actual.input - read - written) * self.input
        cached = (read * self.cache_read + written * self.cache_write) * self.input
        return math.ceil(fresh + cached + actual.output * self.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bytes:
    """Bytes of bodies: the request's are known beforehand, or counted as they come."""

    request: bool = True
    response: bool = True
    unit: Unit = Unit.BYTES

    def reserve(self, expected: Usage) -> int:
        """Return what to take when the call is admitted."""
        return expected.request_bytes if self.request else 0

    def charge(self, actual: Usage) -> int:
        """Return what it took in the end."""
        sent = actual.request_bytes if self.request else 0
        return sent + (actual.response_bytes if self.response else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Money:
    """What the call costs at list price."""

    reserve_output: float = 1.0
    unit: Unit = Unit.MONEY

    def reserve(self, expected: Usage) -> int:
        """Return what to take when the call is admitted."""
        return expected.input_cost + math.ceil(expected.output_cost * self.reserve_output)

    def charge(self, actual: Usage) -> int:
        """Return what it took in the end."""
        return actual.input_cost + actual.output_cost


Meter = Requests | Tokens | Bytes | Money


class QuotaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a limit said of one call; durations in seconds.

    `reset_seconds` is when more than `remaining` is free, `retry_after_seconds` when the call would
    pass: 0 where this one did, None where no waiting helps.
    """

    name: str
    code: str
    is_allowed: bool
    quota: int
    remaining: int
    reset_seconds: float
    retry_after_seconds: float | None
    window_seconds: float
    unit: Unit = Unit.REQUESTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """So many units a period, and so many at once before the pace is enforced."""

    count: int
    period_seconds: float
    burst: int
    meter: Meter = Requests()
    interval: float = field(init=False, compare=False)
    ceiling: float = field(init=False, compare=False)

    def __post_init__(self) -> None:
        """Work out once what every call needs."""
        interval = self.period_seconds / self.count
        object.__setattr__(self, "interval", interval)
        object.__setattr__(self, "ceiling", interval * (self.burst + SLACK))

    def spend(self, tat: float, now: float, cost: int = 1) -> tuple[float, bool]:
        """Return the new TAT and whether `cost` may be spent; refused, the TAT stays."""
        new = (max(now, tat)) + self.interval * cost
        if new - now > self.ceiling:
            return tat, False
        return new, True

    def settle(self, tat: float, now: float, change: int) -> float:
        """Return the TAT once a call took `change` more than was reserved: a debt, or a refund."""
        return max(tat, now) + self.interval * change

    def status(
        self, name: str, tat: float, now: float, *, is_allowed: bool, cost: int = 1
    ) -> QuotaStatus:
        """Return what a caller may know, given the TAT after `spend`."""
        interval = self.interval
        ahead = tat - now if tat > now else 0.0
        remaining = math.floor(self.burst - ahead / interval + SLACK)
        remaining = max(remaining, 0)
        wait: float | None = 0.0
        if not is_allowed:
            missing = ahead + interval * cost - interval * self.burst
            wait = None if cost > self.burst else max(0.0, missing)
        return QuotaStatus(
            name=name,
            code="call_exceeds_limit" if wait is None else "rate_limit_exceeded",
            is_allowed=is_allowed,
            quota=self.burst,
            remaining=remaining,
            reset_seconds=max(0.0, ahead - interval * (self.burst - remaining - 1)),
            retry_after_seconds=wait,
            window_seconds=interval * self.burst,
            unit=self.meter.unit,
        )

    def shared_by(self, number: int) -> "Rate":
        """Return one part of this, so that all parts together pass no more than this does."""
        return Rate(
            count=self.count,
            period_seconds=self.period_seconds * number,
            burst=max(1, self.burst // number),
            meter=self.meter,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Concurrency:
    """So many calls at once; a lease on one of the places ends unless it is renewed."""

    maximum: int
    lease_seconds: float = 90.0

    def status(self, name: str, running: int, *, is_allowed: bool) -> QuotaStatus:
        """Return what a caller may know, given how many run, this one included if it may."""
        return QuotaStatus(
            name=name,
            code="concurrency_limit_exceeded",
            is_allowed=is_allowed,
            quota=self.maximum,
            remaining=max(0, self.maximum - running),
            reset_seconds=0.0,
            retry_after_seconds=0.0 if is_allowed else 1.0,
            window_seconds=0.0,
            unit=Unit.CALLS,
        )

    def shared_by(self, number: int) -> "Concurrency":
        """Return one part of this."""
        return Concurrency(maximum=max(1, self.maximum // number), lease_seconds=self.lease_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """So much in a day, week or month of a time zone; `warn_at` are percents of it, ascending."""

    maximum: int
    calendar: Calendar
    meter: Tokens | Money
    warn_at: tuple[int, ...] = ()

    def status(  # noqa: PLR0913 - one argument for each figure that it is told from
        self, name: str, taken: int, now: float, ends_at: float, cost: int, *, is_allowed: bool
    ) -> QuotaStatus:
        """Return what a caller may know, given what is spent and held, its own if it may."""
        left = max(0.0, ends_at - now)
        wait: float | None = 0.0
        if not is_allowed:
            wait = None if cost > self.maximum else left
        return QuotaStatus(
            name=name,
            code="call_exceeds_limit" if wait is None else "budget_exceeded",
            is_allowed=is_allowed,
            quota=self.maximum,
            remaining=max(0, self.maximum - taken),
            reset_seconds=left,
            retry_after_seconds=wait,
            window_seconds=self.calendar.seconds,
            unit=self.meter.unit,
        )

    def crossed(self, before: int, after: int) -> int:
        """Return the highest percent of `warn_at` that spending crossed, 0 for none."""
        for percent in reversed(self.warn_at):
            if before * 100 < percent * self.maximum <= after * 100:
                return percent
        return 0

    def shared_by(self, number: int) -> "Budget":
        """Return one part of this."""
        return Budget(
            maximum=max(1, self.maximum // number),
            calendar=self.calendar,
            meter=self.meter,
            warn_at=self.warn_at,
        )


Measure = Rate | Concurrency | Budget
