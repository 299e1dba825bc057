"""Limits as they are written: every kind, for whom it counts, and what a call asks of it."""

from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.calendar import Calendar, Period
from policies.document import DocumentError
from policies.limits import Demand, Limit, OnStoreError, demands
from policies.quota import (
    NOTHING,
    Budget,
    Bytes,
    Concurrency,
    Money,
    QuotaStatus,
    Rate,
    Tokens,
    Usage,
)
from policies.request import AccessRequest
from tests.policies.asking import ask, policy_set_of

UTC = ZoneInfo("UTC")
NOON = datetime(2026, 3, 29, 12, tzinfo=ZoneInfo("Europe/Paris")).timestamp()
"""Of a Sunday on which clocks were set: it has 23 hours."""


def limit_of(text: str) -> Limit:
    """Return the one limit of a file."""
    (limit,) = policy_set_of(f"limits: [{{name: l, key: tenant, {text}}}]").limits
    return limit


def asked(
    limit: Limit, usage: Usage = NOTHING, now: float = NOON, request: AccessRequest | None = None
) -> Demand:
    """Return what a call asks of the limit."""
    wanted = demands([limit], request or ask(), usage, now)
    assert isinstance(wanted, list)
    (demand,) = wanted
    return demand


KINDS: dict[str, tuple[str, Any]] = {
    "tokens": (
        "tokens: {rate: 400000/min, cache_read: 0, cache_write: 1.25, reserve_output: 0.5}",
        Rate(
            count=400_000,
            period_seconds=60.0,
            burst=400_000,
            meter=Tokens(cache_read=0.0, cache_write=1.25, reserve_output=0.5),
        ),
    ),
    "input-tokens": (
        "tokens: {rate: 10/s, burst: 100, count: input}",
        Rate(count=10, period_seconds=1.0, burst=100, meter=Tokens(output=0.0)),
    ),
    "bytes": (
        "bytes: {rate: 1MiB/min, count: response, burst: 2KiB}",
        Rate(count=2**20, period_seconds=60.0, burst=2048, meter=Bytes(request=False)),
    ),
    "lease": ("concurrent: {max: 8, lease: 5m}", Concurrency(maximum=8, lease_seconds=300.0)),
    "money": (
        "budget: {max: 12.5 USD, per: month, zone: Europe/Paris, warn_at: [95, 80]}",
        Budget(
            maximum=12_500_000,
            calendar=Calendar(Period.MONTH, ZoneInfo("Europe/Paris")),
            meter=Money(),
            warn_at=(80, 95),
        ),
    ),
    "token-budget": (
        "budget: {max: 1000000 tokens, per: day, count: output}",
        Budget(maximum=1_000_000, calendar=Calendar(Period.DAY, UTC), meter=Tokens(input=0.0)),
    ),
}


@pytest.mark.parametrize(("text", "expected"), KINDS.values(), ids=KINDS)
def test_a_limit_is_read_as_written(text: str, expected: Any) -> None:
    """Every kind of limit has the figures that its file gives it, and no others."""
    assert limit_of(text).measure == expected


WRONG = {
    "percent": ("budget: {max: 1 USD, per: day, warn_at: [0.8]}", "warn_at must be different"),
    "percent-true": ("budget: {max: 1 USD, per: day, warn_at: [true]}", "warn_at must be differ"),
    "zone": ("budget: {max: 1 USD, per: day, zone: Paris}", "zone 'Paris' is no time zone"),
    "zone-path": ("budget: {max: 1 USD, per: day, zone: ../etc}", "zone '../etc' is no time zone"),
    "per": ("budget: {max: 1 USD, per: year}", "per must be one of day, week, month"),
    "amount": ("budget: {max: 500, per: day}", "max must be text"),
    "currency": ("budget: {max: 500 EUR, per: day}", "max must be an amount such as"),
    "half-a-token": ("budget: {max: 1.5 tokens, per: day}", "max must be an amount such as"),
    "nothing": ("budget: {max: 0 USD, per: day}", "max must be more than nothing"),
    "too-much": ("budget: {max: 1000001 USD, per: day}", "and at most a million dollars"),
    "lease": ("concurrent: {max: 1, lease: 1s}", "lease must be between 10s and 1d"),
    "count": ("tokens: {rate: 1/s, count: total}", "count holds 'total'"),
    "byte-count": ("bytes: {rate: 1B/s, count: total}", "count holds 'total'"),
    "byte-rate": ("bytes: {rate: 1MB/s}", "rate must be a rate such as 100MiB/min"),
    "byte-burst": ("bytes: {rate: 1B/s, burst: 0B}", "burst must be between 1B"),
    "weight": ("tokens: {rate: 1/s, cache_read: -1}", "cache_read must be a number between"),
    "reserve": ("tokens: {rate: 1/s, reserve_output: 2}", "reserve_output must be a number"),
    "override-of-whom": (
        "tokens: {rate: 1/s}, overrides: [{tokens: {rate: 2/s}}]",
        "match is required: for whom",
    ),
    "override-of-what": (
        "tokens: {rate: 1/s}, overrides: [{match: {roles: a}, requests: {rate: 2/s}}]",
        "tokens is required: an override has the limit's own kind",
    ),
    "price-of-tokens": (
        "tokens: {rate: 1/s}, on_unknown_price: allow",
        "on_unknown_price belongs to budgets in USD",
    ),
    "store": ("tokens: {rate: 1/s}, on_store_error: open", "on_store_error must be one of"),
    "mode": ("tokens: {rate: 1/s}, mode: off", "mode must be one of enforce, shadow"),
    "meant-shadow": ("tokens: {rate: 1/s}, shadow: true", "unknown key 'shadow'"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_a_limit_that_is_wrong_is_refused(text: str, message: str) -> None:
    """What cannot be meant is refused with the name of the field, never guessed at."""
    with pytest.raises(DocumentError) as caught:
        limit_of(text)
    assert message in str(caught.value)


def test_no_more_limits_than_a_store_is_asked_at_once() -> None:
    """A policy with more limits than a store is asked at once is refused."""
    rows = "".join(f"  - {{name: l{n}, key: tenant, requests: {{rate: 1/s}}}}\n" for n in range(65))
    with pytest.raises(DocumentError, match="there may be 64 limits"):
        policy_set_of("limits:\n" + rows)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("requests: {rate: 1/s}", OnStoreError.LOCAL),
        ("concurrent: {max: 1}", OnStoreError.LOCAL),
        ("budget: {max: 1 USD, per: day}", OnStoreError.DENY),
        ("budget: {max: 1 USD, per: day}, on_store_error: allow", OnStoreError.ALLOW),
    ],
    ids=["rate", "concurrent", "budget", "declared"],
)
def test_what_a_lost_store_means_is_declared(text: str, expected: OnStoreError) -> None:
    """Without its store a budget denies and anything else counts its share, unless it says so."""
    assert limit_of(text).on_store_error is expected


def test_overrides_give_some_callers_other_figures() -> None:
    """The first override that matches counts, the limit's own figures where none does."""
    limit = limit_of(
        "requests: {rate: 1/s}, overrides: [{match: {roles: gold}, requests: {rate: 9/s}}, "
        "{match: {tenant: acme}, requests: {rate: 5/s}}]"
    )

    def burst(request: AccessRequest) -> int:
        measure = limit.measure_for(request)
        assert isinstance(measure, Rate)
        return measure.burst

    assert burst(ask(roles=("gold",))) == 9
    assert burst(ask()) == 5
    assert burst(ask(tenant="beta")) == 1


def test_an_override_that_fails_gives_nothing_more() -> None:
    """A condition that cannot be told leaves the limit's own figures standing."""
    limit = limit_of(
        "requests: {rate: 1/s}, overrides: [{match: {client_address: 10.0.0.0/8}, "
        "requests: {rate: 9/s}}]"
    )
    assert limit.measure_for(ask(address="")) == limit.measure


USED = Usage(input=1000, output=300, cache_read=600, cache_write=100)


@pytest.mark.parametrize(
    ("text", "reserved", "charged"),
    [
        ("tokens: {rate: 1/s}", 1300, 1300),
        ("tokens: {rate: 1/s, cache_read: 0, reserve_output: 0.5}", 1150, 700),
        ("tokens: {rate: 1/s, cache_write: 1.25, cache_read: 0.1}", 1300, 785),
        ("tokens: {rate: 1/s, count: output, cache_read: 9}", 300, 300),
        ("tokens: {rate: 1/s, count: input}", 1000, 1000),
        ("tokens: {rate: 1/s, count: output, reserve_output: 0}", 0, 300),
        ("budget: {max: 9 tokens, per: day, cache_read: 0.001}", 1300, 701),
        ("requests: {rate: 1/s}", 1, 1),
    ],
    ids=["all", "cached", "weights", "output", "input", "unreserved", "rounded-up", "requests"],
)
def test_tokens_count_by_weight(text: str, reserved: int, charged: int) -> None:
    """Beforehand everything counts as fresh; afterwards each kind of token by its weight."""
    demand = asked(limit_of(text), USED)
    assert demand.cost == reserved
    assert not isinstance(demand.measure, Concurrency)
    assert demand.measure.meter.charge(USED) == charged


def test_more_cached_than_read_is_not_negative() -> None:
    """A provider that claims more cached tokens than input gives nobody a credit."""
    usage = Usage(input=10, cache_read=50)
    assert Tokens(cache_read=0.0).charge(usage) == 0


def test_bytes_of_both_ways_are_counted() -> None:
    """The request's bytes are taken beforehand, the answer's when they are known."""
    usage = Usage(request_bytes=10, response_bytes=32)
    assert (Bytes().reserve(usage), Bytes().charge(usage)) == (10, 42)
    assert (Bytes(request=False).reserve(usage), Bytes(request=False).charge(usage)) == (0, 32)


PRICES = """
prices:
  - {provider: openai, model: "gpt-*", input: "1"}
  - {provider: openai, model: "gpt-5-*", input: "1.25", output: "10", cache_read: "0.125"}
  - {provider: openai, model: gpt-5-mini, input: "0.25", output: "2"}
"""


@pytest.mark.parametrize(
    ("provider", "model", "cost"),
    [
        ("openai", "gpt-5-mini", (250, 2000)),
        ("openai", "gpt-5-pro", (1250, 10_000)),
        ("openai", "gpt-4", (1000, 0)),
        ("openai", "o9", None),
        ("anthropic", "gpt-5-mini", None),
    ],
    ids=["exact", "longer", "shorter", "unknown", "elsewhere"],
)
def test_the_nearest_price_counts(provider: str, model: str, cost: tuple[int, int] | None) -> None:
    """A name wins over a pattern, a longer pattern over a shorter, within one provider."""
    price = policy_set_of(PRICES).prices.find(provider, model)
    priced = price.of(Usage(input=1000, output=1000)) if price else None
    assert (priced and (priced.input_cost, priced.output_cost)) == cost


def test_costs_are_rounded_up_and_caches_have_prices_of_their_own() -> None:
    """A fraction of a millionth of a dollar counts as one, and cached tokens as they are priced."""
    price = policy_set_of(PRICES).prices.find("openai", "gpt-5-pro")
    assert price is not None
    assert price.of(Usage(input=1)).input_cost == 2
    assert price.of(Usage(input=1000, cache_read=1000)).input_cost == 125
    assert price.of(Usage(input=1000, cache_write=1000)).input_cost == 1250


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{provider: mine, model: a, input: '1'}", "provider 'mine' is not configured"),
        ("{provider: openai, model: a}", "input is required"),
        ("{provider: openai, model: a, input: '-1'}", "input must be dollars"),
        ("{provider: openai, model: a, input: 1.5}", "input must be text"),
        ("{provider: openai, model: a, input: '1', output: ''}", "output must be dollars"),
    ],
    ids=["provider", "no-input", "negative", "float", "blank"],
)
def test_a_price_that_is_wrong_is_refused(row: str, message: str) -> None:
    """A price that cannot be read is a fault of the file, never nothing."""
    with pytest.raises(DocumentError) as caught:
        policy_set_of(f"prices: [{row}]")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", ", mode: shadow", ", on_unknown_price: allow"])
def test_a_model_without_a_price(text: str) -> None:
    """A budget refuses a model that it cannot price, unless it may let it pass uncounted."""
    limit = limit_of(f"budget: {{max: 1 USD, per: day}}{text}")
    wanted = demands([limit], ask(), Usage(is_priced=False), NOON)
    if text:
        assert wanted == []
    else:
        assert isinstance(wanted, QuotaStatus)
        assert (wanted.code, wanted.retry_after_seconds) == ("price_unknown", None)


@pytest.mark.parametrize(
    ("per", "label", "hours"),
    [
        ("day", "day:2026-03-29", (12 - 1, 12)),
        ("week", "week:2026-03-23", (6 * 24 + 12 - 1, 12)),
        ("month", "month:2026-03-01", (28 * 24 + 12 - 1, 2 * 24 + 12)),
    ],
)
def test_a_window_is_that_of_the_zones_calendar(
    per: str, label: str, hours: tuple[int, int]
) -> None:
    """Days, weeks from Monday and months begin at midnight of the zone, also where clocks are set."""
    calendar = Calendar(Period(per), ZoneInfo("Europe/Paris"))
    window = calendar.window(NOON)
    assert window.label == label
    assert (NOON - window.begins_at, window.ends_at - NOON) == (hours[0] * 3600, hours[1] * 3600)


_zones = st.sampled_from(["UTC", "Europe/Paris", "America/Sao_Paulo", "Asia/Kathmandu"])


@given(st.sampled_from(list(Period)), _zones, st.lists(st.integers(0, 2**32), min_size=2))
def test_windows_never_overlap(period: Period, zone: str, instants: list[int]) -> None:
    """Every instant is in one window; two instants share its name exactly if they share it."""
    calendar = Calendar(period, ZoneInfo(zone))
    windows = [calendar.window(instant) for instant in instants]
    for instant, window in zip(instants, windows, strict=True):
        assert window.begins_at <= instant < window.ends_at
        for other in windows:
            apart = other.ends_at <= window.begins_at or window.ends_at <= other.begins_at
            assert (other == window) is (other.label == window.label) is not apart


def test_a_budget_is_counted_by_window() -> None:
    """What was spent yesterday is nothing to today's budget."""
    limit = limit_of("budget: {max: 9 tokens, per: day}")
    assert asked(limit, now=NOON).key == ("l", "acme", "day:2026-03-29")
    assert asked(limit, now=NOON + 86_400).key == ("l", "acme", "day:2026-03-30")


def test_warnings_are_told_of_the_highest_threshold_crossed() -> None:
    """Reaching a percent tells it once; what was above before, or stays below, tells nothing."""
    budget = limit_of("budget: {max: 1000 tokens, per: day, warn_at: [80, 95]}").measure
    assert isinstance(budget, Budget)
    steps = [(0, 799), (799, 800), (800, 949), (800, 950), (0, 2000), (950, 2000)]
    assert [budget.crossed(*step) for step in steps] == [0, 80, 0, 95, 95, 0]


@given(st.integers(1, 64), st.integers(1, 10**6), st.integers(1, 10**6))
def test_shares_add_up_to_no_more(number: int, count: int, burst: int) -> None:
    """All shares together pass no more than the limit, where each can have one unit at all."""
    rate = Rate(count=count, period_seconds=60.0, burst=burst)
    share = rate.shared_by(number)
    assert share.interval >= rate.interval * number * (1 - 1e-9)
    assert share.burst * number <= max(rate.burst, number)
    assert Concurrency(maximum=burst).shared_by(number).maximum * number <= max(burst, number)
