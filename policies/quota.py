"""Limits, and the arithmetic of them: GCRA for rates, a count for what runs at once.

GCRA keeps one number for each key, the theoretical arrival time (TAT): the instant at which the
key would be as good as unused. A call is allowed while TAT is no further ahead than the burst
allows, and moves it by one emission interval. No clock is read here; `now` comes in.

No I/O.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from policies.conditions import Condition, read_conditions, reads_of
from policies.document import Section
from policies.known import Known
from policies.request import AccessRequest

_RATE = re.compile(r"([0-9]{1,12})/(s|min|h|d)")
_PERIODS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

MAX_PER_SECOND: Final = 1_000_000
"""Above what one process can carry; faster paces would drown in the rounding of the clock."""

MAX_QUOTA: Final = 1_000_000_000
"""Keeps every figure of a header within the 15 digits of RFC 9651, 3.3.1."""

SLACK: Final = 1e-4
"""Share of an interval that a call may come early: far above what a clock of months rounds away,
far below what a caller could gain, because the TAT moves by whole intervals all the same."""

KEY_PARTS: dict[str, Callable[[AccessRequest], str]] = {
    "tenant": lambda request: request.principal.tenant,
    "subject": lambda request: f"{request.principal.issuer}\0{request.principal.subject}",
    "session": lambda request: request.session_id,
    "provider": lambda request: request.call.provider,
    "model": lambda request: request.call.model,
    "operation": lambda request: request.call.operation,
}


class QuotaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a limit said of one call; durations in seconds.

    `reset_seconds` is when more than `remaining` is free, `retry_after_seconds` when one more call
    would pass (0 where this one did).
    """

    name: str
    code: str
    is_allowed: bool
    quota: int
    remaining: int
    reset_seconds: float
    retry_after_seconds: float
    window_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """So many calls a period, and so many at once before the pace is enforced."""

    count: int
    period_seconds: float
    burst: int

    def spend(self, tat: float, now: float) -> tuple[float, bool]:
        """Return the new TAT and whether one call may be spent; refused, the TAT stays."""
        interval = self.period_seconds / self.count
        new = max(tat, now) + interval
        if new - now > interval * (self.burst + SLACK):
            return tat, False
        return new, True

    def status(self, name: str, tat: float, now: float, *, is_allowed: bool) -> QuotaStatus:
        """Return what a caller may know, given the TAT after `spend`."""
        interval = self.period_seconds / self.count
        ahead = max(0.0, tat - now)
        remaining = max(0, math.floor(self.burst - ahead / interval + SLACK))
        wait = 0.0 if is_allowed else max(0.0, ahead + interval - interval * self.burst)
        return QuotaStatus(
            name=name,
            code="rate_limit_exceeded",
            is_allowed=is_allowed,
            quota=self.burst,
            remaining=remaining,
            reset_seconds=max(0.0, ahead - interval * (self.burst - remaining - 1)),
            retry_after_seconds=wait,
            window_seconds=interval * self.burst,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A named limit: whom it is counted for, which calls it counts, and how many it lets pass."""

    name: str
    key: tuple[str, ...]
    match: tuple[Condition, ...]
    rate: Rate | None
    concurrent: int

    @property
    def reads(self) -> frozenset[str]:
        """Return the facts that the limit depends on."""
        return reads_of(self.match) | ({"model"} & set(self.key))

    def applies_to(self, request: AccessRequest) -> bool:
        """Return whether the call counts; a condition that fails to evaluate counts it."""
        try:
            return all(condition.holds(request) for condition in self.match)
        except Exception:  # noqa: BLE001 - a limit that cannot tell must hold
            return True

    def key_of(self, request: AccessRequest) -> tuple[str, ...]:
        """Return what the call is counted under."""
        return (self.name, *[KEY_PARTS[part](request) for part in self.key])


def read_limit(section: Section, known: Known) -> Limit:
    """Return the limit that a section describes, noting faults in it."""
    name = section.string("name")
    if name and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name):
        section.fault("name", "must be 1 to 64 of a-z, 0-9, '.', '_' and '-'")
    key = section.strings("key")
    if section.value("key") is None:
        section.fault("key", f"is required: one or more of {', '.join(KEY_PARTS)}")
    for part in key:
        if part not in KEY_PARTS:
            section.fault("key", f"holds {part!r}; parts are {', '.join(KEY_PARTS)}")
    match: list[Condition] = []
    if "match" in section:
        match = read_conditions(section.section("match"), known)
    if ("requests" in section) == ("concurrent" in section):
        section.fault("requests", "or concurrent is needed, and only one of them")
    rate = _read_rate(section) if "requests" in section else None
    concurrent = 0
    if "concurrent" in section:
        inner = section.section("concurrent")
        concurrent = inner.integer("max", low=1, high=MAX_QUOTA)
        inner.finish()
    section.finish()
    return Limit(name=name, key=key, match=tuple(match), rate=rate, concurrent=concurrent)


def _read_rate(section: Section) -> Rate:
    inner = section.section("requests")
    text = inner.string("rate")
    match = _RATE.fullmatch(text)
    if match is None or not int(match[1]):
        inner.fault("rate", "must be a rate such as 60/min; units are s, min, h, d")
        return Rate(count=1, period_seconds=1.0, burst=1)
    count, period = int(match[1]), _PERIODS[match[2]]
    if count > MAX_PER_SECOND * period:
        inner.fault("rate", f"must be at most {MAX_PER_SECOND}/s")
    burst = inner.integer("burst", min(count, MAX_QUOTA), low=1, high=MAX_QUOTA)
    inner.finish()
    return Rate(count=count, period_seconds=period, burst=burst)
