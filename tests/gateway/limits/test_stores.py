"""One contract for limits, kept by two stores: the process's own memory, and a real Redis."""

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, multiple, rule

from gateway.clock import SystemClock
from gateway.limits.memory_store import MemoryLimiter
from gateway.limits.redis_store import HOLD_SECONDS, SCRIPTS, RedisLimiter
from gateway.limits.reservation import Reservation, Warned
from gateway.limits.wire import Endpoint, Wire
from policies.limits import Demand, Limit, demands
from policies.quota import NOTHING, QuotaStatus, Usage
from policies.request import AccessRequest
from tests.policies.asking import ask, policy_set_of
from tests.simulators.redis import MEMORY_ONLY, RedisServer

NAMESPACES = itertools.count()


def limits_of(*lines: str) -> tuple[Limit, ...]:
    """Return limits from lines of YAML in flow style, without their braces."""
    return policy_set_of("limits:\n" + "".join(f"  - {{{each}}}\n" for each in lines)).limits


def asked(
    limits: Sequence[Limit], usage: Usage = NOTHING, request: AccessRequest | None = None
) -> list[Demand]:
    """Return what a call asks of limits."""
    wanted = demands(limits, request or ask(), usage, SystemClock().now())
    assert isinstance(wanted, list)
    return wanted


class Limits:
    """A store of limits as a test uses it: every call gets an id of its own."""

    def __init__(self, limiter: MemoryLimiter | RedisLimiter, warnings: list[Warned]) -> None:
        self.limiter = limiter
        self.warnings = warnings
        self.ids = itertools.count()

    async def admit(self, wanted: list[Demand]) -> Reservation | QuotaStatus:
        """Ask for a call."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.limiter.begin(wanted, f"call-{next(self.ids)}", answer.set_result)
        result = await answer
        assert isinstance(result, Reservation | QuotaStatus)
        return result

    async def admitted(self, wanted: list[Demand]) -> Reservation:
        """Ask for a call that must be let through."""
        answer = await self.admit(wanted)
        assert isinstance(answer, Reservation), answer
        return answer

    async def refused(self, wanted: list[Demand]) -> QuotaStatus:
        """Ask for a call that must not be let through."""
        answer = await self.admit(wanted)
        assert isinstance(answer, QuotaStatus)
        assert not answer.is_allowed
        return answer

    async def remaining(self, wanted: list[Demand]) -> list[int]:
        """Return what is left of each limit, told by a call that ends at once and takes nothing."""
        reservation = await self.admitted(wanted)
        self.limiter.settle(reservation, NOTHING)
        return [status.remaining for status in reservation.statuses]


def wire_to(server: RedisServer, timeout_seconds: float = 5.0) -> Wire:
    """Return a connection that is patient: these tests are not about being late."""
    return Wire(
        Endpoint(host="127.0.0.1", port=server.port),
        scripts=SCRIPTS,
        timeout_seconds=timeout_seconds,
        clock=SystemClock(),
        on_state=lambda _is_there, _reason: None,
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the tests of this file; each uses a namespace of its own."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Limits]:
    """Each of the two."""
    warnings: list[Warned] = []
    if request.param == "memory":
        yield Limits(MemoryLimiter(SystemClock(), warnings.append), warnings)
        return
    wire = wire_to(request.getfixturevalue("server"))
    limiter = RedisLimiter(
        wire,
        namespace=f"t{next(NAMESPACES)}",
        sharers=1,
        clock=SystemClock(),
        on_warned=warnings.append,
    )
    yield Limits(limiter, warnings)
    await wire.close()


TOKENS = "name: tokens, key: tenant, tokens: {rate: 1000/d, reserve_output: 0.5}"
DAY = "name: day, key: tenant, budget: {max: 1000 tokens, per: month, warn_at: [50, 90]}"
CALLS = "name: calls, key: tenant, concurrent: {max: 2}"
PACE = "name: pace, key: [tenant, subject], requests: {rate: 3/d}"


async def test_a_burst_passes_and_no_more(store: Limits) -> None:
    """So many requests pass as the burst has; the next is told when to come again."""
    limits = limits_of(PACE)
    left = [(await store.admitted(asked(limits))).statuses[0].remaining for _ in range(3)]
    assert left == [2, 1, 0]
    status = await store.refused(asked(limits))
    assert (status.name, status.code, status.quota) == ("pace", "rate_limit_exceeded", 3)
    assert status.retry_after_seconds == pytest.approx(86_400 / 3, abs=60)
    await store.admitted(asked(limits, request=ask(subject="bob")))


async def test_tokens_are_settled_to_what_was_used(store: Limits) -> None:
    """A call holds its estimate while it runs, and afterwards counts to the token."""
    limits = limits_of(TOKENS)
    call = await store.admitted(asked(limits, Usage(input=100, output=400)))
    assert call.statuses[0].remaining == 700
    store.limiter.settle(call, Usage(input=120, output=3, cache_read=20))
    assert await store.remaining(asked(limits)) == [877]


async def test_a_call_that_took_more_leaves_a_debt(store: Limits) -> None:
    """What a call took above its estimate is owed by the next ones."""
    limits = limits_of(TOKENS)
    call = await store.admitted(asked(limits, Usage(input=1)))
    store.limiter.settle(call, Usage(output=1500))
    status = await store.refused(asked(limits, Usage(input=1)))
    assert status.retry_after_seconds == pytest.approx(501 * 86.4, abs=60)


async def test_a_call_that_took_nothing_gives_all_back(store: Limits) -> None:
    """A call that never reached its provider counts as none, but for the request itself."""
    limits = limits_of(TOKENS, DAY, CALLS, PACE)
    call = await store.admitted(asked(limits, Usage(input=300)))
    store.limiter.settle(call, NOTHING)
    assert await store.remaining(asked(limits)) == [1000, 1000, 1, 1]


async def test_a_budget_counts_what_is_spent_and_held(store: Limits) -> None:
    """Running calls hold what they may take; only what they took stays spent."""
    limits = limits_of(DAY)
    first = await store.admitted(asked(limits, Usage(input=600)))
    status = await store.refused(asked(limits, Usage(input=401)))
    assert (status.code, status.remaining) == ("budget_exceeded", 400)
    assert status.retry_after_seconds
    assert 0 < status.retry_after_seconds <= 31 * 86_400
    second = await store.admitted(asked(limits, Usage(input=400)))
    store.limiter.settle(first, Usage(input=250))
    store.limiter.settle(second, Usage(input=10))
    assert await store.remaining(asked(limits)) == [740]


async def test_a_call_that_never_fits_is_told_so(store: Limits) -> None:
    """Who asks for more than the whole limit is not told to wait."""
    for limits in (limits_of(TOKENS), limits_of(DAY)):
        status = await store.refused(asked(limits, Usage(input=1001)))
        assert (status.code, status.retry_after_seconds) == ("call_exceeds_limit", None)


async def test_settling_twice_counts_once(store: Limits) -> None:
    """However often a call ends, it ends once."""
    limits = limits_of(TOKENS, DAY, CALLS)
    other = await store.admitted(asked(limits))
    call = await store.admitted(asked(limits, Usage(input=100)))
    for _ in range(3):
        store.limiter.settle(call, Usage(input=50))
    assert await store.remaining(asked(limits)) == [950, 950, 0]
    store.limiter.settle(other, NOTHING)


@pytest.mark.parametrize(
    "last", [TOKENS, DAY, CALLS, PACE], ids=["rate", "budget", "calls", "pace"]
)
async def test_all_or_nothing(store: Limits, last: str) -> None:
    """Where one limit refuses, no other has counted the call, whichever it is."""
    rows = [row for row in (TOKENS, DAY, CALLS, PACE) if row != last] + [last]
    limits = limits_of(*rows)
    only, times = limits_of(last), 3 if last == PACE else 2
    running = [await store.admitted(asked(only, Usage(input=500))) for _ in range(times)]
    before = await store.remaining(asked(limits_of(*rows[:-1])))
    for _ in range(5):
        assert (await store.refused(asked(limits, Usage(input=1)))).name == only[0].name
    after = await store.remaining(asked(limits_of(*rows[:-1])))
    spent = [1 if "pace" in row else 0 for row in rows[:-1]]
    assert after == [was - one for was, one in zip(before, spent, strict=True)]
    for each in running:
        store.limiter.settle(each, NOTHING)


async def test_a_limit_in_shadow_refuses_nobody(store: Limits) -> None:
    """It counts as if it were enforced, notes what it would have refused, and tells callers nothing."""
    limits = limits_of(f"{CALLS}, mode: shadow", DAY)
    calls = [await store.admitted(asked(limits)) for _ in range(4)]
    assert [call.notes for call in calls] == [(), (), ("calls:shadow",), ("calls:shadow",)]
    assert {tuple(status.name for status in call.statuses) for call in calls} == {("day",)}
    store.limiter.settle(calls[3], NOTHING)
    assert (await store.admitted(asked(limits))).notes == ("calls:shadow",)
    store.limiter.settle(calls[0], NOTHING)
    assert (await store.admitted(asked(limits))).notes == ()


async def test_thresholds_are_told_once(store: Limits) -> None:
    """Whoever makes spending cross a threshold tells it, and nobody again."""
    limits = limits_of(DAY)
    for amount in (499, 1, 300, 150, 10):
        call = await store.admitted(asked(limits, Usage(input=amount)))
        store.limiter.settle(call, Usage(input=amount))
        await store.remaining(asked(limits))
    told = [(word.limit, word.percent, word.spent, word.maximum) for word in store.warnings]
    assert told == [("day", 50, 500, 1000), ("day", 90, 950, 1000)]
    assert store.warnings[0].key[0] == "acme"


async def test_racing_calls_never_pass_a_cap(store: Limits) -> None:
    """Of six hundred calls at once as many pass as fit, to the last token and the last place."""
    limits = limits_of("name: b, key: tenant, budget: {max: 700 tokens, per: day}")
    answers = await asyncio.gather(
        *(store.admit(asked(limits, Usage(input=7))) for _ in range(600))
    )
    passed = [each for each in answers if isinstance(each, Reservation)]
    assert len(passed) == 100
    for call in passed:
        store.limiter.settle(call, Usage(input=6))
    assert await store.remaining(asked(limits)) == [100]


LIMITS = limits_of(
    "name: places, key: session, concurrent: {max: 2}",
    "name: budget, key: tenant, budget: {max: 40 tokens, per: month}",
    "name: tokens, key: [tenant, session], tokens: {rate: 25/d}",
)


class Racing(RuleBasedStateMachine):
    """Calls begin, end, end again, and are lost with their workers; a naive count says what is right.

    Rates refill so slowly here that no unit comes back while a test runs.
    """

    running = Bundle("running")
    ended = Bundle("ended")
    server: RedisServer | None = None

    @initialize()
    def begin(self) -> None:
        """Start with nothing running, in a namespace that nobody has used."""
        self.loop = asyncio.new_event_loop()
        self.limits = self.loop.run_until_complete(self.open())
        self.places: Counter[str] = Counter()
        self.spent: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self.ahead: Counter[tuple[str, str]] = Counter()

    async def open(self) -> Limits:
        """Return the store."""
        if self.server is None:
            return Limits(MemoryLimiter(SystemClock()), [])
        self.wire = wire_to(self.server)
        self.namespace = f"m{next(NAMESPACES)}"
        return Limits(
            RedisLimiter(self.wire, namespace=self.namespace, sharers=1, clock=SystemClock()), []
        )

    def teardown(self) -> None:
        """Close what was opened."""
        if self.server is not None and hasattr(self, "wire"):
            self.loop.run_until_complete(self.wire.close())
        self.loop.close()

    @rule(
        target=running,
        tenant=st.sampled_from(["acme", "beta"]),
        session=st.sampled_from(["s1", "s2"]),
        cost=st.integers(0, 15),
    )
    def admit(self, tenant: str, session: str, cost: int) -> object:
        """A call is admitted exactly where everything has room, and then counted in each."""
        wanted = asked(LIMITS, Usage(input=cost), ask(tenant=tenant, session_id=session))
        answer = self.loop.run_until_complete(self.limits.admit(wanted))
        fits = (
            self.places[session] < 2
            and self.spent[tenant] + self.held[tenant] + cost <= 40
            and self.ahead[tenant, session] + cost <= 25
        )
        assert isinstance(answer, Reservation) is fits, answer
        if not isinstance(answer, Reservation):
            return multiple()
        self.places[session] += 1
        self.held[tenant] += cost
        self.ahead[tenant, session] += cost
        assert [status.remaining for status in answer.statuses] == [
            2 - self.places[session],
            40 - self.spent[tenant] - self.held[tenant],
            25 - self.ahead[tenant, session],
        ]
        return (answer, tenant, session, cost)

    @rule(target=ended, call=consumes(running), used=st.integers(0, 20))
    def settle(self, call: tuple[Reservation, str, str, int], used: int) -> object:
        """A call that ends counts what it took and holds nothing any more."""
        reservation, tenant, session, cost = call
        again = Reservation(reservation.taken, (), (), reservation.call_id)
        self.limits.limiter.settle(reservation, Usage(input=used))
        self.places[session] -= 1
        self.held[tenant] -= cost
        self.spent[tenant] += used
        self.ahead[tenant, session] = max(0, self.ahead[tenant, session] + used - cost)
        return (reservation, again)

    @rule(call=ended)
    def settle_again(self, call: tuple[Reservation, Reservation]) -> None:
        """A call that has ended ends no second time, whoever says so."""
        self.limits.limiter.settle(call[0], Usage(input=9))
        if (
            self.server is not None
        ):  # a late word of the same call, as after an answer that got lost
            self.limits.limiter.settle(call[1], Usage(input=9))

    @rule(call=consumes(running))
    def lose(self, call: tuple[Reservation, str, str, int]) -> None:
        """A call whose worker died holds nothing once its leases are over."""
        reservation, tenant, session, cost = call
        if self.server is None:
            self.limits.limiter.settle(reservation, NOTHING)  # here it is the process that is gone
            self.ahead[tenant, session] -= cost
        else:
            self.expire(reservation.call_id, cost)
        self.places[session] -= 1
        self.held[tenant] -= cost

    def expire(self, call_id: str, cost: int) -> None:
        """Let the time of a call's leases pass, without waiting for it."""
        assert self.server is not None
        for key in self.server.ask("KEYS", f"{{veklom:{self.namespace}}}:limit:*"):
            member = f"{call_id}:{cost}" if key.endswith(b":holds") else call_id
            if self.server.ask("TYPE", key) == b"zset":
                self.server.ask("ZADD", key, "XX", "1", member)


Racing.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestRacing = Racing.TestCase


class TestRacingInRedis(Racing.TestCase):  # type: ignore[misc,valid-type]  # made by hypothesis
    """The same, against a real Redis."""

    @pytest.fixture(autouse=True)
    def _server(self, server: RedisServer) -> Iterator[None]:
        Racing.server = server
        yield
        Racing.server = None


async def test_what_is_renewed_does_not_expire(server: RedisServer) -> None:
    """A call that runs keeps what it holds, and takes it again where it had expired meanwhile."""
    clock = SystemClock()
    wire = wire_to(server)
    namespace = f"t{next(NAMESPACES)}"
    store = Limits(RedisLimiter(wire, namespace=namespace, sharers=1, clock=clock), [])
    assert isinstance(store.limiter, RedisLimiter)
    limits = limits_of(CALLS, DAY)
    call = await store.admitted(asked(limits, Usage(input=600)))
    keys = server.ask("KEYS", f"{{veklom:{namespace}}}:limit:*")
    sets = [key for key in keys if server.ask("TYPE", key) == b"zset"]
    assert len(sets) == 2
    for key in sets:
        server.ask("ZADD", key, "1", server.ask("ZRANGE", key, "0", "-1")[0])
    assert await store.remaining(asked(limits)) == [1, 1000]
    call.renewed_at -= HOLD_SECONDS
    store.limiter.tick()
    assert await store.remaining(asked(limits)) == [0, 400]
    store.limiter.settle(call, NOTHING)
    store.limiter.tick()
    assert await store.remaining(asked(limits)) == [1, 1000]
    await wire.close()


async def test_a_user_who_may_do_what_readme_says_counts_limits(tmp_path: Path) -> None:
    """Every script runs under the permissions that README lists, and needs no others."""
    readme = Path(__file__).resolve().parents[3] / "README.md"
    (rules,) = re.findall(
        r"^```text\n(resetchannels .*?)```", readme.read_text(), re.MULTILINE | re.DOTALL
    )
    acl = tmp_path / "users.acl"
    acl.write_text(
        f"user default on nopass +@connection\nuser veklom on >pw {' '.join(rules.split())}\n"
    )
    with RedisServer(tmp_path / "redis", MEMORY_ONLY | {"aclfile": str(acl)}) as server:
        wire = Wire(
            Endpoint(host="127.0.0.1", port=server.port, username="veklom", password=lambda: "pw"),
            scripts=SCRIPTS,
            timeout_seconds=5.0,
            clock=SystemClock(),
            on_state=lambda _is_there, _reason: None,
        )
        limiter = RedisLimiter(wire, namespace="veklom", sharers=1, clock=SystemClock())
        store = Limits(limiter, [])
        limits = limits_of(TOKENS, DAY, CALLS, PACE)
        call = await store.admitted(asked(limits, Usage(input=600)))
        call.renewed_at -= HOLD_SECONDS
        limiter.tick()
        limiter.settle(call, Usage(input=500))
        assert await store.remaining(asked(limits)) == [500, 500, 1, 1]
        assert limiter.gauges["limits_calls_degraded"] == 0
        await wire.close()
