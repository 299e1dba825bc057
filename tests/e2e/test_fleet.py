"""Replicas that share a Redis: what one is told holds on all, and without the store nothing is served."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import KEY
from tests.simulators.fleet import Replica, start_replica
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.redis import RedisServer
from tests.simulators.wire import request

Start = Callable[..., Gateway]
STREAM = b'{"model":"m","stream":true}'


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


async def two_replicas(
    start: Start, provider: Provider, redis: RedisServer, **options: object
) -> tuple[Replica, Replica]:
    """Start two gateways on one Redis."""
    one, other = [await start_replica(start, provider, redis, **options) for _ in range(2)]
    return one, other


async def until(holds: Callable[[], Awaitable[bool]], seconds: float = 20) -> None:
    """Return when something that other processes bring about holds."""
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.02)  # polling other processes


async def until_status(replica: Replica, token: str, status: int, seconds: float = 20) -> None:
    """Return when calls are answered so."""

    async def holds() -> bool:
        return await replica.status(token) == status

    await until(holds, seconds)


async def endless(it: Exchange) -> None:
    """Begin a stream where one is asked for, and say no more; answer everything else."""
    if b"stream" not in it.request.body:
        await it.reply(b'{"ok":true}')
        return
    await it.begin_stream()
    await it.chunk(b'data: {"choices":[]}\n\n')
    await it.wait_until_left()


def closings(*replicas: Replica) -> list[str]:
    """Return why sessions ended, as all the replicas recorded it."""
    return [
        event["reason"]
        for replica in replicas
        for event in replica.gateway.events("session.closed")
    ]


async def test_what_one_replica_is_told_holds_on_the_other(
    provider: Provider, start_gateway: Start, redis: RedisServer
) -> None:
    """A session is opened, renewed and closed on one; the other serves, refuses and cuts accordingly."""
    provider.script = endless
    a, b = await two_replicas(start_gateway, provider, redis)
    token, path = await a.open(KEY, label="laptop")
    assert await b.status(token) == 200
    assert (b"authorization", f"Bearer {KEY}".encode()) in provider.received[-1].headers
    status, listed = await b.ask("GET")
    assert (status, [each["label"] for each in listed["sessions"]]) == (200, ["laptop"])
    assert (await b.ask("GET", path, who="mallory"))[0] == 404
    # A renewal on either is the other's, too.
    status, renewed = await a.ask("POST", f"{path}/renew", {}, session=token)
    assert (status, renewed["generation"]) == (200, 2)
    assert await b.status(renewed["token"]) == 200
    assert [await each.status(token) for each in (a, b)] == [401, 401]
    status, again = await b.ask("POST", f"{path}/renew", {}, session=renewed["token"])
    assert (status, again["generation"]) == (200, 3)
    assert await a.status(again["token"]) == 200
    assert (await a.ask("POST", f"{path}/renew", {}, session=token))[0] == 403
    # So is the end.
    reader, writer = await asyncio.open_connection("127.0.0.1", b.gateway.proxy)
    writer.write(request(again["token"], STREAM, closes=False))
    await reader.readuntil(b"data: ")
    status, closed = await a.ask("DELETE", path)
    assert (status, closed["session_id"], closed["cut_calls"]) == (200, path[-32:], 0)
    assert b"session_closed" in await asyncio.wait_for(reader.read(), 1)
    writer.close()
    await until_status(b, again["token"], 401, 1)
    assert await a.status(again["token"]) == 401
    assert (await b.ask("DELETE", path))[0] == 404
    assert closings(a, b) == ["closed"]


async def test_idle_sessions_end_once_wherever_they_were_used(
    provider: Provider, start_gateway: Start, redis: RedisServer
) -> None:
    """Use on either replica keeps a session; when all are done with it, one records its end."""
    a, b = await two_replicas(start_gateway, provider, redis)
    token, path = await a.open(KEY, idle_seconds=3)
    begun = time.monotonic()
    while time.monotonic() < begun + 6:
        assert await b.status(token) == 200
        await asyncio.sleep(0.2)  # use, every now and then, for twice as long as it may be idle

    async def is_gone() -> bool:
        return (await a.ask("GET", path))[0] == 404

    await until(is_gone)
    await until_status(b, token, 401)
    assert closings(a, b) == ["idle"]


async def test_caps_hold_across_replicas(
    provider: Provider, start_gateway: Start, redis: RedisServer
) -> None:
    """Many who open at once on both get no more than one gateway would give."""
    extra = {"sessions": {"per_subject": 4}}
    replicas = await two_replicas(start_gateway, provider, redis, extra=extra)
    body = {"keys": {"openai": KEY}}
    asking = [replica.ask("POST", body=body) for replica in replicas * 8]
    statuses = [status for status, _ in await asyncio.gather(*asking)]
    assert sorted(statuses) == [201] * 4 + [429] * 12


async def test_a_silent_store_ends_service_and_not_sessions(
    provider: Provider, start_gateway: Start, redis: RedisServer
) -> None:
    """Calls go on for the staleness, then 503; what was closed meanwhile does not come back."""
    a, b = await two_replicas(start_gateway, provider, redis)
    kept, _ = await a.open(KEY)
    closed, path = await a.open(KEY)
    for token in (kept, closed):
        assert [await each.status(token) for each in (a, b)] == [200, 200]
    with redis.stopped():
        stopped_at = time.monotonic()
        assert [await each.status(kept) for each in (a, b)] == [200, 200]
        # Closing destroys here at once, and says that it is not done.
        status, problem = await a.ask("DELETE", path)
        assert (status, problem["code"]) == (503, "store_unavailable")
        assert await a.status(closed) != 200
        assert (await a.ask("POST", body={"keys": {"openai": KEY}}))[0] == 503
        for each in (a, b):
            await until_status(each, kept, 503)
            assert time.monotonic() - stopped_at < 6
            assert not (await each.checks())["store"]
        assert b"control_unavailable" in (await b.call(kept)).body
    for each in (a, b):
        await until_status(each, kept, 200)
        assert await each.status(closed) == 401
        assert (await each.checks())["store"]
    # What was sent to the silent store may have been done when it woke up: nobody was given a token.
    assert closings(a, b).count("closed") == 1
    assert set(closings(a, b)) <= {"closed", "not_opened"}
    for each in (a, b):
        assert len(each.gateway.events("store.lost")) == 1
        connected = each.gateway.events("store.connected")
        assert [event["has_forgotten"] for event in connected] == [False, False]
        assert {event["persistence"] for event in connected} == {"off"}
        assert "veklom_store_up 1.0" in await asyncio.to_thread(each.gateway.metrics)


async def test_a_store_that_began_anew_has_no_sessions(
    provider: Provider, start_gateway: Start, redis: RedisServer
) -> None:
    """When Redis comes back empty what was open is over, everywhere, and new sessions open."""
    a, b = await two_replicas(start_gateway, provider, redis)
    token, path = await a.open(KEY)
    assert await b.status(token) == 200
    redis.kill()
    assert await b.status(token) == 200
    redis.start()
    for each in (a, b):
        await until_status(each, token, 401)
        assert (await each.ask("GET", path))[0] == 404
    fresh, _ = await b.open(KEY)
    assert [await each.status(fresh) for each in (a, b)] == [200, 200]
    for each in (a, b):
        forgotten = [
            event for event in each.gateway.events("store.connected") if event["has_forgotten"]
        ]
        assert [event["gone"] for event in forgotten] == [1]


async def test_sessions_outlive_processes_and_gateways(
    provider: Provider, start_gateway: Start, redis: RedisServer
) -> None:
    """A control process, and a whole gateway, may end: sessions go on, and closed ones stay closed."""
    a, b = await two_replicas(start_gateway, provider, redis, verifies_log=False)
    kept, _ = await a.open(KEY)
    closed, path = await a.open(KEY)
    for token in (kept, closed):
        assert [await each.status(token) for each in (a, b)] == [200, 200]
    control = b.gateway.pids("control")[0]
    os.kill(control, signal.SIGSTOP)
    assert (await a.ask("DELETE", path))[0] == 200
    os.kill(control, signal.SIGKILL)
    await until_status(b, closed, 401)
    await until_status(b, kept, 200)
    assert await asyncio.to_thread(a.gateway.stop) == 0
    assert closings(a, b) == ["closed"]
    assert await b.status(kept) == 200
    newcomer = await start_replica(start_gateway, provider, redis)
    assert await newcomer.status(kept) == 200
    assert await newcomer.status(closed) == 401


async def test_a_hung_control_process_ends_service(
    provider: Provider, start_gateway: Start, redis: RedisServer
) -> None:
    """Workers whose control cannot tell them what was closed serve no longer than the staleness."""
    replica = await start_replica(start_gateway, provider, redis)
    token, _ = await replica.open(KEY)
    control = replica.gateway.pids("control")[0]
    os.kill(control, signal.SIGSTOP)
    try:
        await until_status(replica, token, 503, 5)
    finally:
        os.kill(control, signal.SIGCONT)
    await until_status(replica, token, 200)


async def test_what_no_replica_left_there_is_not_served(
    provider: Provider, start_gateway: Start, redis: RedisServer
) -> None:
    """A record that was altered in Redis, or put under another id, is as good as none, and is counted."""
    a, b = await two_replicas(start_gateway, provider, redis)
    altered, moved = [(await a.open(KEY))[1][-32:] for _ in range(2)]
    token, path = await a.open(KEY)
    prefix = "{veklom:veklom}:session:"
    record = redis.ask("HGET", prefix + altered, "record")
    redis.ask("HSET", prefix + altered, "record", record.replace(b"alice", b"mallo"))
    redis.ask("HSET", prefix + path[-32:], "record", redis.ask("HGET", prefix + moved, "record"))
    assert await b.status(token) == 401
    assert (await b.ask("GET", f"/v1/sessions/{altered}"))[0] == 404
    assert "veklom_store_forged_total 2.0" in await asyncio.to_thread(b.gateway.metrics)
    assert "store.forged" in b.gateway.log.read_text()
