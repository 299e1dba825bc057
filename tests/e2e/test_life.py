"""Time, TLS and the end: what waits too long, who may be spoken to, and how a gateway stops."""

import asyncio
import json
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import exchange, parse, request

Start = Callable[..., Gateway]
STREAM = b'{"model":"m","stream":true}'


async def begin(start: Start, provider: Provider, **extra: Any) -> tuple[Gateway, str]:
    """Start a gateway in front of the double with this configuration; open a session."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(start, {"openai": upstream}, extra=extra)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    return gateway, str(session["token"])


async def silent(it: Exchange) -> None:
    """Say nothing."""
    await it.wait_until_left()


async def endless(it: Exchange) -> None:
    """Begin a stream and say no more."""
    await it.begin_stream()
    await it.chunk(b'data: {"choices":[]}\n\n')
    await it.wait_until_left()


# --- time ---


async def test_time_is_bounded_everywhere(provider: Provider, start_gateway: Start) -> None:
    """A provider or a caller that is silent for too long ends its call, and the record says how."""
    timeouts = {
        "first_byte": "1s",
        "idle": "1s",
        "head": "1s",
        "body": "1s",
        "downstream_idle": "1s",
    }
    gateway, token = await begin(start_gateway, provider, timeouts=timeouts)

    async def silent_provider() -> None:
        seen = parse(await exchange(gateway.proxy, request(token)))
        assert (seen.status, json.loads(seen.body)["error"]["code"]) == (504, "upstream_timeout")

    async def stalling_stream() -> None:
        seen = parse(await exchange(gateway.proxy, request(token, STREAM)))
        assert (seen.status, seen.is_whole) == (200, False)

    async def slow_head() -> None:
        seen = parse(await exchange(gateway.proxy, b"POST /openai/v1/chat"))
        assert seen.status == 408

    async def slow_body() -> None:
        seen = parse(await exchange(gateway.proxy, request(token)[:-5]))
        assert (seen.status, json.loads(seen.body)["error"]["code"]) == (408, "request_timeout")

    async def idle_connection() -> None:
        assert await exchange(gateway.proxy, b"") == b""

    async def by_what_was_asked(it: Exchange) -> None:
        await (endless if b"stream" in it.request.body else silent)(it)

    provider.script = by_what_was_asked
    await asyncio.gather(
        silent_provider(), stalling_stream(), slow_head(), slow_body(), idle_connection()
    )
    await asyncio.to_thread(gateway.stop)
    assert {end["outcome"] for end in gateway.events("call.end")} == {"timeout"}
    assert "request_timeout" in {denied["code"] for denied in gateway.events("call.denied")}


async def test_a_stream_is_use(provider: Provider, start_gateway: Start) -> None:
    """A session is not idle while a stream of it runs, however long; afterwards it is."""
    gateway, _ = await begin(start_gateway, provider)
    identity = await asyncio.to_thread(gateway.identity)
    session = await asyncio.to_thread(
        gateway.post, "/v1/sessions", {"keys": {"openai": KEY}, "idle_seconds": 2}, identity
    )
    ended = asyncio.Event()

    async def long_stream(it: Exchange) -> None:
        await it.begin_stream()
        for _ in range(8):
            await it.chunk(b'data: {"choices":[]}\n\n')
            await asyncio.sleep(0.5)  # what is tested is time itself
        await it.chunk(b"")
        ended.set()

    provider.script = long_stream
    seen = parse(await exchange(gateway.proxy, request(session["token"], STREAM)))
    assert (seen.status, seen.is_whole, ended.is_set()) == (200, True, True)
    shown = (
        b"GET /v1/sessions/%b HTTP/1.1\r\nHost: g\r\nConnection: close\r\n"
        b"Authorization: Bearer %b\r\n\r\n"
    ) % (session["session_id"].encode(), identity.encode())
    async with asyncio.timeout(20):
        while parse(await exchange(gateway.sessions, shown)).status == 200:  # noqa: ASYNC110 - no event tells it
            await asyncio.sleep(0.2)  # polling for what time brings
    assert parse(await exchange(gateway.proxy, request(session["token"]))).status == 401
    await asyncio.to_thread(gateway.stop)
    assert "idle" in {event["reason"] for event in gateway.events("session.closed")}


# --- the end ---


async def test_a_drain_lets_calls_end(provider: Provider, start_gateway: Start) -> None:
    """After SIGTERM readiness is off, no call is begun, and the running stream ends cleanly."""
    go_on = asyncio.Event()

    async def until_told(it: Exchange) -> None:
        await it.begin_stream()
        await it.chunk(b'data: {"choices":[]}\n\n')
        await go_on.wait()
        await it.chunk(b"data: [DONE]\n\n")
        await it.chunk(b"")

    provider.script = until_told
    gateway, token = await begin(start_gateway, provider)
    idle_reader, idle_writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    writer.write(request(token, STREAM, closes=False))
    await reader.readuntil(b"data: ")
    gateway.process.send_signal(signal.SIGTERM)
    assert await idle_reader.read() == b""  # an idle connection is let go at once
    ready = parse(
        await exchange(
            gateway.admin, b"GET /readyz HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n"
        )
    )
    assert ready.status == 503
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", gateway.proxy)
    go_on.set()
    rest = await reader.read()
    assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    for each in (writer, idle_writer):
        each.close()
    assert await asyncio.to_thread(gateway.stop) == 0
    (end,) = gateway.events("call.end")
    assert end["outcome"] == "complete"


async def test_a_drain_has_an_end(provider: Provider, start_gateway: Start) -> None:
    """A stream that outlives the drain ends with the dialect's error and a broken transfer."""
    provider.script = endless
    gateway, token = await begin(start_gateway, provider, timeouts={"drain": "1s"})
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    writer.write(request(token, STREAM, closes=False))
    await reader.readuntil(b"data: ")
    stopping = asyncio.to_thread(gateway.stop)
    rest, code = await asyncio.gather(reader.read(), stopping)
    writer.close()
    assert b'"code":"draining"' in rest
    assert not rest.endswith(b"0\r\n\r\n")
    assert code == 0
    (end,) = gateway.events("call.end")
    assert (end["outcome"], end["fault"]) == ("shutdown", "gateway")
    closed = gateway.events("session.closed")
    assert [event["reason"] for event in closed] == ["shutdown"]


async def test_a_power_cut_leaves_an_honest_log(provider: Provider, start_gateway: Start) -> None:
    """Everything killed in the middle of a call: the start is on record, and nothing looks forged."""
    provider.script = endless
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(start_gateway, {"openai": upstream}, verifies_log=False)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    writer.write(request(session["token"], STREAM, closes=False))
    await reader.readuntil(b"data: ")
    await asyncio.to_thread(gateway.kill)
    writer.close()
    assert len(gateway.events("call.start")) == 1
    command = [sys.executable, "-m", "gateway", "audit", "verify", str(gateway.folder / "audit")]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode in {0, 2}, done.stdout
    assert "1 without an end" in done.stdout


# --- TLS ---


@pytest.fixture
def authority() -> trustme.CA:
    """A certificate authority of the test's own."""
    return trustme.CA()


def provider_context(authority: trustme.CA, name: str) -> ssl.SSLContext:
    """Return what a provider of this name speaks TLS with."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(name).configure_cert(context)
    return context


@pytest.mark.parametrize(
    ("name", "authorities", "status"),
    [("127.0.0.1", "ours", 200), ("elsewhere.example", "ours", 502), ("127.0.0.1", "system", 502)],
)
async def test_providers_are_verified(
    authority: trustme.CA,
    start_gateway: Start,
    tmp_path: Path,
    name: str,
    authorities: str,
    status: int,
) -> None:
    """Over TLS a provider gets the key only under a trusted certificate for its own name."""
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with Provider(tls=provider_context(authority, name)) as provider:
        upstream = {"base_url": f"https://127.0.0.1:{provider.port}/v1"}
        if authorities == "ours":
            upstream["ca_file"] = str(tmp_path / "ca.pem")
        gateway = await asyncio.to_thread(start_gateway, {"openai": upstream})
        session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
        large = b'{"model":"m","x":"%b"}' % (b"x" * 2_000_000)
        for body in (b'{"model":"m"}', large):
            seen = parse(await exchange(gateway.proxy, request(session["token"], body)))
            assert seen.status == status
        got = [(each.values(b"authorization"), each.body) for each in provider.received]
        expected = [([b"Bearer " + KEY.encode()], body) for body in (b'{"model":"m"}', large)]
        assert got == (expected if status == 200 else [])


@pytest.mark.parametrize("listener", ["proxy", "sessions", "admin"])
async def test_every_listener_speaks_tls_1_3_only(
    authority: trustme.CA, start_gateway: Start, tmp_path: Path, listener: str
) -> None:
    """A listener with a certificate serves TLS 1.3 and nothing older or plain; keys arrive over it."""
    certificate = tmp_path / "server.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(certificate)
    modern, old = ssl.create_default_context(), ssl.create_default_context()
    for context in (modern, old):
        authority.configure_trust(context)
    old.maximum_version = ssl.TLSVersion.TLSv1_2

    def listeners(gateway: Gateway) -> dict[str, Any]:
        ports = {"proxy": gateway.proxy, "sessions": gateway.sessions, "admin": gateway.admin}
        found = {name: {"address": f"127.0.0.1:{port}"} for name, port in ports.items()}
        found[listener]["certificate"] = str(certificate)
        return {"listeners": found}

    gateway = await asyncio.to_thread(
        start_gateway, {"openai": {}}, extra_from=listeners, tls={listener: modern}
    )
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    assert session["session_id"]
    port = {"proxy": gateway.proxy, "sessions": gateway.sessions, "admin": gateway.admin}[listener]
    path = b"/.well-known/veklom" if listener == "sessions" else b"/livez"
    asked = b"GET %b HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n" % path
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=modern)
    assert writer.get_extra_info("ssl_object").version() == "TLSv1.3"
    writer.close()
    assert parse(await exchange(port, asked, context=modern)).status == 200
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("127.0.0.1", port, ssl=old)
    assert await exchange(port, asked) == b""


async def test_calls_stream_over_tls(
    authority: trustme.CA, provider: Provider, start_gateway: Start, tmp_path: Path
) -> None:
    """An application streams over TLS as it does in plain, and sessions say where: at an https URL."""
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        tmp_path / "server.pem"
    )
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}

    def listeners(gateway: Gateway) -> dict[str, Any]:
        ports = {"proxy": gateway.proxy, "sessions": gateway.sessions, "admin": gateway.admin}
        found = {name: {"address": f"127.0.0.1:{port}"} for name, port in ports.items()}
        found["proxy"]["certificate"] = str(tmp_path / "server.pem")
        return {"listeners": found}

    gateway = await asyncio.to_thread(start_gateway, {"openai": upstream}, extra_from=listeners)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    provider.script = _short_stream
    modern = ssl.create_default_context()
    authority.configure_trust(modern)
    seen = parse(await exchange(gateway.proxy, request(session["token"], STREAM), context=modern))
    assert (seen.status, seen.is_whole) == (200, True)
    assert seen.body.endswith(b"data: [DONE]\n\n")
    assert session["providers"]["openai"]["base_url"].startswith("https://127.0.0.1:")


async def _short_stream(it: Exchange) -> None:
    await it.begin_stream()
    for _ in range(50):
        await it.chunk(b'data: {"choices":[],"x":"%b"}\n\n' % (b"x" * 5_000))
    await it.chunk(b"data: [DONE]\n\n")
    await it.chunk(b"")


async def test_a_hanging_issuer_delays_no_expiry(provider: Provider, start_gateway: Start) -> None:
    """While an identity provider takes the connection and says nothing, sessions end in time."""
    asked: asyncio.Queue[None] = asyncio.Queue()

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.put_nowait(None)
        await reader.read(-1)
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as issuer:
        port = issuer.sockets[0].getsockname()[1]
        silent_issuer = {
            "issuer": "urn:silent", "audiences": "a", "plain_http": True,
            "jwks_url": f"http://127.0.0.1:{port}/jwks",
        }  # fmt: skip
        gateway, _ = await begin(start_gateway, provider, issuers=[silent_issuer])
        provider.script = endless
        identity = await asyncio.to_thread(gateway.identity)
        while not asked.empty():
            asked.get_nowait()
        await asked.get()  # from here on one fetch hangs for five seconds
        session = await asyncio.to_thread(
            gateway.post, "/v1/sessions", {"keys": {"openai": KEY}, "ttl_seconds": 1}, identity
        )
        async with asyncio.timeout(4):
            seen = parse(await exchange(gateway.proxy, request(session["token"], STREAM)))
        assert (seen.status, seen.is_whole) == (200, False)
        await asyncio.to_thread(gateway.stop)
    assert "expired" in {event["reason"] for event in gateway.events("session.closed")}
