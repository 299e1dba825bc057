"""Limits from outside: real workers, a real Redis, and what becomes of both."""

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from gateway.limits.estimates import estimate_tokens
from tests.conftest import KEY
from tests.simulators.fleet import Replica, start_replica
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.redis import RedisServer
from tests.simulators.threaded import threaded_provider
from tests.simulators.wire import Response, exchange, parse, request

Start = Callable[..., Gateway]

ALLOW = 'rules:\n  - {id: all, effect: allow, match: {tenant: "*"}}\nlimits:\n'
USAGE = b'{"usage":{"prompt_tokens":2,"completion_tokens":3}}'
BODY = b'{"model":"m","max_tokens":3,"messages":[]}'


def policy(*limits: str) -> str:
    """Return a policy that allows everybody, within these limits."""
    return ALLOW + "".join(f"  - {{{each}}}\n" for each in limits)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


async def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    """Return when something that other processes bring about holds."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.02)  # polling other processes


async def answer(it: Exchange) -> None:
    """Answer with a usage of five tokens."""
    await it.reply(USAGE)


async def call(replica: Replica, token: str) -> Response:
    """Make one call that asks for at most three tokens."""
    return parse(await exchange(replica.gateway.proxy, request(token, body=BODY)))


def account(redis: RedisServer, name: str) -> tuple[int, int]:
    """Return what a budget has spent and holds, in all of its keys."""
    spent = held = 0
    for key in redis.ask("KEYS", f"{{veklom:*}}:limit:{name}:*"):
        if redis.ask("TYPE", key) == b"hash":
            spent += int(redis.ask("HGET", key, "spent") or 0)
            held += int(redis.ask("HGET", key, "held") or 0)
    return spent, held


def metric(gateway: Gateway, name: str) -> float:
    """Return the value of one metric without labels."""
    lines = gateway.metrics().splitlines()
    return float(next(line for line in lines if line.startswith(f"veklom_{name} ")).split()[1])


async def test_a_budget_for_a_hundred_calls_pays_for_a_hundred(
    start_gateway: Start, provider: Provider, redis: RedisServer
) -> None:
    """Of six hundred racing calls over four workers exactly a hundred pass, each counted once."""
    cost = estimate_tokens(BODY) + 3

    async def answer_as_expected(it: Exchange) -> None:
        usage = {"prompt_tokens": cost - 3, "completion_tokens": 3}
        await it.reply(json.dumps({"usage": usage}).encode())

    provider.script = answer_as_expected
    budget = f"name: budget, key: tenant, budget: {{max: {100 * cost} tokens, per: month}}"
    replica = await start_replica(
        start_gateway, provider, redis, workers=4, policy=policy(budget),
        store={"limits_timeout": "5s"},
    )  # fmt: skip
    token, _ = await replica.open(KEY)
    gate = asyncio.Semaphore(64)

    async def one() -> int:
        async with gate:
            return (await call(replica, token)).status

    statuses = await asyncio.gather(*(one() for _ in range(600)))
    assert (statuses.count(200), statuses.count(429)) == (100, 500)
    await until(lambda: account(redis, "budget") == (100 * cost, 0))
    assert len(provider.received) == 100
    ends = replica.gateway.events("call.end")
    assert sum(end["usage"]["input"] + end["usage"]["output"] for end in ends) == 100 * cost


async def endless(it: Exchange) -> None:
    """Begin a stream and say no more."""
    await it.begin_stream()
    await it.chunk(b'data: {"choices":[]}\n\n')
    await it.wait_until_left()


async def test_what_killed_workers_held_frees_itself(
    start_gateway: Start, provider: Provider, redis: RedisServer
) -> None:
    """Leases of calls whose workers were killed end, and those of the others are renewed."""
    provider.script = endless
    places = "name: places, key: tenant, concurrent: {max: 8, lease: 10s}"
    replica = await start_replica(
        start_gateway, provider, redis, workers=2, policy=policy(places), verifies_log=False,
        store={"limits_timeout": "5s"},
    )  # fmt: skip
    token, _ = await replica.open(KEY)
    streams = [await asyncio.open_connection("127.0.0.1", replica.gateway.proxy) for _ in range(8)]
    for _, writer in streams:
        writer.write(request(token, body=b'{"model":"m","stream":true}', closes=False))
    for reader, _ in streams:
        await reader.readuntil(b'"choices"')
    assert (await call(replica, token)).status == 429
    loop = asyncio.get_running_loop()
    ends = [loop.create_task(reader.read()) for reader, _ in streams]
    whole: set[asyncio.Task[bytes]] = set()
    for victim in replica.gateway.pids("worker"):
        os.kill(victim, signal.SIGKILL)
        broken, whole = await asyncio.wait(ends, timeout=2, return_when=asyncio.FIRST_COMPLETED)
        if broken:
            break  # both workers serve the port: it may be that all streams were with the other
    provider.script = answer
    assert (await call(replica, token)).status == 429  # nobody has told the store yet
    async with asyncio.timeout(30):
        while (await call(replica, token)).status != 200:  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.2)  # the lease, and polling other processes
    (key,) = redis.ask("KEYS", "{veklom:*}:limit:places:*")
    assert redis.ask("ZCARD", key) <= len(whole)
    for (_, writer), end in zip(streams, ends, strict=True):
        writer.close()
        end.cancel()
    await asyncio.gather(*ends, return_exceptions=True)


LOST = (
    "name: strict, key: tenant, match: {model: strict}, budget: {max: 9000 tokens, per: month}",
    "name: shared, key: tenant, match: {model: shared}, requests: {rate: 4/d}",
    "name: open, key: tenant, match: {model: open}, budget: {max: 9000 tokens, per: month}, "
    "on_store_error: allow",
)


async def ask_for(replica: Replica, token: str, model: str) -> Response:
    """Make one call of a model."""
    body = json.dumps({"model": model, "max_tokens": 3, "messages": []}).encode()
    return parse(await exchange(replica.gateway.proxy, request(token, body=body)))


def _kill(redis: RedisServer) -> None:
    redis.kill()


def _pause(redis: RedisServer) -> None:
    os.kill(redis.process.pid, signal.SIGSTOP)


def _resume(redis: RedisServer) -> None:
    os.kill(redis.process.pid, signal.SIGCONT)


def _refuse_writes(redis: RedisServer) -> None:
    redis.ask("REPLICAOF", "127.0.0.1", "1")


def _take_writes(redis: RedisServer) -> None:
    redis.ask("REPLICAOF", "NO", "ONE")


TROUBLES: dict[str, tuple[Callable[[RedisServer], None], Callable[[RedisServer], None]]] = {
    "killed": (_kill, RedisServer.start),
    "paused": (_pause, _resume),
    "read-only": (_refuse_writes, _take_writes),
}


@pytest.mark.parametrize(("harm", "heal"), TROUBLES.values(), ids=TROUBLES)
async def test_each_limit_does_what_it_declares_while_the_store_is_away(
    start_gateway: Start, provider: Provider, redis: RedisServer, harm: Any, heal: Any
) -> None:
    """Deny, its share, or allow: declared, flagged in header, record and metric; then all is well."""
    provider.script = answer
    replica = await start_replica(
        start_gateway, provider, redis, policy=policy(*LOST),
        store={"staleness": "60s", "limits_timeout": "200ms", "replicas": 2},
    )  # fmt: skip
    token, _ = await replica.open(KEY)
    assert [(await ask_for(replica, token, m)).status for m in ("strict", "open")] == [200, 200]
    assert metric(replica.gateway, "limits_store_up") == 1
    harm(redis)
    strict = await ask_for(replica, token, "strict")
    assert (strict.status, strict.values(b"x-veklom-limit")) == (503, [b"strict"])
    assert strict.values(b"retry-after") == [b"1"]
    opened = await ask_for(replica, token, "open")
    assert (opened.status, opened.values(b"x-veklom-limits-degraded")) == (200, [b"open:allow"])
    shares = [await ask_for(replica, token, "shared") for _ in range(3)]
    assert [each.status for each in shares] == [200, 200, 429]
    assert shares[0].values(b"x-veklom-limits-degraded") == [b"shared:local"]
    await until(lambda: metric(replica.gateway, "limits_store_up") == 0)
    assert metric(replica.gateway, "limits_calls_degraded") >= 4
    assert replica.gateway.events("limits.store")[-1]["is_there"] is False
    assert ["open:allow"] in [event["limits"] for event in replica.gateway.events("call.start")]
    heal(redis)

    async def is_well() -> bool:
        fresh, _ = await replica.open(KEY)  # a Redis that was killed has forgotten the other
        return (await ask_for(replica, fresh, "strict")).status == 200

    async with asyncio.timeout(20):
        while not await is_well():  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.1)  # polling other processes
    # Once it is back it hears what was spent without it.
    await until(lambda: account(redis, "open")[0] >= 5)
    await until(lambda: metric(replica.gateway, "limits_calls_unsettled") == 0)
    assert metric(replica.gateway, "limits_settlements_lost") == 0
    assert replica.gateway.events("limits.store")[-1]["is_there"] is True


@pytest.mark.parametrize(
    ("rate", "denied"), [("1/s", 1), ("1/h", 1)], ids=["waits-and-passes", "stops-at-once"]
)
def test_sdks_wait_where_it_helps_and_stop_where_it_does_not(
    tmp_path: Path, rate: str, denied: int
) -> None:
    """With its usual retries an SDK passes after a short wait, and gives a long one up at once."""
    with threaded_provider(answer) as provider:
        root = f"http://127.0.0.1:{provider.port}"
        providers = {
            "openai": {"base_url": f"{root}/v1", "plain_http": True},
            "anthropic": {"base_url": root, "plain_http": True},
        }
        limits = policy(f"name: pace, key: [tenant, provider], requests: {{rate: {rate}}}")
        with Gateway(tmp_path / "gateway", providers, policy=limits) as gateway:
            keys = {"openai": KEY, "anthropic": KEY}
            token = gateway.open_session(keys)["token"]
            said: Any = [{"role": "user", "content": "hello"}]

            def ask_openai() -> None:
                with openai.OpenAI(base_url=gateway.url("openai/v1"), api_key=token) as client:
                    client.chat.completions.create(model="m", messages=said)

            def ask_anthropic() -> None:
                url = gateway.url("anthropic")
                with anthropic.Anthropic(base_url=url, api_key=token) as client:
                    client.messages.create(model="m", max_tokens=3, messages=said)

            asking = [
                (ask_openai, openai.RateLimitError),
                (ask_anthropic, anthropic.RateLimitError),
            ]
            for ask, error in asking:
                ask()
                with nullcontext() if rate == "1/s" else pytest.raises(error):
                    ask()
            assert len(gateway.events("call.denied")) == 2 * denied
