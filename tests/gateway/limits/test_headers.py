"""Limits on the wire are structured fields, as draft-ietf-httpapi-ratelimit-headers has them."""

import re

from hypothesis import given
from hypothesis import strategies as st

from gateway.limits.headers import MAX_INTEGER, rate_limit_headers
from policies.quota import (
    MAX_PER_SECOND,
    MAX_QUOTA,
    Bytes,
    QuotaStatus,
    Rate,
    Requests,
    Tokens,
    Unit,
)

# RFC 9651: a List of Items that are Strings, with Parameters that are Integers or Strings.
_KEY = r"[a-z*][a-z0-9_\-.*]*"
_INTEGER = r"-?[0-9]{1,15}"
_STRING = r'"(?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*"'
_PARAMETER = re.compile(rf"; *({_KEY})=({_INTEGER}|{_STRING})")
_ITEM = re.compile(rf"({_STRING})((?:; *{_KEY}=(?:{_INTEGER}|{_STRING}))*)")
_COMMA = re.compile(r"[ \t]*,[ \t]*")

Items = list[tuple[str, dict[str, int | str]]]


def parsed(field: bytes) -> Items:
    """Return the items of a structured-field list, all of which must parse."""
    text, at, items = field.decode("ascii"), 0, []
    while True:
        item = _ITEM.match(text, at)
        assert item, text[at:]
        parameters: dict[str, int | str] = {
            key: value.strip('"') if value.startswith('"') else int(value)
            for key, value in _PARAMETER.findall(item[2])
        }
        items.append((item[1].strip('"'), parameters))
        at = item.end()
        if at == len(text):
            return items
        comma = _COMMA.match(text, at)
        assert comma, text[at:]
        at = comma.end()


def fields_of(statuses: list[QuotaStatus]) -> tuple[Items, Items]:
    """Return the parsed policy and state fields."""
    (policy_name, policy), (state_name, state) = rate_limit_headers(statuses)
    assert (policy_name, state_name) == (b"ratelimit-policy", b"ratelimit")
    return parsed(policy), parsed(state)


def concurrency(name: str, quota: int, remaining: int) -> QuotaStatus:
    """Return the status of a limit of calls at once."""
    return QuotaStatus(
        name=name,
        code="concurrency_limit_exceeded",
        is_allowed=remaining >= 0,
        quota=quota,
        remaining=max(0, remaining),
        reset_seconds=0.0,
        retry_after_seconds=0.0,
        window_seconds=0.0,
        unit=Unit.CALLS,
    )


def pace(rate: Rate, calls: int, name: str = "pace") -> QuotaStatus:
    """Return the status of the last of some calls at one instant."""
    tat, allowed = 0.0, True
    for _ in range(calls):
        tat, allowed = rate.spend(tat, 100.0)
    return rate.status(name, tat, 100.0, is_allowed=allowed)


def test_no_limit_is_no_field() -> None:
    """Where no limit applied, callers are told nothing."""
    assert rate_limit_headers([]) == []


def test_limits_read_as_the_draft_says() -> None:
    """A pace has quota and window, remaining and time to more; calls at once have their unit."""
    rate = Rate(count=60, period_seconds=60.0, burst=20)
    assert rate_limit_headers([pace(rate, 3, "dev-rpm"), concurrency("streams", 8, 5)]) == [
        (b"ratelimit-policy", b'"dev-rpm";q=20;w=20, "streams";q=8;qu="concurrent-requests"'),
        (b"ratelimit", b'"dev-rpm";r=17;t=1, "streams";r=5'),
    ]


def test_a_refused_caller_is_told_when_one_call_passes() -> None:
    """With nothing left, `t` is the wait for the next call, not for the whole quota."""
    status = pace(Rate(count=600, period_seconds=60.0, burst=200), 201)
    assert not status.is_allowed
    assert fields_of([status])[1] == [("pace", {"r": 0, "t": 1})]
    slow = pace(Rate(count=2, period_seconds=60.0, burst=5), 6)
    assert fields_of([slow])[1] == [("pace", {"r": 0, "t": 30})]


_names = st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,63}\Z")
_paces = st.builds(
    lambda name, period, count, burst, calls, meter: pace(
        Rate(count=max(1, int(count * period)), period_seconds=period, burst=burst, meter=meter),
        calls,
        name,
    ),
    _names,
    st.sampled_from([1.0, 60.0, 3600.0, 86400.0]),
    st.floats(0, MAX_PER_SECOND),
    st.integers(1, 30) | st.just(MAX_QUOTA),
    st.integers(1, 40),
    st.sampled_from([Requests(), Tokens(), Bytes()]),
)
_concurrencies = st.builds(
    concurrency, _names, st.just(MAX_QUOTA) | st.integers(1, 50), st.integers(-1, 40)
)


@given(st.lists(_paces | _concurrencies, min_size=1, max_size=8))
def test_every_limit_is_a_structured_field(statuses: list[QuotaStatus]) -> None:
    """Whatever limits a policy can hold, both fields parse, in order, with figures in bounds."""
    policies, states = fields_of(statuses)
    assert [name for name, _ in policies] == [status.name for status in statuses]
    assert [name for name, _ in states] == [status.name for status in statuses]
    for status, (_, policy), (_, state) in zip(statuses, policies, states, strict=True):
        assert policy.pop("q") == status.quota
        assert state.pop("r") == status.remaining
        if status.window_seconds:
            window, wait = policy.pop("w"), state.pop("t")
            assert isinstance(window, int)
            assert isinstance(wait, int)
            assert window >= min(max(1, status.window_seconds), MAX_INTEGER)
            assert (status.retry_after_seconds or 0) <= wait <= window
        if status.unit is not Unit.REQUESTS:
            assert policy.pop("qu") == status.unit
        assert not policy
        assert not state
