"""Stopping and replacing under load: what an operator kills ends everywhere, and a key can be changed."""

import asyncio
import json
import os
import re
import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import Response, exchange, parse, request

Start = Callable[..., Gateway]
STREAM = b'{"model":"m","stream":true}'
STREAMS = 200
OTHER_KEY = "sk-another-" + "z" * 40


async def endless(it: Exchange) -> None:
    """Stream until the caller leaves; answer anything else at once."""
    if b"stream" not in it.request.body:
        await it.reply(b'{"ok":true}')
        return
    await it.begin_stream()
    await it.chunk(b'data: {"choices":[]}\n\n')
    await it.wait_until_left()


async def begin(start: Start, provider: Provider, **options: Any) -> Gateway:
    """Start a gateway whose two providers are the double."""
    provider.script = endless
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    providers = {"openai": upstream, "second": {**upstream, "dialect": "openai"}}
    return await asyncio.to_thread(start, providers, **options)


async def operator(gateway: Gateway) -> str:
    """Return an operator's token, with a second factor."""
    claims = {"roles": ["operator"], "amr": ["mfa"]}
    return await asyncio.to_thread(gateway.identity, "olga", "operations", **claims)


async def ask(
    port: int, method: str, path: str, identity: str, body: object = None, token: str = ""
) -> tuple[int, Any]:
    """Ask the control plane; return status and JSON."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {identity}\r\n"
    head += f"X-Veklom-Session: {token}\r\n" if token else ""
    head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    seen = parse(await exchange(port, head.encode() + content))
    return seen.status, json.loads(seen.body)


async def kill(gateway: Gateway, scope: str, value: str = "") -> dict[str, Any]:
    """Place a kill; return what it ended."""
    asked = {"scope": scope, "value": value, "reason": "test"}
    status, placed = await ask(
        gateway.admin, "POST", "/admin/v1/kill", await operator(gateway), asked
    )
    assert status == 201, placed
    return dict(placed)


async def call(gateway: Gateway, token: str, provider: bytes = b"openai") -> Response:
    """Make one call on a connection of its own."""
    path = b"/%b/v1/chat/completions" % provider
    return parse(await exchange(gateway.proxy, request(token, path=path)))


def code_of(response: Response) -> str:
    """Return the code of a refusal."""
    return str(json.loads(response.body)["error"]["code"])


async def open_stream(
    gateway: Gateway, token: str, provider: bytes = b"openai"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Begin a streaming call and read its first event."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    path = b"/%b/v1/chat/completions" % provider
    writer.write(request(token, STREAM, closes=False, path=path))
    await reader.readuntil(b"data: ")
    return reader, writer


async def test_one_kill_cuts_every_stream(provider: Provider, start_gateway: Start) -> None:
    """200 streams of 20 callers over four workers end with one answer, and one tenant's goes on."""
    extra = {"sessions": {"per_subject": 1000}}
    gateway = await begin(start_gateway, provider, workers=4, extra=extra)
    sessions = [
        await asyncio.to_thread(gateway.open_session, {"openai": KEY}, subject=f"s{number}")
        for number in range(20)
    ]
    spared = await asyncio.to_thread(gateway.open_session, {"openai": KEY}, tenant="globex")
    streams = [
        await open_stream(gateway, str(sessions[number % 20]["token"])) for number in range(STREAMS)
    ]
    other, other_writer = await open_stream(gateway, str(spared["token"]))
    placed = await kill(gateway, "tenant", "acme")
    assert (placed["cut_calls"], placed["closed_sessions"]) == (STREAMS, 20)
    async with asyncio.timeout(5):  # what it takes is measured by bench/kill.py
        for reader, writer in streams:
            rest = await reader.read()
            assert b'"code":"killed"' in rest
            assert not rest.endswith(b"0\r\n\r\n")
            writer.close()
    assert (await call(gateway, str(sessions[0]["token"]))).status == 401
    assert (await call(gateway, str(spared["token"]))).status == 200
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(other.read(), 0.01)
    other_writer.close()
    assert await asyncio.to_thread(gateway.stop) == 0
    ends = [event for event in gateway.events("call.end") if event["tenant"] == "acme"]
    assert [event["outcome"] for event in ends] == ["killed"] * STREAMS
    assert len({event["origin"] for event in gateway.events("call.start")}) == 4


async def test_a_kill_stands_until_it_is_lifted(provider: Provider, start_gateway: Start) -> None:
    """Over a killed control, a killed worker and a restart of everything; then, lifted, calls pass."""
    gateway = await begin(start_gateway, provider, workers=2)
    both = {"openai": KEY, "second": OTHER_KEY}
    session = await asyncio.to_thread(gateway.open_session, both)
    token = str(session["token"])
    reader, writer = await open_stream(gateway, token)
    _, second_writer = await open_stream(gateway, token, b"second")
    placed = await kill(gateway, "provider", "openai")
    assert (placed["cut_calls"], placed["closed_sessions"]) == (1, 0)
    assert b'"code":"killed"' in await reader.read()
    writer.close()

    async def is_stopped() -> None:
        for _ in range(8):
            assert code_of(await call(gateway, token)) == "killed"
            assert (await call(gateway, token, b"second")).status == 200

    await is_stopped()
    for pid in (gateway.pids("control")[0], gateway.pids("worker")[0]):
        os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(gateway.wait_for_log, "workers.complete")
    await is_stopped()
    second_writer.close()
    path = f"/admin/v1/kills/{placed['kill_id']}"
    identity = await operator(gateway)
    assert (await ask(gateway.admin, "DELETE", path, identity, {"reason": "over"}))[0] == 200
    assert (await call(gateway, token)).status == 200
    assert re.search(
        r"^veklom_kills_standing 0", await asyncio.to_thread(gateway.metrics), re.MULTILINE
    )
    assert len(gateway.events("kill.placed")) == len(gateway.events("kill.lifted")) == 1
    assert [event["kills"] for event in gateway.events("kills.standing")] == [[placed["kill_id"]]]
    gateway.verifies_log = False  # two processes were killed


async def test_a_rotated_key_takes_over(provider: Provider, start_gateway: Start) -> None:
    """New calls carry the new key at once; one under way goes on until the overlap is over."""
    gateway = await begin(start_gateway, provider, workers=2)
    identity = await asyncio.to_thread(gateway.identity)
    session = await asyncio.to_thread(
        gateway.post, "/v1/sessions", {"keys": {"openai": KEY}}, identity
    )
    token, path = str(session["token"]), f"/v1/sessions/{session['session_id']}/rotate"

    async def rotate(key: str, overlap: int) -> None:
        asked = {"keys": {"openai": key}, "overlap_seconds": overlap}
        status, answer = await ask(gateway.sessions, "POST", path, identity, asked, token)
        assert status == 200, answer

    reader, writer = await open_stream(gateway, token)
    await rotate(OTHER_KEY, 3600)
    for _ in range(8):
        assert (await call(gateway, token)).status == 200
        carried = provider.received[-1].values(b"authorization")
        assert carried == [b"Bearer " + OTHER_KEY.encode()]
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(), 0.01)
    await rotate(KEY, 3600)  # a third key ends the overlap of the first
    assert b'"code":"key_replaced"' in await reader.read()
    writer.close()
    reader, writer = await open_stream(gateway, token)
    await rotate(OTHER_KEY, 1)
    assert b'"code":"key_replaced"' in await reader.read()
    writer.close()
    assert await asyncio.to_thread(gateway.stop) == 0
    outcomes = [event["outcome"] for event in gateway.events("call.end")]
    assert outcomes.count("key_replaced") == 2
    fingerprints = [event["credential"] for event in gateway.events("call.start")]
    assert len(set(fingerprints)) == 2


async def test_a_killed_key_does_not_live_on_in_its_overlap(
    provider: Provider, start_gateway: Start
) -> None:
    """A stream with a key that was replaced ends when that key is killed; its session goes on."""
    gateway = await begin(start_gateway, provider)
    identity = await asyncio.to_thread(gateway.identity)
    session = await asyncio.to_thread(
        gateway.post, "/v1/sessions", {"keys": {"openai": KEY}}, identity
    )
    token, path = str(session["token"]), f"/v1/sessions/{session['session_id']}/rotate"
    reader, writer = await open_stream(gateway, token)
    asked = {"keys": {"openai": OTHER_KEY}, "overlap_seconds": 3600}
    assert (await ask(gateway.sessions, "POST", path, identity, asked, token))[0] == 200
    placed = await kill(gateway, "fingerprint", session["providers"]["openai"]["fingerprint"])
    assert (placed["cut_calls"], placed["closed_sessions"]) == (1, 0)
    assert b'"code":"killed"' in await reader.read()
    writer.close()
    assert (await call(gateway, token)).status == 200
