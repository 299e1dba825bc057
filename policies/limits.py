"""Limits as they stand in a policy: whom they count, which calls, how much, and what if they cannot.

    limits:
      - name: team-tokens
        key: [tenant, model]               # one count for each of these
        match: {model: "claude-*"}         # only these calls
        tokens: {rate: 400000/min, cache_read: 0, reserve_output: 0.5}
        overrides:                         # other figures for some; the first that matches
          - {match: {roles: gold}, tokens: {rate: 2000000/min}}
      - name: monthly
        key: tenant
        budget: {max: 500 USD, per: month, zone: Europe/Paris, warn_at: [80, 95]}
        on_store_error: deny               # deny | local | allow

`demands` turns them into what one call asks of a store. No I/O.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from policies.calendar import Calendar, Period
from policies.conditions import Condition, read_conditions, reads_of
from policies.document import Section
from policies.known import Known
from policies.quota import (
    MAX_PER_SECOND,
    MAX_QUOTA,
    Budget,
    Bytes,
    Concurrency,
    Measure,
    Meter,
    Money,
    QuotaStatus,
    Rate,
    Requests,
    Tokens,
    Unit,
    Usage,
)
from policies.request import AccessRequest

MAX_LIMITS: Final = 64
"""In one policy set: all that match a call are asked of a store at once."""

MIN_LEASE_SECONDS: Final = 10.0
"""A lease is renewed thrice in its time, and workers look once a second."""

_RATE = re.compile(r"([0-9]{1,12})/(s|min|h|d)")
_BYTE_RATE = re.compile(r"([0-9]{1,9})(B|KiB|MiB|GiB)/(s|min|h|d)")
_PERIODS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_AMOUNT = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?) (USD|tokens)")
_KINDS = ("requests", "tokens", "bytes", "concurrent", "budget")

Key = tuple[str, ...]

KEY_PARTS: dict[str, Callable[[AccessRequest], str]] = {
    "tenant": lambda request: request.principal.tenant,
    "subject": lambda request: f"{request.principal.issuer}\0{request.principal.subject}",
    "role": lambda request: "\0".join(sorted(request.principal.roles)),
    "session": lambda request: request.session_id,
    "provider": lambda request: request.call.provider,
    "model": lambda request: request.call.model,
    "operation": lambda request: request.call.operation,
}


class OnStoreError(StrEnum):
    """What a limit does while the store that counts it does not answer.

    `local` counts in each worker what its share of the limit is.
    """

    DENY = "deny"
    LOCAL = "local"
    ALLOW = "allow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Other figures for the calls that match."""

    match: tuple[Condition, ...]
    measure: Measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A named limit: whom it is counted for, which calls it counts, and how many it lets pass.

    In shadow it is counted but never refuses. `allows_unpriced` lets calls pass whose price nobody
    knows, uncounted.
    """

    name: str
    key: tuple[str, ...]
    match: tuple[Condition, ...]
    measure: Measure
    overrides: tuple[Override, ...] = ()
    on_store_error: OnStoreError = OnStoreError.LOCAL
    is_shadow: bool = False
    allows_unpriced: bool = False

    @property
    def reads(self) -> frozenset[str]:
        """Return the facts that the limit depends on."""
        conditions = [self.match, *[override.match for override in self.overrides]]
        facts = frozenset().union(*map(reads_of, conditions)) | ({"model"} & set(self.key))
        return facts | {"model", "max_tokens"} if self.reckons else facts

    @property
    def reckons(self) -> bool:
        """Return whether it counts tokens or money, which are estimated beforehand."""
        measures = [self.measure, *[override.measure for override in self.overrides]]
        return any(map(_is_reckoned, measures))

    def applies_to(self, request: AccessRequest) -> bool:
        """Return whether the call counts; a condition that fails to evaluate counts it."""
        return not self.match or _holds(self.match, request, if_broken=True)

    def measure_for(self, request: AccessRequest) -> Measure:
        """Return the figures for a call; an override that fails to evaluate does not match."""
        for override in self.overrides:
            if _holds(override.match, request, if_broken=False):
                return override.measure
        return self.measure

    def key_of(self, request: AccessRequest) -> Key:
        """Return what the call is counted under."""
        return (self.name, *[KEY_PARTS[part](request) for part in self.key])


def _holds(conditions: Sequence[Condition], request: AccessRequest, *, if_broken: bool) -> bool:
    try:
        return all(condition.holds(request) for condition in conditions)
    except Exception:  # noqa: BLE001 - the caller says which way is the strict one
        return if_broken


class Demand(msgspec.Struct, frozen=True, gc=False):
    """What one call asks of one limit: so much, under this key, until its window ends."""

    limit: Limit
    measure: Measure
    key: Key
    cost: int
    ends_at: float = 0.0


def demands(
    limits: Sequence[Limit], request: AccessRequest, expected: Usage, now: float
) -> list[Demand] | QuotaStatus:
    """Return what a call asks of every limit that applies; a refusal where a price is missing."""
    asked: list[Demand] = []
    for limit in limits:
        if limit.match and not limit.applies_to(request):
            continue
        measure = limit.measure_for(request) if limit.overrides else limit.measure
        key = limit.key_of(request)
        if isinstance(measure, Concurrency):
            asked.append(Demand(limit, measure, key, 1))
        elif isinstance(measure, Rate):
            asked.append(Demand(limit, measure, key, measure.meter.reserve(expected)))
        else:
            if measure.meter.unit is Unit.MONEY and not expected.is_priced:
                if limit.allows_unpriced or limit.is_shadow:
                    continue
                return _unpriced(limit, measure)
            window = measure.calendar.window(now)
            cost = measure.meter.reserve(expected)
            asked.append(Demand(limit, measure, (*key, window.label), cost, window.ends_at))
    return asked


def _unpriced(limit: Limit, budget: Budget) -> QuotaStatus:
    return QuotaStatus(
        name=limit.name,
        code="price_unknown",
        is_allowed=False,
        quota=budget.maximum,
        remaining=0,
        reset_seconds=0.0,
        retry_after_seconds=None,
        window_seconds=budget.calendar.seconds,
        unit=Unit.MONEY,
    )


# --- reading -------------------------------------------------------------------------------------


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
    kinds = [kind for kind in _KINDS if kind in section]
    if len(kinds) != 1:
        section.fault(kinds[-1] if kinds else "", f"one kind is needed: {', '.join(_KINDS)}")
    measure = _READERS[kinds[0]](section.section(kinds[0])) if kinds else _NONE
    overrides = [_read_override(each, known, kinds) for each in section.sections("overrides")]
    is_money = isinstance(measure, Budget) and measure.meter.unit is Unit.MONEY
    choices = [choice.value for choice in OnStoreError]
    usual = OnStoreError.DENY if isinstance(measure, Budget) else OnStoreError.LOCAL
    on_store_error = section.choice("on_store_error", choices, usual.value)
    unpriced = section.choice("on_unknown_price", ["deny", "allow"], "deny")
    if "on_unknown_price" in section and not is_money:
        section.fault("on_unknown_price", "belongs to budgets in USD")
    mode = section.choice("mode", ["enforce", "shadow"], "enforce")
    section.finish()
    return Limit(
        name=name,
        key=key,
        match=tuple(match),
        measure=measure,
        overrides=tuple(overrides),
        on_store_error=OnStoreError(on_store_error) if on_store_error in choices else usual,
        is_shadow=mode == "shadow",
        allows_unpriced=unpriced == "allow",
    )


def _read_override(section: Section, known: Known, kinds: Sequence[str]) -> Override:
    if section.value("match") is None:
        section.fault("match", "is required: for whom are these figures?")
    match = read_conditions(section.section("match"), known)
    measure: Measure = _NONE
    if kinds and kinds[0] in section:
        measure = _READERS[kinds[0]](section.section(kinds[0]))
    elif kinds:
        section.fault(kinds[0], "is required: an override has the limit's own kind")
    section.finish()
    return Override(match=tuple(match), measure=measure)


def _is_reckoned(measure: Measure) -> bool:
    return not isinstance(measure, Concurrency) and isinstance(measure.meter, Tokens | Money)


def _read_requests(section: Section) -> Rate:
    count, period = _pace(section, _RATE, "60/min")
    if count > MAX_PER_SECOND * period:
        section.fault("rate", f"must be at most {MAX_PER_SECOND}/s")
    return _rate(section, count, period, Requests())


def _read_tokens(section: Section) -> Rate:
    count, period = _pace(section, _RATE, "100000/min")
    return _rate(section, count, period, _read_token_meter(section))


def _read_token_meter(section: Section) -> Tokens:
    counted = section.strings("count", ["input", "output"])
    for each in counted:
        if each not in {"input", "output"}:
            section.fault("count", f"holds {each!r}; write input, output or both")
    return Tokens(
        input=float("input" in counted),
        output=float("output" in counted),
        cache_read=_number(section, "cache_read", 1.0, high=10.0),
        cache_write=_number(section, "cache_write", 1.0, high=10.0),
        reserve_output=_number(section, "reserve_output", 1.0, high=1.0),
    )


def _read_bytes(section: Section) -> Rate:
    text = section.string("rate")
    match = _BYTE_RATE.fullmatch(text)
    count, period = 1, 1.0
    if match is None or not int(match[1]):
        section.fault("rate", "must be a rate such as 100MiB/min; units are B, KiB, MiB, GiB")
    else:
        count, period = int(match[1]) * _SIZES[match[2]], _PERIODS[match[3]]
    counted = section.strings("count", ["request", "response"])
    for each in counted:
        if each not in {"request", "response"}:
            section.fault("count", f"holds {each!r}; write request, response or both")
    meter = Bytes(request="request" in counted, response="response" in counted)
    if count > MAX_QUOTA:
        section.fault("rate", f"must be at most {MAX_QUOTA} bytes a period")
    burst = section.size("burst", f"{min(count, MAX_QUOTA)}B")
    if not 1 <= burst <= MAX_QUOTA:
        section.fault("burst", f"must be between 1B and {MAX_QUOTA}B")
    section.finish()
    return Rate(count=count, period_seconds=period, burst=max(1, burst), meter=meter)


def _pace(section: Section, form: re.Pattern[str], such_as: str) -> tuple[int, float]:
    match = form.fullmatch(section.string("rate"))
    if match is None or not int(match[1]):
        section.fault("rate", f"must be a rate such as {such_as}; units are s, min, h, d")
        return 1, 1.0
    return int(match[1]), _PERIODS[match[2]]


def _rate(section: Section, count: int, period: float, meter: Meter) -> Rate:
    burst = section.integer("burst", min(count, MAX_QUOTA), low=1, high=MAX_QUOTA)
    section.finish()
    return Rate(count=count, period_seconds=period, burst=max(1, burst), meter=meter)


def _read_concurrent(section: Section) -> Concurrency:
    maximum = section.integer("max", low=1, high=MAX_QUOTA)
    lease = section.duration("lease", "90s")
    if not MIN_LEASE_SECONDS <= lease <= 86_400:
        section.fault("lease", "must be between 10s and 1d")
    section.finish()
    return Concurrency(maximum=maximum, lease_seconds=lease)


def _read_budget(section: Section) -> Budget:
    text = section.string("max")
    match = _AMOUNT.fullmatch(text)
    maximum, meter = 1, Money()
    if match is None or (match[2] == "tokens" and "." in match[1]):
        section.fault("max", "must be an amount such as 500 USD or 1000000 tokens")
    else:
        maximum = int(Decimal(match[1]) * (1_000_000 if match[2] == "USD" else 1))
    if not 1 <= maximum <= MAX_QUOTA:
        section.fault("max", "must be more than nothing, and at most a million dollars, or 10^12")
    period = section.choice("per", [each.value for each in Period])
    known = period in list(Period)
    calendar = Calendar(Period(period) if known else Period.DAY, _zone(section))
    warn_at = _percents(section)
    if match is not None and match[2] == "tokens":
        tokens = _read_token_meter(section)
        section.finish()
        return Budget(maximum=maximum, calendar=calendar, meter=tokens, warn_at=warn_at)
    meter = Money(reserve_output=_number(section, "reserve_output", 1.0, high=1.0))
    section.finish()
    return Budget(maximum=maximum, calendar=calendar, meter=meter, warn_at=warn_at)


def _zone(section: Section) -> ZoneInfo:
    name = section.string("zone", "UTC")
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        section.fault("zone", f"{name[:64]!r} is no time zone that this machine knows")
        return ZoneInfo("UTC")


def _percents(section: Section) -> tuple[int, ...]:
    value = section.value("warn_at")
    items = [] if value is None else value.data if isinstance(value.data, list) else [value]
    percents = {each.data for each in items if type(each.data) is int}
    if len(percents) != len(items) or not all(1 <= each <= 100 for each in percents):
        section.fault("warn_at", "must be different percents of the budget, such as [80, 95]")
        return ()
    return tuple(sorted(percents))


def _number(section: Section, key: str, default: float, *, high: float) -> float:
    value = section.value(key)
    if value is None:
        return default
    data = value.data
    if isinstance(data, bool) or not isinstance(data, int | float) or not 0 <= data <= high:
        section.fault(key, f"must be a number between 0 and {high:g}")
        return default
    return float(data)


_NONE: Final = Concurrency(maximum=1)
"""Stands where a fault was noted; nobody will use it."""

_READERS: dict[str, Callable[[Section], Measure]] = {
    "requests": _read_requests,
    "tokens": _read_tokens,
    "bytes": _read_bytes,
    "concurrent": _read_concurrent,
    "budget": _read_budget,
}
