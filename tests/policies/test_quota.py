"""GCRA against a queue that is simulated call by call, in exact fractions."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from policies.limits import Limit
from policies.quota import Concurrency, Rate
from tests.policies.asking import ask, policy_set_of

TICKS = 1024
"""Instants of the exact test are multiples of 1/1024 s, which floats hold without rounding."""


class Bucket:
    """The naive model: a bucket of `burst` calls that refills one call every interval."""

    def __init__(self, interval: Fraction, burst: int) -> None:
        self.interval = interval
        self.burst = burst
        self.level = Fraction(burst)
        self.at = Fraction(0)

    def arrive(self, now: Fraction) -> bool:
        """Return whether a call at `now` finds a whole call in the bucket, and take it."""
        self.level = min(Fraction(self.burst), self.level + (now - self.at) / self.interval)
        self.at = now
        if self.level < 1:
            return False
        self.level -= 1
        return True


_exact_rates = st.builds(
    lambda power, burst: Rate(count=2**power, period_seconds=1.0, burst=burst),
    st.integers(0, 8),
    st.integers(1, 12),
)
_rates = st.builds(
    lambda count, period, burst: Rate(count=count, period_seconds=period, burst=burst),
    st.integers(1, 10_000),
    st.sampled_from([1.0, 60.0, 3600.0, 86400.0]),
    st.integers(1, 50),
)
_gaps = st.lists(st.integers(0, 2 * TICKS) | st.just(0), max_size=60)


@given(_exact_rates, _gaps, st.integers(0, 10**6))
def test_a_rate_is_a_bucket_that_refills(rate: Rate, gaps: list[int], start: int) -> None:
    """On instants without rounding, every answer and every figure is the model's, exactly."""
    interval = Fraction(1, rate.count)
    bucket = Bucket(interval, rate.burst)
    ticks, tat = start * TICKS, 0.0
    for gap in gaps:
        ticks += gap
        now = ticks / TICKS
        tat, allowed = rate.spend(tat, now)
        assert allowed is bucket.arrive(Fraction(ticks, TICKS))
        status = rate.status("x", tat, now, is_allowed=allowed)
        assert status.is_allowed is allowed
        assert status.remaining == int(bucket.level)
        missing = min(status.remaining + 1, rate.burst) - bucket.level
        assert Fraction(status.reset_seconds) == missing * interval
        wait = Fraction(0) if allowed else (1 - bucket.level) * interval
        assert Fraction(status.retry_after_seconds or 0.0) == wait


@given(_rates, st.lists(st.floats(0, 5000), max_size=60), st.floats(0, 1e7))
def test_no_rounding_lets_more_pass(rate: Rate, gaps: list[float], start: float) -> None:
    """At any pace and instant, no window ever holds more calls than burst and refill give."""
    now, tat, passed = start, 0.0, []
    for gap in gaps:
        now += gap / rate.count
        tat, allowed = rate.spend(tat, now)
        if allowed:
            passed.append(Fraction(now))
    interval = Fraction(rate.period_seconds) / rate.count
    slack = interval / 1000 + Fraction(1, 10**6)
    for first in range(len(passed)):
        for last in range(first, len(passed)):
            refilled = (passed[last] - passed[first] + slack) / interval
            assert last - first + 1 <= rate.burst + refilled


@given(_rates, st.integers(1, 80), st.floats(0, 1e6))
def test_retry_after_is_neither_early_nor_late(rate: Rate, calls: int, now: float) -> None:
    """A refused call passes once it has waited as told, and does not pass clearly before."""
    tat, allowed = 0.0, True
    for _ in range(calls):
        tat, allowed = rate.spend(tat, now)
    assume(not allowed)
    interval = rate.period_seconds / rate.count
    wait = rate.status("x", tat, now, is_allowed=False).retry_after_seconds
    assert wait is not None
    assert 0 < wait <= interval + 1e-6
    assert rate.spend(tat, now + wait + 1e-6)[1]
    assume(interval > 1e-3)
    assert not rate.spend(tat, now + wait - interval / 100)[1]


@given(_rates, st.floats(0, 1e6))
def test_an_idle_key_is_as_good_as_new(rate: Rate, now: float) -> None:
    """Once its burst has refilled a key has its whole burst again, and never more than that."""
    tat = 0.0
    for _ in range(rate.burst):
        tat, _ = rate.spend(tat, now)
    later = now + rate.burst * rate.period_seconds / rate.count + 1e-3
    allowed = 0
    for _ in range(rate.burst + 1):
        tat, passed = rate.spend(tat, later)
        allowed += passed
    assert allowed == rate.burst


def test_a_refused_call_costs_nothing() -> None:
    """A refusal leaves the state as it was, so that hammering does not prolong the wait."""
    rate = Rate(count=1, period_seconds=60.0, burst=1)
    tat, _ = rate.spend(0.0, 100.0)
    assert [rate.spend(tat, 100.0 + n) for n in range(59)] == [(160.0, False)] * 59
    assert rate.spend(tat, 160.0) == (220.0, True)


def limit_of(text: str) -> Limit:
    """Return the one limit of a file."""
    (limit,) = policy_set_of(f"limits: [{{name: l, {text}}}]").limits
    return limit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{rate: 60/min, burst: 20}", Rate(count=60, period_seconds=60.0, burst=20)),
        ("{rate: 5/s}", Rate(count=5, period_seconds=1.0, burst=5)),
        ("{rate: 100/h, burst: 1}", Rate(count=100, period_seconds=3600.0, burst=1)),
        ("{rate: 7/d, burst: 9}", Rate(count=7, period_seconds=86400.0, burst=9)),
        ("{rate: 1000000/s}", Rate(count=10**6, period_seconds=1.0, burst=10**6)),
        (
            "{rate: 86400000000/d}",
            Rate(count=86_400 * 10**6, period_seconds=86400.0, burst=86_400 * 10**6),
        ),
    ],
    ids=["minute", "burst-is-count", "hour", "day", "fastest", "fastest-day"],
)
def test_a_rate_is_read_as_written(text: str, expected: Rate) -> None:
    """Count, period and burst come from the file; the burst is the count where none is set."""
    limit = limit_of(f"key: tenant, requests: {text}")
    assert limit.measure == expected


def test_concurrency_is_read_as_written() -> None:
    """A limit of calls at once has a maximum and no rate."""
    limit = limit_of("key: [tenant, session], concurrent: {max: 8}")
    assert limit.measure == Concurrency(maximum=8)


@pytest.mark.parametrize(
    ("part", "same", "other"),
    [
        ("tenant", {"subject": "bob"}, {"tenant": "beta"}),
        ("subject", {"session_id": "s2"}, {"subject": "bob"}),
        ("subject", {"model": "x"}, {"issuer": "https://else.test"}),
        ("session", {"subject": "bob"}, {"session_id": "s2"}),
        ("provider", {"model": "x"}, {"provider": "gemini"}),
        ("model", {"tenant": "beta"}, {"model": "gpt-5"}),
        ("operation", {"tenant": "beta"}, {"operation": "responses"}),
    ],
    ids=["tenant", "subject", "subject-of-issuer", "session", "provider", "model", "operation"],
)
def test_calls_are_counted_under_their_key(
    part: str, same: dict[str, Any], other: dict[str, Any]
) -> None:
    """Calls that agree in the parts of the key share a count, others do not."""
    limit = limit_of(f"key: {part}, requests: {{rate: 1/s}}")
    assert limit.key_of(ask()) == limit.key_of(ask(**same))
    assert limit.key_of(ask()) != limit.key_of(ask(**other))


@given(*[st.text("ab\0,", max_size=3)] * 4)
def test_keys_of_several_parts_do_not_run_together(a: str, b: str, c: str, d: str) -> None:
    """No choice of texts makes two different callers one key."""
    limit = limit_of("key: [tenant, session], requests: {rate: 1/s}")
    one, two = ask(tenant=a, session_id=b), ask(tenant=c, session_id=d)
    assert (limit.key_of(one) == limit.key_of(two)) is ((a, b) == (c, d))


@pytest.mark.parametrize(
    ("match", "facts", "expected"),
    [
        ("", {}, True),
        (", match: {roles: engineer}", {}, True),
        (", match: {roles: engineer}", {"roles": ()}, False),
        (", match: {client_address: 10.0.0.0/8}", {"address": "11.0.0.1"}, False),
        (", match: {client_address: 10.0.0.0/8}", {"address": ""}, True),
        (", match: {not: {client_address: 10.0.0.0/8}}", {"address": ""}, True),
    ],
    ids=["every-call", "matching", "other", "address", "broken", "broken-under-not"],
)
def test_a_limit_counts_what_it_matches(
    match: str, facts: dict[str, Any], *, expected: bool
) -> None:
    """A limit counts matching calls, all calls where it has no match, and what it cannot tell."""
    limit = limit_of(f"key: tenant, requests: {{rate: 1/s}}{match}")
    assert limit.applies_to(ask(**facts)) is expected
