"""A replica's side of the shared store: what ended stays so, and nothing that was said is missed."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Self

import pytest

from gateway.audit.event import Event as AuditEvent
from gateway.audit.event import StoreConnected
from gateway.config import Sessions, Store, parse_config
from gateway.fleet import FleetMember
from gateway.relay import Ack, DropSession, Lease, Link, Message, PutSession, SessionAbsent
from gateway.store.redis_store import EVENTS_AT_ONCE, Owed, RedisStore
from gateway.store.sessions import Entry, StoreUnavailable
from gateway.tasks import end_tasks
from gateway.workers import Workers
from keys.session import SessionRecord
from keys.wrapping import Wrapping
from policies.request import Principal
from tests.simulators.redis import RedisServer

LIMITS = Sessions(default_ttl=60, max_ttl=600, idle=60, overlap=9, per_subject=99, total=999)
ALICE = Principal(issuer="i", subject="alice", tenant="acme")
_numbers = count(1)


class Clock:
    """The machine's time."""

    now = staticmethod(time.time)
    monotonic = staticmethod(time.monotonic)


class GatedStore(RedisStore):
    """A store whose answers to `find` are held back until the test opens the gate."""

    def __init__(self, store: Store) -> None:
        super().__init__(
            store,
            LIMITS,
            deployment="test",
            deployment_key=b"k" * 32,
            wrapping=Wrapping(b"b" * 32),
            clock=Clock(),
        )
        self.has_read = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def find(self, session_id: str) -> Entry | None:
        """Read, and wait at the gate with what was read."""
        found = await super().find(session_id)
        self.has_read.set()
        await self.gate.wait()
        return found


def entry() -> Entry:
    """Return a session that begins now."""
    now = int(time.time())
    record = SessionRecord(
        session_id=f"{next(_numbers):032x}", tenant="acme", issuer="i", subject="alice",
        generation=1, revision=1, created_at=now, expires_at=now + 500, idle_seconds=400,
        credentials=(),
    )  # fmt: skip
    return Entry(ALICE, record, "", float(now))


class Replica:
    """A member of the fleet whose one worker writes down what it is told."""

    def __init__(self, redis: RedisServer, namespace: str, staleness: str = "60s") -> None:
        text = f"store: {{backend: redis, url: '{redis.url}', namespace: {namespace}, "
        store = parse_config(f"{text}staleness: {staleness}}}", "c.yaml", {}).store
        self.store = GatedStore(store)
        self.workers = Workers()
        self.told: list[Message] = []
        self.news = asyncio.Event()
        self.events: list[AuditEvent] = []
        self.kills: list[tuple[str, bytes | None]] = []
        self.member = FleetMember(
            store=self.store,
            workers=self.workers,
            record=self.record,
            close=self.close,
            kills={},
            on_kill=lambda kill_id, data: self.kills.append((kill_id, data)),
            end_killed=self.end_killed,
            persistence_reason="",
            staleness_seconds=store.staleness,
            clock=Clock(),
        )

    async def record(self, event: AuditEvent) -> None:
        """Keep an event, as the journal would."""
        self.events.append(event)

    async def close(self, owed: Owed) -> None:
        """Tell the store once more, as the ledger would."""
        await self.store.close(owed.session_id, owed.reason, due_at=owed.due_at)

    async def end_killed(self, _data: bytes) -> None:
        """Close nothing: what a kill hits is the ledger's to know."""

    async def __aenter__(self) -> Self:
        """Connect the worker, and meet the store."""
        near, far = socket.socketpair()
        self.near = await Link.open(near, self._on_answer, self.workers.lose)
        self.far = await Link.open(far, self._on_word, lambda _link: None)
        self.workers.add(self.near)
        await self.member.start()
        self.following = asyncio.get_running_loop().create_task(self.member.follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        """End both."""
        await end_tasks([self.following])
        await self.member.aclose()
        self.near.close()
        self.far.close()

    def _on_answer(self, link: Link, message: Message) -> None:
        assert isinstance(message, Ack)
        self.workers.on_answer(link, message.n, message)

    def _on_word(self, link: Link, message: Message) -> None:
        self.told.append(message)
        if isinstance(message, PutSession | DropSession) and message.n:
            link.send(Ack(n=message.n))
        self.news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return when what the worker was told satisfies the test."""
        async with asyncio.timeout(10):
            while not holds():
                await self.news.wait()
                self.news.clear()

    def words(self, session_id: str) -> list[str]:
        """Return what the worker was told of a session, in order."""
        return [
            type(message).__name__
            if not isinstance(message, PutSession)
            else f"revision {message.record.revision}"
            for message in self.told
            if (
                message.record.session_id
                if isinstance(message, PutSession)
                else getattr(message, "session_id", "")
            )
            == session_id
        ]


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the module."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def pair(redis: RedisServer) -> AsyncIterator[tuple[Replica, Replica]]:
    """Two replicas in a namespace of their own, with listening rounds far longer than a test."""
    namespace = f"n{next(_numbers)}"
    async with Replica(redis, namespace) as one, Replica(redis, namespace) as other:
        yield one, other


async def test_an_answer_on_its_way_brings_no_session_back(pair: tuple[Replica, Replica]) -> None:
    """A session that ends while it is being read is read again, and found to be gone."""
    here, there = pair
    session = entry()
    session_id = session.record.session_id
    await there.store.open(session)
    here.store.gate.clear()
    here.member.need(session_id)
    here.member.need(session_id)  # one answer serves both
    await here.store.has_read.wait()
    heard = here.member._heard
    await there.store.close(session_id, "closed")
    async with asyncio.timeout(10):
        while here.member._heard == heard:  # noqa: ASYNC110 - it comes over a socket
            await asyncio.sleep(0)  # polling what only the event changes
    here.store.gate.set()
    await here.until(lambda: bool(here.words(session_id)))
    assert here.words(session_id) == ["SessionAbsent"]
    assert here.store.recall(session_id) is None


async def test_an_answer_on_its_way_does_not_undo_a_change(pair: tuple[Replica, Replica]) -> None:
    """A session that changes while it is being read is served as it is then, and only so."""
    here, there = pair
    session = entry()
    session_id = session.record.session_id
    await there.store.open(session)
    here.store.gate.clear()
    here.member.need(session_id)
    await here.store.has_read.wait()
    changed = Entry(ALICE, replace(session.record, revision=2), "", session.used_at)
    heard = here.member._heard
    assert await there.store.replace(changed, 1)
    async with asyncio.timeout(10):
        while here.member._heard == heard:  # noqa: ASYNC110 - it comes over a socket
            await asyncio.sleep(0)  # polling what only the event changes
    here.store.gate.set()
    await here.until(lambda: bool(here.words(session_id)))
    assert here.words(session_id) == ["revision 2"]


async def test_passes_on_what_others_do(pair: tuple[Replica, Replica]) -> None:
    """What another replica changes or ends, workers hear of, if they may hold it; one's own they know."""
    here, there = pair
    session, unknown = entry(), entry()
    session_id = session.record.session_id
    for each in (session, unknown):
        await there.store.open(each)
    here.member.need(session_id)
    await here.until(lambda: here.words(session_id) == ["revision 1"])
    changed = Entry(ALICE, replace(session.record, revision=2), "", session.used_at)
    await there.store.replace(changed, 1)
    await here.until(lambda: here.words(session_id) == ["revision 1", "revision 2"])
    await there.store.close(unknown.record.session_id, "closed")
    await there.store.close(session_id, "closed")
    await here.until(lambda: here.words(session_id)[-1] == "DropSession")
    assert here.words(unknown.record.session_id) == []
    assert there.words(session_id) == []


async def test_what_does_not_exist_is_said_to_be_absent(pair: tuple[Replica, Replica]) -> None:
    """A worker that asked for nothing that is open hears that, and calls need not wait."""
    here, _ = pair
    here.member.need("unknown")
    await here.until(lambda: here.words("unknown") == ["SessionAbsent"])
    assert here.told[-1] == SessionAbsent(session_id="unknown", is_known=True)


@pytest.mark.parametrize("what", ["trimmed", "flushed"])
async def test_whoever_missed_something_compares_everything(redis: RedisServer, what: str) -> None:
    """Where the log of events is cut, or the whole store, sessions that ended are forgotten here."""
    namespace = f"n{next(_numbers)}"
    async with (
        Replica(redis, namespace, "1s") as here,
        Replica(redis, namespace, "1s") as there,
    ):
        ended, kept = entry(), entry()
        for each in (ended, kept):
            await there.store.open(each)
            here.member.need(each.record.session_id)
            await here.until(lambda each=each: bool(here.words(each.record.session_id)))  # type: ignore[misc]
        events = f"{{veklom:{namespace}}}:events"
        if what == "flushed":
            redis.ask("FLUSHALL")
        else:
            # Both at once, so that nobody can hear the one event between them.
            session = f"{{veklom:{namespace}}}:session:{ended.record.session_id}"
            script = (
                "redis.call('DEL', KEYS[1]) redis.call('XADD', KEYS[2], '0-*', 'event', 'x') "
                "redis.call('XADD', KEYS[2], '0-*', 'event', 'x') "
                "redis.call('XTRIM', KEYS[2], 'MAXLEN', 1)"
            )
            redis.ask("EVAL", script, "2", session, events)
        await here.until(lambda: here.words(ended.record.session_id)[-1] == "DropSession")
        is_gone = here.words(kept.record.session_id)[-1] == "DropSession"
        assert is_gone == (what == "flushed")
        # And what is said from now on is heard again.
        fresh = entry()
        await there.store.open(fresh)
        here.member.need(fresh.record.session_id)
        await here.until(lambda: here.words(fresh.record.session_id) == ["revision 1"])
        await there.store.close(fresh.record.session_id, "closed")
        await here.until(lambda: here.words(fresh.record.session_id)[-1] == "DropSession")
    met = [event for event in here.events if isinstance(event, StoreConnected)]
    assert met[-1].has_forgotten == (what == "flushed")


async def test_everything_is_heard_in_order(pair: tuple[Replica, Replica]) -> None:
    """However much is said at once, each replica hears all of it, and in the one order."""
    here, there = pair
    said = EVENTS_AT_ONCE + 200
    for number in range(said // 2):
        await there.store.place_kill(f"kill {number}", b"data")
        await there.store.lift_kill(f"kill {number}")
    async with asyncio.timeout(20):
        while len(here.kills) < said:  # noqa: ASYNC110 - they come over a socket
            await asyncio.sleep(0.01)  # polling what only the events change
    expected: list[tuple[str, bytes | None]] = []
    for number in range(said // 2):
        expected += [(f"kill {number}", b"data"), (f"kill {number}", None)]
    assert here.kills == expected


async def test_standing_kills_are_learnt(redis: RedisServer) -> None:
    """A replica that comes later knows what stands before it serves, and what does not any more."""
    namespace = f"n{next(_numbers)}"
    async with Replica(redis, namespace) as early:
        await early.store.place_kill("stands", b"data")
        await early.store.place_kill("lifted", b"data")
        assert await early.store.lift_kill("lifted")
        assert not await early.store.lift_kill("lifted")
        late = Replica(redis, namespace)
        late.member._kills["lifted"] = b"data"  # as its own disk has it
        async with late:
            assert sorted(late.kills, key=str) == [("lifted", None), ("stands", b"data")]
            await late.until(lambda: isinstance(late.told[0], Lease) if late.told else False)


async def test_a_store_that_begins_to_write_is_left(
    redis: RedisServer, pair: tuple[Replica, Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its settings are looked at again and again: workers serve no session of it any more."""
    here, there = pair
    monkeypatch.setattr("gateway.fleet.LOOK_AGAIN_SECONDS", 0.0)
    redis.ask("CONFIG", "SET", "save", "3600 1000000")
    await there.store.place_kill("kill", b"data")  # something to hear: it looks when it has heard
    try:
        await here.until(lambda: any(isinstance(e, Lease) and not e.until for e in here.told))
    finally:
        redis.ask("CONFIG", "SET", "save", "")


async def test_absence_lifts_nothing(redis: RedisServer) -> None:
    """A kill that stands on a replica's disk and not in the store is told to all, not let go of."""
    namespace = f"n{next(_numbers)}"
    async with Replica(redis, namespace) as early:
        late = Replica(redis, namespace)
        late.member._kills["unheard"] = (
            b"data"  # placed while the store was silent, or removed there
        )
        async with late:
            await early.until(lambda: ("unheard", b"data") in early.kills)
            assert await early.store.known_kills() == {"unheard": b"data"}
            assert ("unheard", None) not in late.kills


async def test_a_full_store_opens_nothing_and_closes_all(
    redis: RedisServer, pair: tuple[Replica, Replica]
) -> None:
    """Where Redis has no memory left sessions and kills still end what they end, on every replica."""
    here, there = pair
    session = entry()
    session_id = session.record.session_id
    await there.store.open(session)
    here.member.need(session_id)
    await here.until(lambda: bool(here.words(session_id)))
    redis.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(StoreUnavailable):
            await there.store.open(entry())
        with pytest.raises(StoreUnavailable):
            await there.store.replace(Entry(ALICE, session.record, "", session.used_at), 1)
        there.store.touch([session_id], time.time())
        assert await there.store.due(time.time()) == []
        await there.store.place_kill("kill", b"data")
        assert await there.store.close(session_id, "closed") is not None
        await here.until(lambda: here.words(session_id)[-1] == "DropSession")
        assert here.kills == [("kill", b"data")]
        await here.store.meet()
    finally:
        redis.ask("CONFIG", "SET", "maxmemory", "0")
