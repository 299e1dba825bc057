"""What is admitted is counted everywhere or nowhere, and what is held is freed once."""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from gateway.limits import memory_store
from gateway.limits.memory_store import SWEEP_EVERY, MemoryLimiter
from gateway.limits.reservation import Reservation
from policies.limits import Limit, demands
from policies.quota import NOTHING, QuotaStatus
from policies.request import AccessRequest
from tests.policies.asking import ask, policy_set_of


class HandClock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        """Return the instant it was moved to."""
        return self.at

    def monotonic(self) -> float:
        """Return the instant it was moved to."""
        return self.at


def limits_of(*lines: str) -> tuple[Limit, ...]:
    """Return limits from lines of YAML in flow style, without their braces."""
    return policy_set_of("limits:\n" + "".join(f"  - {{{each}}}\n" for each in lines)).limits


def admit(
    limiter: MemoryLimiter, limits: Sequence[Limit], request: AccessRequest
) -> Reservation | QuotaStatus:
    """Ask for a call that takes no tokens."""
    wanted = demands(limits, request, NOTHING, 0.0)
    assert isinstance(wanted, list)
    return limiter.admit(wanted)


PACE = "name: pace, key: tenant, requests: {rate: 60/min, burst: 3}"
CALLS = "name: calls, key: [tenant, session], concurrent: {max: 2}"


def admitted(answer: Reservation | QuotaStatus) -> Reservation:
    """Return the reservation of a call that must have been admitted."""
    assert isinstance(answer, Reservation)
    return answer


def refused(answer: Reservation | QuotaStatus) -> QuotaStatus:
    """Return the status of a call that must have been refused."""
    assert isinstance(answer, QuotaStatus)
    assert not answer.is_allowed
    return answer


def test_a_pace_is_held_and_recovers() -> None:
    """A burst passes at once, the next call waits for its interval, other keys are free."""
    clock = HandClock()
    limiter, limits = MemoryLimiter(clock), limits_of(PACE)
    left = [admitted(admit(limiter, limits, ask())).statuses[0].remaining for _ in range(3)]
    assert left == [2, 1, 0]
    status = refused(admit(limiter, limits, ask()))
    assert (status.name, status.code) == ("pace", "rate_limit_exceeded")
    assert status.retry_after_seconds == 1.0
    admitted(admit(limiter, limits, ask(tenant="beta")))
    clock.at += 1.0
    admitted(admit(limiter, limits, ask()))
    refused(admit(limiter, limits, ask()))


def test_settling_gives_back_no_pace() -> None:
    """A call that has ended is still a call of its minute."""
    limiter, limits = MemoryLimiter(HandClock()), limits_of(PACE)
    for _ in range(3):
        limiter.settle(admitted(admit(limiter, limits, ask())), NOTHING)
    refused(admit(limiter, limits, ask()))


def test_calls_at_once_are_freed_once() -> None:
    """A settled call makes room for one other, and settling again makes room for no more."""
    limiter, limits = MemoryLimiter(HandClock()), limits_of(CALLS)
    first = admitted(admit(limiter, limits, ask()))
    second = admitted(admit(limiter, limits, ask()))
    assert [first.statuses[0].remaining, second.statuses[0].remaining] == [1, 0]
    status = refused(admit(limiter, limits, ask()))
    assert (status.name, status.code) == ("calls", "concurrency_limit_exceeded")
    assert (status.remaining, status.retry_after_seconds) == (0, 1.0)
    admitted(admit(limiter, limits, ask(session_id="s2")))
    for _ in range(3):
        limiter.settle(first, NOTHING)
    admitted(admit(limiter, limits, ask()))
    refused(admit(limiter, limits, ask()))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["pace-first", "calls-first"])
def test_a_refused_call_takes_nothing_anywhere(order: tuple[int, int]) -> None:
    """Where one limit refuses, no other has counted the call, whichever comes first."""
    clock = HandClock()
    both = limits_of(PACE, CALLS)
    limiter, limits = MemoryLimiter(clock), tuple(both[n] for n in order)
    held = [admitted(admit(limiter, limits, ask())) for _ in range(2)]
    for _ in range(5):
        assert refused(admit(limiter, limits, ask())).name == "calls"
    limiter.settle(held.pop(), NOTHING)
    admitted(admit(limiter, limits, ask()))
    clock.at += 0.25
    limiter.settle(held.pop(), NOTHING)
    for _ in range(5):
        assert refused(admit(limiter, limits, ask())).name == "pace"
    clock.at += 0.75
    held.append(admitted(admit(limiter, limits, ask())))
    assert refused(admit(limiter, limits, ask())).name in {"pace", "calls"}


def test_limits_that_do_not_match_are_not_counted() -> None:
    """A call that no limit matches holds nothing and is told nothing."""
    limits = limits_of("name: x, key: tenant, match: {tenant: beta}, concurrent: {max: 1}")
    limiter = MemoryLimiter(HandClock())
    for _ in range(3):
        assert admitted(admit(limiter, limits, ask())).statuses == ()
    admitted(admit(limiter, limits, ask(tenant="beta")))
    refused(admit(limiter, limits, ask(tenant="beta")))


def test_no_limits_admit() -> None:
    """Without limits every call is admitted, and settled without effect."""
    limiter = MemoryLimiter(HandClock())
    limiter.settle(admitted(admit(limiter, (), ask())), NOTHING)


RATES = {"fast": (8, 4), "slow": (2, 2)}
ROOM = {"session": 2, "tenant": 3}
MANY = limits_of(
    "name: fast, key: [tenant, session], requests: {rate: 8/s, burst: 4}",
    "name: session, key: session, concurrent: {max: 2}",
    "name: slow, key: tenant, requests: {rate: 2/s, burst: 2}",
    "name: tenant, key: tenant, concurrent: {max: 3}",
)


class Limiting(RuleBasedStateMachine):
    """Calls come and go at random; a naive count of buckets and running calls says what is right."""

    running = Bundle("running")
    settled = Bundle("settled")

    @initialize()
    def begin(self) -> None:
        """Start with nothing running."""
        self.clock = HandClock()
        self.limiter = MemoryLimiter(self.clock)
        self.held: Counter[tuple[str, ...]] = Counter()
        self.levels: dict[tuple[str, ...], tuple[Fraction, Fraction]] = {}
        self.callers: dict[int, tuple[str, str]] = {}

    def room(self, tenant: str, session: str) -> list[tuple[str, ...]]:
        """Return the counts of calls at once that a caller's call is held under."""
        return [("session", session), ("tenant", tenant)]

    def bucket(self, name: str, key: tuple[str, ...]) -> Fraction:
        """Return how many calls a pace still has for a key."""
        rate, burst = RATES[name]
        now = Fraction(self.clock.at)
        level, at = self.levels.get((name, *key), (Fraction(burst), now))
        return min(Fraction(burst), level + (now - at) * rate)

    @rule(
        target=running,
        tenant=st.sampled_from(["acme", "beta"]),
        session=st.sampled_from(["s1", "s2", "s3"]),
    )
    def admit(self, tenant: str, session: str) -> object:
        """A call is admitted exactly where every count has room, and then counted in each."""
        answer = admit(self.limiter, MANY, ask(tenant=tenant, session_id=session))
        paces = {("fast", tenant, session), ("slow", tenant)}
        levels = {pace: self.bucket(pace[0], pace[1:]) for pace in paces}
        counts = self.room(tenant, session)
        fits = all(self.held[key] < ROOM[key[0]] for key in counts)
        may = fits and all(level >= 1 for level in levels.values())
        assert isinstance(answer, Reservation) is may
        if not isinstance(answer, Reservation):
            return multiple()
        self.held.update(counts)
        now = Fraction(self.clock.at)
        self.levels |= {pace: (level - 1, now) for pace, level in levels.items()}
        told = {status.name: status.remaining for status in answer.statuses}
        assert told == {
            "fast": int(levels["fast", tenant, session] - 1),
            "session": 2 - self.held["session", session],
            "slow": int(levels["slow", tenant] - 1),
            "tenant": 3 - self.held["tenant", tenant],
        }
        return (answer, tenant, session)

    @rule(target=settled, call=consumes(running))
    def settle(self, call: tuple[Reservation, str, str]) -> object:
        """A call that ends frees what it held."""
        self.limiter.settle(call[0], NOTHING)
        self.held.subtract(self.room(*call[1:]))
        return call

    @rule(call=settled)
    def settle_again(self, call: tuple[Reservation, str, str]) -> None:
        """A call that has ended frees nothing any more."""
        self.limiter.settle(call[0], NOTHING)

    @rule(ticks=st.integers(1, 16))
    def wait(self, ticks: int) -> None:
        """Time passes in steps that floats hold exactly."""
        self.clock.at += ticks / 16

    @invariant()
    def nothing_is_counted_that_does_not_run(self) -> None:
        """The limiter keeps a count for every key with running calls, the right one, and no other."""
        kept = self.limiter._running
        assert sorted(kept.values()) == sorted(each for each in self.held.values() if each)
        assert all(0 < count <= ROOM[key[0]] for key, count in kept.items())


Limiting.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLimiting = Limiting.TestCase


def test_idle_keys_are_forgotten() -> None:
    """Keys that are as good as unused are swept, those with a debt are kept."""
    clock = HandClock()
    limiter = MemoryLimiter(clock)
    limits = limits_of("name: m, key: model, requests: {rate: 1/min, burst: 1}")
    for n in range(SWEEP_EVERY - 2):
        admitted(admit(limiter, limits, ask(model=f"m{n}")))
    clock.at += 61.0
    admitted(admit(limiter, limits, ask(model="late")))
    admitted(admit(limiter, limits, ask(model="last")))
    assert len(limiter._arrivals) == 2
    refused(admit(limiter, limits, ask(model="late")))


def test_memory_is_bounded_by_forgetting_the_least_debt(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many keys callers invent, a bounded number is kept: those furthest in debt."""
    monkeypatch.setattr(memory_store, "MAX_KEYS", 100)
    limiter = MemoryLimiter(HandClock())
    limits = limits_of("name: m, key: model, requests: {rate: 1/d, burst: 2}")
    for _ in range(2):
        admitted(admit(limiter, limits, ask(model="spent")))
    for n in range(3 * SWEEP_EVERY):
        admitted(admit(limiter, limits, ask(model=f"m{n}")))
        assert len(limiter._arrivals) <= 100 + SWEEP_EVERY
    refused(admit(limiter, limits, ask(model="spent")))


def test_ended_calls_leave_nothing_behind() -> None:
    """Once every call has ended, no count of calls at once remains."""
    limiter, limits = MemoryLimiter(HandClock()), limits_of(CALLS)
    held = [admitted(admit(limiter, limits, ask(session_id=f"s{n}"))) for n in range(500)]
    assert len(limiter._running) == 500
    for reservation in held:
        limiter.settle(reservation, NOTHING)
    assert not limiter._running


@given(st.integers(0, 5), st.lists(st.booleans(), max_size=30))
def test_refusals_cost_no_memory(calls: int, which: list[bool]) -> None:
    """A call that is refused leaves no trace under any key."""
    limiter = MemoryLimiter(HandClock())
    limits = limits_of(
        "name: m, key: model, requests: {rate: 1/s}", "name: c, key: tenant, concurrent: {max: 1}"
    )
    admitted(admit(limiter, limits, ask(model="first")))
    for n, same in enumerate(which):
        refused(admit(limiter, limits, ask(model="first" if same else f"m{n + calls}")))
    assert len(limiter._arrivals) == 1
