"""Time and memory: what drips in, stalls or leaves is ended by the clock, and for its own reason."""

import asyncio
import json
import re
import resource
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import exchange, parse, request

Start = Callable[..., Gateway]


@asynccontextmanager
async def served(
    provider: Provider, start_gateway: Start, **extra: Any
) -> AsyncIterator[tuple[Gateway, str]]:
    """A gateway with these limits, and the token of a session."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(start_gateway, {"openai": upstream}, extra=extra)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    yield gateway, str(session["token"])


async def drip(port: int, raw: bytes, rest: bytes) -> bytes:
    """Send `raw`, then bytes of `rest` one by one every tenth of a second until an answer comes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    answer = asyncio.ensure_future(reader.read(-1))
    for at in range(len(rest)):
        done, _ = await asyncio.wait({answer}, timeout=0.1)
        if done:
            break
        writer.write(rest[at : at + 1])
    writer.close()
    assert answer.done(), "the drip outlived its time"
    return answer.result()


async def test_a_head_that_drips_in_ends_in_time(provider: Provider, start_gateway: Start) -> None:
    """The time for a head runs from its first byte, however steadily the rest comes."""
    async with served(provider, start_gateway, timeouts={"head": "1s"}) as (gateway, _):
        answer = await drip(gateway.proxy, b"POST /openai/v1/x HTTP/1.1\r\nX: ", b"a" * 100)
        assert parse(answer).status == 408


async def test_a_call_whose_body_drips_in_ends_in_time(
    provider: Provider, start_gateway: Start
) -> None:
    """The time for a whole call includes that for its body."""
    async with served(provider, start_gateway, timeouts={"total": "1s"}) as (gateway, token):
        whole = request(token, b'{"model":"m","x":"%b"}' % (b"a" * 200))
        answer = await drip(gateway.proxy, whole[:-150], whole[-150:])
        assert parse(answer).status == 408
        assert provider.received == []


async def test_connections_over_the_limit_are_closed_at_once(
    provider: Provider, start_gateway: Start
) -> None:
    """One connection too many hears so and is closed, whatever it sends; the others are served."""
    async with served(provider, start_gateway, limits={"connections": 3}) as (gateway, token):
        held = [await asyncio.open_connection("127.0.0.1", gateway.proxy) for _ in range(3)]
        one, *others = held
        await serve_one(one, request(token, closes=False))
        for _ in range(5):
            answer = await exchange(gateway.proxy, b"G")
            assert parse(answer).status == 503
            assert b'"overloaded"' in answer
        for each in others:
            await serve_one(each, request(token, closes=False))
        for _, writer in held:
            writer.close()


async def serve_one(
    connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], raw: bytes
) -> None:
    """Have one call served on a connection that stays open."""
    reader, writer = connection
    writer.write(raw)
    assert b"200 OK" in await reader.readuntil(b'{"ok":true}')


async def _late_and_large(it: Exchange) -> None:
    await asyncio.sleep(2.5)  # the provider thinks for longer than a caller may stall
    await it.reply(b"x" * 20_000_000)


async def test_a_caller_that_pauses_late_is_not_cut(
    provider: Provider, start_gateway: Start
) -> None:
    """How long a caller has not read is timed from when it stopped reading, not from its request."""
    provider.script = _late_and_large
    async with served(provider, start_gateway, timeouts={"idle": "2s"}) as (gateway, token):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy, limit=1024)
        writer.write(request(token))
        head = await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(1.2)  # the sweep looks once a second: it has seen the pause
        body = await reader.read(-1)
        writer.close()
        assert b" 200 " in head
        assert len(body) == 20_000_000
        assert gateway.events("call.end")[-1]["outcome"] == "complete"


async def test_a_caller_that_does_not_read_is_cut_for_it(
    provider: Provider, start_gateway: Start
) -> None:
    """A caller that stops reading for too long is cut, and the record says that it was its fault."""

    async def large(it: Exchange) -> None:
        await it.reply(b"x" * 20_000_000)

    provider.script = large
    async with served(provider, start_gateway, timeouts={"idle": "1s"}) as (gateway, token):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy, limit=1024)
        writer.write(request(token))
        await reader.readuntil(b"\r\n\r\n")
        end = await recorded_end(gateway)
        writer.close()
        assert (end["outcome"], end["fault"]) == ("timeout", "downstream")


async def recorded_end(gateway: Gateway) -> dict[str, Any]:
    """Return the first call's end once it is on record."""
    async with asyncio.timeout(20):
        while not (ends := gateway.events("call.end")):  # noqa: ASYNC110 - another process writes it
            await asyncio.sleep(0.05)
    return ends[0]


async def test_a_caller_that_leaves_while_the_provider_is_slow_is_noticed(
    provider: Provider, start_gateway: Start
) -> None:
    """Though nothing is read from a caller under back-pressure, its leaving cancels the call."""
    provider.reads_body = False
    left = asyncio.Event()

    async def never_read(it: Exchange) -> None:
        await left.wait()

    provider.script = never_read
    async with served(provider, start_gateway) as (gateway, token):
        _, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
        head = request(token, b"", path=b"/openai/v1/files", headers=b"")
        content = b"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: %d\r\n"
        writer.write(head.replace(b"Content-Length: 0\r\n", content % 100_000_000))
        writer.write(b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n')
        with suppress(TimeoutError):
            async with asyncio.timeout(2):  # until no buffer on the way takes any more
                while True:
                    writer.write(b"x" * 1_000_000)
                    await writer.drain()
        # A reset: the end of an orderly close would wait behind bytes that nobody reads.
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        end = await recorded_end(gateway)
        left.set()
        assert (end["outcome"], end["fault"]) == ("client_abort", "downstream")


async def test_refused_heads_leave_the_connection_in_step(
    provider: Provider, start_gateway: Start
) -> None:
    """A refusal of a HEAD has no body: the next request on the connection gets its own answer."""
    async with served(provider, start_gateway) as (gateway, token):
        head = request(token, b"", path=b"/openai/nothing", method=b"HEAD", closes=False)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
        for _ in range(2):
            writer.write(head)
            refused = await reader.readuntil(b"\r\n\r\n")
            assert b" 404 " in refused
        writer.write(request(token))
        answer = await reader.read(-1)
        writer.close()
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_another_protocol_is_not_needed(provider: Provider, start_gateway: Start) -> None:
    """An offer of HTTP/2 in clear is passed over, with the body in any cutting, again and again."""
    async with served(provider, start_gateway) as (gateway, token):
        offer = (
            b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
        )
        whole = request(token, headers=offer, closes=False)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
        for cut in (0, 30, len(whole) - 60, len(whole) - 5):
            writer.write(whole[:cut])
            await writer.drain()
            writer.write(whole[cut:])
            assert b"200 OK" in await reader.readuntil(b'{"ok":true}')
        writer.close()
        bodies = {each.body for each in provider.received}
        assert bodies == {b'{"model":"gpt-5-mini","messages":[]}'}
        assert not any(each.values(b"upgrade") for each in provider.received)


async def test_small_chunks_cost_what_they_hold(provider: Provider, start_gateway: Start) -> None:
    """A body of a great many tiny chunks takes no more memory than its bytes and a little."""
    body = json.dumps({"model": "m", "x": "a" * 4_000_000}).encode()
    tiny = b"".join(b"2\r\n%b\r\n" % body[at : at + 2] for at in range(0, len(body) - 1, 2))
    if len(body) % 2:
        tiny += b"1\r\n%b\r\n" % body[-1:]
    async with served(provider, start_gateway) as (gateway, token):
        before = peak_of_worker(gateway)
        raw = request(token, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        answer = await exchange(gateway.proxy, raw + tiny + b"0\r\n\r\n")
        assert parse(answer).status == 200
        assert provider.received[0].body == body
        grown = peak_of_worker(gateway) - before
        assert grown < 10 * len(body) // resource.getpagesize() * resource.getpagesize()


def peak_of_worker(gateway: Gateway) -> int:
    """Return the peak resident size of the worker in bytes."""
    for pid in gateway.children():
        if b"gateway.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
            assert found
            return int(found[1]) * 1024
    raise AssertionError("no worker")
