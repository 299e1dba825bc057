"""What an operator stops on one replica is stopped on all, and stays so until it is lifted on any."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import KEY
from tests.e2e.test_fleet import STREAM, closings, endless, two_replicas, until, until_status
from tests.simulators.fleet import Replica, start_replica
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider
from tests.simulators.redis import RedisServer
from tests.simulators.wire import request

Start = Callable[..., Gateway]
TENANT = {"scope": "tenant", "value": "acme", "reason": "an incident"}
OPENING = {"keys": {"openai": KEY}}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


async def kills_of(replica: Replica) -> list[str]:
    """Return the kills that stand on a replica."""
    status, answer = await replica.operate("GET", "/admin/v1/kills")
    assert status == 200
    return [kill["kill_id"] for kill in answer["kills"]]


async def until_kills(replica: Replica, kills: list[str]) -> None:
    """Return when these stand on a replica, and no others."""

    async def hold() -> bool:
        return await kills_of(replica) == kills

    await until(hold)


async def test_a_kill_holds_on_every_replica(
    provider: Provider, start_gateway: Start, redis: RedisServer
) -> None:
    """Streams on the other replica are cut, sessions nobody holds end too, newcomers know of it."""
    provider.script = endless
    a, b = await two_replicas(start_gateway, provider, redis)
    token, _ = await b.open(KEY)
    unused, _ = await b.open(KEY)
    reader, writer = await asyncio.open_connection("127.0.0.1", b.gateway.proxy)
    writer.write(request(token, STREAM, closes=False))
    await reader.readuntil(b"data: ")
    status, placed = await a.operate("POST", "/admin/v1/kill", TENANT)
    assert (status, placed["closed_sessions"], placed["cut_calls"]) == (201, 2, 0)
    assert b'"code":"killed"' in await asyncio.wait_for(reader.read(), 5)
    writer.close()
    await until_kills(b, [placed["kill_id"]])
    newcomer = await start_replica(start_gateway, provider, redis)
    for each in (a, b, newcomer):
        status, problem = await each.ask("POST", body=OPENING)
        assert (status, problem["code"]) == (403, "killed")
        assert [await each.status(old) for old in (token, unused)] == [401, 401]
    assert sorted(closings(a, b, newcomer)) == ["killed", "killed"]
    # It outlives the store's memory: whoever knows of it says so again.
    redis.kill()
    redis.start()
    await asyncio.gather(
        *(
            asyncio.to_thread(each.gateway.wait_for_log, "store.connected", 2)
            for each in (a, b, newcomer)
        )
    )
    latest = await start_replica(start_gateway, provider, redis)
    assert await kills_of(latest) == [placed["kill_id"]]
    for each in (a, b, newcomer, latest):
        assert (await each.ask("POST", body=OPENING))[0] == 403
    lifting = f"/admin/v1/kills/{placed['kill_id']}", {"reason": "it is over"}
    assert (await b.operate("DELETE", *lifting))[0] == 200
    for each in (a, newcomer, latest):
        await until_kills(each, [])
    fresh, _ = await newcomer.open(KEY)
    await until_status(a, fresh, 200)
    for each in (a, b, newcomer, latest):

        async def is_kept(folder: Path = each.gateway.folder) -> bool:
            return (folder / "state" / "kills.json").read_text().split() == ["[]"]

        await until(is_kept)


async def test_a_kill_that_the_store_does_not_hear_stands_here(
    provider: Provider, start_gateway: Start, redis: RedisServer
) -> None:
    """With the store silent a kill takes effect where it is placed, and everywhere when it answers."""
    a, b = await two_replicas(start_gateway, provider, redis)
    token, _ = await b.open(KEY)
    assert await a.status(token) == 200
    with redis.stopped():
        status, problem = await a.operate("POST", "/admin/v1/kill", TENANT)
        assert (status, problem["code"]) == (503, "store_unavailable")
        (kill_id,) = await kills_of(a)
        assert await a.status(token) != 200
        assert await kills_of(b) == []
    await until_kills(b, [kill_id])
    for each in (a, b):
        await until_status(each, token, 401)

    async def is_closed() -> bool:
        return "killed" in closings(a, b)

    await until(is_closed)
