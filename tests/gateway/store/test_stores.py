"""What every store of sessions does, held against the one in memory and the one in Redis alike."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import Sessions, parse_config
from gateway.errors import Refused
from gateway.store.memory import MemoryStore
from gateway.store.redis_store import KEPT_SECONDS, RedisStore
from gateway.store.sessions import Entry, SessionStore, StoreUnavailable
from keys.session import SealedCredential, SessionRecord
from keys.wrapping import Wrapping
from policies.request import Principal
from tests.simulators.redis import RedisServer

LIMITS = Sessions(default_ttl=60, max_ttl=600, idle=30, overlap=10, per_subject=3, total=5)
NOW = int(time.time()) + 86_400
"""A day ahead of Redis, so that it forgets nothing by its own clock while tests run."""

KEY = b"k" * 32
_namespaces = count()


WRAPPING = Wrapping(b"b" * 32)


class Clock:
    """Time that stands: tests say what time it is."""

    def now(self) -> float:
        """Return the test's time."""
        return float(NOW)

    monotonic = now


def entry(number: int = 1, subject: str = "alice", *, lives: int = 60, idle: int = 30) -> Entry:
    """Return a session that begins now."""
    record = SessionRecord(
        session_id=f"{number:032x}", tenant="acme", issuer="i", subject=subject, generation=1,
        revision=1, created_at=NOW, expires_at=NOW + lives, idle_seconds=idle,
        credentials=(
            SealedCredential(
                provider="p", origin="o", fingerprint="v1:f", revision=1, sealed=b"\0\xff" * 20
            ),
        ),
    )  # fmt: skip
    principal = Principal(issuer="i", subject=subject, tenant="acme", roles=frozenset({"r"}))
    return Entry(principal, WRAPPING.wrap(record), f"label {number}", float(NOW))


def plain(held: Entry | None) -> Entry | None:
    """Return a session so that it can be compared: wrapped, no two are alike."""
    return held and replace(held, record=WRAPPING.unwrap(held.record))


def renewed(before: Entry, lives: int = 120) -> Entry:
    """Return the session's next revision."""
    record = replace(before.record, revision=before.record.revision + 1, expires_at=NOW + lives)
    return Entry(before.principal, record, before.label, before.used_at)


def facts(ended: Entry) -> tuple[Principal, str, str]:
    """Return what the end of a session is recorded from."""
    return ended.principal, ended.record.session_id, ended.record.issuer


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the module."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


def redis_store(
    redis: RedisServer, namespace: str, *, key: bytes = KEY, timeout: str = "5s"
) -> RedisStore:
    """Return a replica's store."""
    fields = {"backend": "redis", "url": redis.url, "namespace": namespace, "timeout": timeout}
    config = parse_config(json.dumps({"store": fields}), "c.yaml", {})
    return RedisStore(
        config.store,
        LIMITS,
        deployment="test",
        deployment_key=key,
        wrapping=WRAPPING,
        clock=Clock(),
    )


@pytest.fixture(params=["memory", "redis"])
async def store(request: pytest.FixtureRequest, redis: RedisServer) -> AsyncIterator[SessionStore]:
    """Each kind of store, empty."""
    if request.param == "memory":
        yield MemoryStore(LIMITS)
        return
    kept = redis_store(redis, f"n{next(_namespaces)}")
    yield kept
    await kept.aclose()


async def test_keeps_what_it_was_given(store: SessionStore) -> None:
    """A session is found as it was opened, by its id and among its owner's, and by nobody else."""
    one, other = entry(1), entry(2, "bob")
    await store.open(one)
    await store.open(other)
    assert plain(await store.find(one.record.session_id)) == plain(one)
    assert [plain(each) for each in await store.owned_by(one.principal)] == [plain(one)]
    assert await store.find("unknown") is None


async def test_refuses_more_than_an_owner_may_have(store: SessionStore) -> None:
    """A subject has its cap, a closed session makes room, and others are not concerned."""
    for number in range(3):
        await store.open(entry(number))
    with pytest.raises(Refused) as refused:
        await store.open(entry(3))
    assert refused.value.code == "too_many_sessions"
    await store.open(entry(4, "bob"))
    await store.close(entry(0).record.session_id, "closed")
    await store.open(entry(3))


async def test_refuses_more_than_there_may_be(store: SessionStore) -> None:
    """All together have their cap, and nothing is left of what was refused."""
    for number in range(5):
        await store.open(entry(number, f"user{number}"))
    late = entry(5, "late")
    with pytest.raises(Refused) as refused:
        await store.open(late)
    assert (refused.value.code, refused.value.retry_after_seconds) == ("overloaded", 30)
    assert await store.find(late.record.session_id) is None
    assert await store.owned_by(late.principal) == []


async def test_hands_a_closed_session_to_one(store: SessionStore) -> None:
    """Of many who close a session one gets it, so that its end is recorded once."""
    one = entry()
    await store.open(one)
    closing = [store.close(one.record.session_id, "closed") for _ in range(8)]
    given = [each for each in await asyncio.gather(*closing) if each is not None]
    assert [facts(each) for each in given] == [facts(one)]
    assert await store.find(one.record.session_id) is None
    assert await store.due(NOW + 1000) == []


async def test_replaces_only_what_was_read(store: SessionStore) -> None:
    """Of two changes of one revision the second changes nothing; a closed session stays so."""
    one = entry()
    await store.open(one)
    outcomes = [await store.replace(renewed(one, lives), 1) for lives in (100, 200)]
    assert outcomes == [True, False]
    found = await store.find(one.record.session_id)
    assert found is not None
    assert (found.record.revision, found.record.expires_at) == (2, NOW + 100)
    assert await store.replace(one, 2)  # a renewal that could not be recorded is taken back
    await store.close(one.record.session_id, "closed")
    assert not await store.replace(renewed(one), 1)
    assert await store.find(one.record.session_id) is None


async def test_knows_what_is_due(store: SessionStore) -> None:
    """A session is idle before it is old; use defers the one, a renewal the other."""
    one = entry(1)
    await store.open(one)
    session_id = one.record.session_id
    assert await store.due(NOW + 29) == []
    assert await store.due(NOW + 30) == [(session_id, "idle")]
    store.touch([session_id, "unknown"], NOW + 29.0)
    assert await store.due(NOW + 58) == []
    assert await store.due(NOW + 59) == [(session_id, "idle")]
    store.touch([session_id], NOW + 50.0)
    assert await store.due(NOW + 59) == []
    assert await store.due(NOW + 60) == [(session_id, "expired")]
    assert await store.replace(Entry(one.principal, renewed(one).record, "", NOW + 50.0), 1)
    assert await store.due(NOW + 79) == []
    assert await store.due(NOW + 80) == [(session_id, "idle")]


async def test_an_earlier_use_does_not_undo_a_later_one(store: SessionStore) -> None:
    """Word of use may come late, and never shortens what is left."""
    one = entry()
    await store.open(one)
    for used_at in (NOW + 20.0, NOW + 5.0):
        store.touch([one.record.session_id], used_at)
        assert await store.due(NOW + 49) == []


async def test_what_was_used_since_is_not_closed(store: SessionStore) -> None:
    """Between the look at what is due and the closing a session may have been used."""
    one = entry()
    session_id = one.record.session_id
    await store.open(one)
    assert await store.close(session_id, "idle", due_at=NOW + 29) is None
    closed = await store.close(session_id, "idle", due_at=NOW + 30)
    assert closed is not None
    assert facts(closed) == facts(one)


async def test_goes_on_with_what_was_adopted(store: SessionStore) -> None:
    """What a control process before this one knew is among what workers may hold."""
    one = entry()
    store.adopt(one)
    assert store.held() == [one]
    assert store.recall(one.record.session_id) == one
    assert store.recall("unknown") is None


# --- the two together ---

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.integers(0, 7), st.integers(1, 90)),
        st.tuples(st.just("close"), st.integers(0, 7), st.none()),
        st.tuples(st.just("close if due"), st.integers(0, 7), st.integers(0, 200)),
        st.tuples(st.just("replace"), st.integers(0, 7), st.integers(1, 3)),
        st.tuples(st.just("touch"), st.integers(0, 7), st.integers(0, 200)),
        st.tuples(st.just("due"), st.integers(0, 200), st.none()),
        st.tuples(st.just("find"), st.integers(0, 7), st.none()),
        st.tuples(st.just("owned by"), st.integers(0, 2), st.none()),
    ),
    max_size=25,
)


async def perform(store: SessionStore, what: str, number: int, value: int | None) -> object:
    """Do one thing; return what can be compared of the answer."""
    session = entry(number, f"user{number % 3}", lives=value or 1, idle=20 + number)
    session_id = session.record.session_id
    match what:
        case "open":
            if await store.find(session_id):
                return None  # ids are drawn at random: the same one never opens twice
            try:
                await store.open(session)
            except Refused as refused:
                return refused.code
        case "close" | "close if due":
            due_at = None if value is None else NOW + value
            closed = await store.close(session_id, "closed", due_at=due_at)
            return closed and facts(closed)
        case "replace":
            found = await store.find(session_id)
            return found and await store.replace(renewed(found, 50 * (value or 1)), value or 1)
        case "touch":
            store.touch([session_id], float(NOW + (value or 0)))
        case "due":
            return sorted(await store.due(NOW + number))
        case "find":
            found = plain(await store.find(session_id))
            return found and found.record
        case _:
            owned = await store.owned_by(entry(0, f"user{number}").principal)
            return sorted(each.record.session_id for each in owned)
    return None


@given(operations=OPERATIONS)
@settings(max_examples=60)
def test_both_do_the_same(
    redis: RedisServer, operations: list[tuple[str, int, int | None]]
) -> None:
    """Whatever is asked in whatever order, Redis answers as a few lines of Python do."""

    async def run() -> None:
        model = MemoryStore(LIMITS)
        store = redis_store(redis, f"n{next(_namespaces)}")
        try:
            for operation in operations:
                expected = await perform(model, *operation)
                assert await perform(store, *operation) == expected, operation
        finally:
            await store.aclose()

    asyncio.run(run())


async def test_redis_forgets_what_nobody_closes(redis: RedisServer) -> None:
    """Where every replica is gone for good, records go some minutes after their sessions' time."""
    store = redis_store(redis, f"n{next(_namespaces)}")
    one = entry()
    await store.open(one)
    await store.open(entry(2, lives=10))
    await store.aclose()
    prefix = f"{{veklom:{store._config.namespace}}}:"
    until = redis.ask("PEXPIRETIME", f"{prefix}session:{one.record.session_id}")
    assert until == (one.record.expires_at + KEPT_SECONDS) * 1000
    (owner,) = redis.ask("KEYS", f"{prefix.replace('{', '[{]')}owner:*")
    assert redis.ask("PEXPIRETIME", owner) == until


async def test_an_end_whose_answer_got_lost_is_told_again(redis: RedisServer) -> None:
    """Redis may do what nobody hears the answer of: the replica that asked is told when it asks again."""
    store, other = (redis_store(redis, "lost", timeout="50ms") for _ in range(2))
    one = entry()
    session_id = one.record.session_id
    await store.open(one)
    assert await other.close("unknown", "closed") is None  # from now on Redis knows the script
    with redis.stopped(), pytest.raises(StoreUnavailable):
        await store.close(session_id, "closed")
    (owed,) = store.owed()
    assert (owed.session_id, owed.reason, owed.due_at) == (session_id, "closed", None)
    assert await other.close(session_id, "closed") is None
    ended = await store.close(owed.session_id, owed.reason)
    assert ended is not None
    assert facts(ended) == facts(one)
    assert store.owed() == []
    assert await store.close(session_id, "closed") is None
    await store.aclose()
    await other.aclose()
