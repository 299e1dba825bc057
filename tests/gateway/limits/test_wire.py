"""The connection to the store of limits: in time, in order, and never twice."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme

from gateway.clock import SystemClock
from gateway.limits.breaker import FAILURES, PROBE_SECONDS, Breaker
from gateway.limits.redis_store import ADMIT, SCRIPTS
from gateway.limits.wire import MAX_WAITING, Away, Endpoint, Wire
from gateway.tls import client_context
from tests.simulators.gateway import free_port
from tests.simulators.redis import MEMORY_ONLY, RedisServer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the tests of this file."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@asynccontextmanager
async def wire(
    port: int, *, timeout_seconds: float = 5.0, states: list[bool] | None = None, **fields: Any
) -> AsyncIterator[Wire]:
    """A connection that closes with the block; `states` hears whether the store is there."""
    heard = [] if states is None else states
    made = Wire(
        Endpoint(host="127.0.0.1", port=port, **fields),
        scripts=SCRIPTS,
        timeout_seconds=timeout_seconds,
        clock=SystemClock(),
        on_state=lambda is_there, _reason: heard.append(is_there),
    )
    yield made
    await made.close()


async def ask(wire: Wire, name: str = "k", call_id: str = "c") -> Any:
    """Take one of a hundred units under a key of this name; return the answer."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    keys = [f"{{w}}ended:{call_id}", f"{{w}}{name}"]
    wire.ask(ADMIT, keys, [call_id, b"rate", 1, "864000000.0", 100, 0, 0], answer.set_result)
    return await answer


async def test_what_is_asked_at_once_is_answered_in_order(server: RedisServer) -> None:
    """A thousand questions on one connection each get their own answer."""
    async with wire(server.port) as one:
        answers = await asyncio.gather(*(ask(one, f"order-{n % 10}") for n in range(1000)))
        assert all(answer[:2] == [0, 1] for answer in answers[:10])
        assert [answer[0] for answer in answers] == [0] * 1000
        figures = [answer[2] for answer in answers[::10]]
        assert figures == sorted(figures)
        assert server.ask("CLIENT", "LIST").count(b"\n") <= 2


async def test_a_script_that_was_forgotten_is_taught_again(server: RedisServer) -> None:
    """A store that lost its scripts is asked once more, and the call counts once."""
    async with wire(server.port) as one:
        await ask(one, "flush")
        server.ask("SCRIPT", "FLUSH")
        assert (await ask(one, "flush"))[2] == pytest.approx(2 * 864_000_000, rel=0.01)


async def test_nobody_waits_longer_than_the_timeout(tmp_path: Path) -> None:
    """A store that hangs costs each call the timeout, then nothing, until a probe finds it again."""
    states: list[bool] = []
    with RedisServer(tmp_path / "redis") as server:
        async with wire(server.port, timeout_seconds=0.1, states=states) as one:
            await ask(one)
            with server.stopped():
                for _ in range(FAILURES):
                    began = time.monotonic()
                    assert (await ask(one)).was_asked
                    assert time.monotonic() - began < 2
                assert states == [False]
                refused = await ask(one)
                assert (refused.reason, refused.was_asked) == ("open", False)
            async with asyncio.timeout(10):
                while isinstance(await ask(one), Away):  # noqa: ASYNC110 - no event tells it
                    await asyncio.sleep(0.05)  # until the next probe
            assert states == [False, True]


async def test_nobody_listens() -> None:
    """Without a store every question is answered, and was never asked."""
    async with wire(1, timeout_seconds=1.0) as one:
        answers = await asyncio.gather(*(ask(one) for _ in range(50)))
        assert {(type(each), each.was_asked) for each in answers} == {(Away, False)}


async def test_what_waits_is_bounded(server: RedisServer) -> None:
    """Beyond so many questions without an answer nobody is made to wait."""
    async with wire(server.port) as one:
        answers = await asyncio.gather(*(ask(one, "many") for _ in range(MAX_WAITING + 10)))
        assert sum(isinstance(each, Away) for each in answers) == 10


async def test_a_call_that_has_ended_is_not_admitted_after_all(server: RedisServer) -> None:
    """A question that comes after its call was settled takes nothing."""
    server.ask("SET", "{w}ended:late", "1")
    async with wire(server.port) as one:
        assert await ask(one, "late", "late") == [-1]
        assert server.ask("EXISTS", "{w}late") == 0


async def test_an_acl_user_over_tls(tmp_path: Path) -> None:
    """The store may ask for a user, a password and TLS; the password is read at every connection."""
    authority = trustme.CA()
    settings = MEMORY_ONLY | {"requirepass": "open-sesame"}
    with RedisServer(tmp_path / "redis", settings=settings, tls=authority) as server:
        tls = client_context(str(tmp_path / "redis" / "ca.pem"))
        async with wire(server.port, tls=tls, password=lambda: "open-sesame", database=1) as one:
            assert (await ask(one))[0] == 0
        async with wire(server.port, tls=tls, password=lambda: "wrong") as one:
            answer = await ask(one)
            assert (answer.reason, answer.was_asked) == ("WRONGPASS", True)
            assert "wrong" not in repr(answer)
        async with wire(server.port, tls=client_context(""), password=lambda: "x") as one:
            assert (await ask(one)).reason == "SSLCertVerificationError"


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[RedisServer]]:
    """A Redis Cluster of two, each with half of the slots."""
    common = MEMORY_ONLY | {"cluster-enabled": "yes", "cluster-require-full-coverage": "no"}
    # Without a port of its own the bus of a node takes one that another test may have.
    buses = [str(free_port()) for _ in range(2)]
    with (
        RedisServer(tmp_path / "one", settings=common | {"cluster-port": buses[0]}) as one,
        RedisServer(tmp_path / "two", settings=common | {"cluster-port": buses[1]}) as two,
    ):
        one.ask("CLUSTER", "ADDSLOTSRANGE", "0", "8191")
        two.ask("CLUSTER", "ADDSLOTSRANGE", "8192", "16383")
        one.ask("CLUSTER", "MEET", "127.0.0.1", str(two.port), buses[1])
        yield [one, two]


async def test_a_cluster_tells_where_the_keys_are(cluster: list[RedisServer]) -> None:
    """Whichever node is named, the limits are counted by the one that has their slot."""

    def counted() -> list[int]:
        return [node.ask("DBSIZE") for node in cluster]

    for node in cluster:
        async with wire(node.port) as one, asyncio.timeout(30):
            while isinstance(await ask(one), Away):  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(0.1)  # the nodes have to meet, and a probe has to come
    assert sorted(counted()) == [0, 1]


def test_a_breaker_opens_and_lets_probes_pass() -> None:
    """After failures in a row only one question a while passes, and one answer ends that."""
    breaker = Breaker()
    assert [breaker.failed(10.0) for _ in range(FAILURES + 1)] == [False, False, True, False]
    steps: list[tuple[Callable[[], bool], bool]] = [
        (lambda: breaker.lets_pass(10.0), False),
        (lambda: breaker.lets_pass(10.0 + PROBE_SECONDS), True),
        (lambda: breaker.lets_pass(10.1 + PROBE_SECONDS), False),
        (breaker.succeeded, True),
        (lambda: breaker.lets_pass(10.1 + PROBE_SECONDS), True),
        (breaker.succeeded, False),
        (lambda: breaker.failed(20.0), False),
        (breaker.succeeded, False),
        (lambda: breaker.failed(20.0), False),
        (lambda: breaker.failed(20.0), False),
    ]
    for step, expected in steps:
        assert step() is expected
