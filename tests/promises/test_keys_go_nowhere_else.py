"""P: a key goes to its provider and nowhere else, and does not come back from there."""

import asyncio
import base64
import json
import os
import secrets
import socket
import struct
from collections.abc import Callable

import pytest

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import Response, exchange, parse, request

STARS = b"*" * len(KEY)
UNAUTHORIZED = b"401 Unauthorized"


def quote(it: Exchange) -> bytes:
    """Return the credential that a request carried."""
    return it.request.values(b"authorization")[0].removeprefix(b"Bearer ")


async def call(gateway: Gateway, token: str) -> Response:
    """Make a call and return the answer."""
    return parse(await exchange(gateway.proxy, request(token)))


def everything_written(gateway: Gateway) -> bytes:
    """Return what the gateway has in files: log, audit, configuration, state."""
    return b"".join(path.read_bytes() for path in gateway.folder.rglob("*") if path.is_file())


PACKET_KEY = b"sk-in-packets-" + secrets.token_hex(24).encode()
"""Not the key of all other tests, which may run meanwhile."""

ETH_P_ALL = 3
IP_HEADER_AT, IPV4, TCP = 14, 0x0800, 6


class Capture:
    """Every TCP segment that this machine sends or receives, on whatever interface."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024 * 1024)
        self._socket.setblocking(False)

    def segments(self) -> list[tuple[int, int, bytes]]:
        """Return source port, destination port and packet of each that was seen so far."""
        seen: list[tuple[int, int, bytes]] = []
        while True:
            try:
                frame = self._socket.recv(65_600)
            except BlockingIOError:
                return seen
            packet = frame[IP_HEADER_AT:]
            ports_at = (packet[0] & 15) * 4 if packet else 0
            if frame[12:14] != IPV4.to_bytes(2, "big") or packet[9] != TCP:
                assert PACKET_KEY not in frame, "a key in something that is no TCP"
                continue
            source, destination = struct.unpack_from(">HH", packet, ports_at)
            seen.append((source, destination, packet))

    def close(self) -> None:
        """Stop capturing."""
        self._socket.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may capture packets")
async def test_packets_with_the_key_go_to_the_gateway_and_the_provider(
    provider: Provider, gateway: Gateway
) -> None:
    """Of all that leaves and enters the machine, only deposit and upstream call carry the key."""
    capture = Capture()
    try:
        identity = await asyncio.to_thread(gateway.identity)
        session = await asyncio.to_thread(
            gateway.post, "/v1/sessions", {"keys": {"openai": PACKET_KEY.decode()}}, identity
        )
        for body in (b'{"model":"m"}', b'{"model":"m","stream":true}', b"no json"):
            await exchange(gateway.proxy, request(session["token"], body))
        await asyncio.to_thread(gateway.metrics)
        await asyncio.to_thread(gateway.stop)
        segments = capture.segments()
    finally:
        capture.close()
    carrying = {destination for _, destination, packet in segments if PACKET_KEY in packet}
    assert carrying == {gateway.sessions, provider.port}
    assert gateway.admin in {destination for _, destination, _ in segments}


@pytest.mark.parametrize("location", ["//{other}/v1/x", "http://{other}/v1/x", "/v1/other"])
async def test_a_redirecting_provider(
    provider: Provider, gateway: Gateway, token: str, location: str
) -> None:
    """A redirect is not followed and not shown: whoever is named there hears nothing."""
    async with Provider() as other:

        async def redirect(it: Exchange) -> None:
            where = location.format(other=f"127.0.0.1:{other.port}").encode()
            await it.send(
                b"HTTP/1.1 307 Temporary Redirect\r\nlocation: %b\r\ncontent-length: 0\r\n\r\n"
                % where
            )

        provider.script = redirect
        answer = await call(gateway, token)
        assert (answer.status, answer.values(b"location")) == (502, [])
        assert (len(provider.received), other.received) == (1, [])


@pytest.mark.parametrize("status", [b"200 OK", b"304 Not Modified", UNAUTHORIZED])
async def test_an_echo_in_a_header_field(
    provider: Provider, gateway: Gateway, token: str, status: bytes
) -> None:
    """A field that quotes the credential comes back with stars in its place, whatever the status."""

    async def echo(it: Exchange) -> None:
        await it.send(
            b"HTTP/1.1 %b\r\nx-you-sent: Bearer %b\r\nx-other: kept\r\ncontent-length: 0\r\n\r\n"
            % (status, quote(it))
        )

    provider.script = echo
    answer = await call(gateway, token)
    assert KEY.encode() not in answer.raw
    assert answer.values(b"x-you-sent") == [b"Bearer " + STARS]
    assert answer.values(b"x-other") == [b"kept"]


async def test_an_echo_in_an_error(provider: Provider, gateway: Gateway, token: str) -> None:
    """An error that quotes the credential, plainly or in base64, keeps its length and its rest."""

    async def echo(it: Exchange) -> None:
        encoded = base64.b64encode(b"user:" + quote(it))
        await it.reply(b'{"you":"%b","basic":"%b"}' % (quote(it), encoded), status=UNAUTHORIZED)

    provider.script = echo
    answer = await call(gateway, token)
    assert answer.is_whole
    assert answer.status == 401
    assert KEY.encode() not in answer.body
    said = json.loads(answer.body)
    assert said["you"] == STARS.decode()
    decoded = base64.b64decode(said["basic"].replace("*", "A"))
    assert not any(KEY[at : at + 4].encode() in decoded for at in range(len(KEY) - 3))


@pytest.mark.parametrize("content_type", [b"application/json", b"text/event-stream"])
@pytest.mark.parametrize("size", [1, 7, 30])
async def test_an_echo_cut_into_chunks(
    provider: Provider, gateway: Gateway, token: str, size: int, content_type: bytes
) -> None:
    """However the provider cuts its error up, the credential in it is found."""

    async def echo(it: Exchange) -> None:
        await it.send(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n"
            % content_type
        )
        body = b"data: no, not " + quote(it) + b" nor " + quote(it) + b"\n\n"
        for at in range(0, len(body), size):
            await it.chunk(body[at : at + size])
        await it.chunk(b"")

    provider.script = echo
    answer = await call(gateway, token)
    assert answer.is_whole
    assert answer.body == b"data: no, not " + STARS + b" nor " + STARS + b"\n\n"


async def test_an_error_stream_goes_on_streaming(
    provider: Provider, gateway: Gateway, token: str
) -> None:
    """The events of an error arrive one by one, though each is searched."""
    read = asyncio.Event()

    async def stream(it: Exchange) -> None:
        await it.send(
            b"HTTP/1.1 500 Internal Server Error\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        await it.chunk(b"data: one\n\n")
        await read.wait()
        await it.chunk(b"data: two\n\n")
        await it.chunk(b"")

    provider.script = stream
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    writer.write(request(token))
    await asyncio.wait_for(reader.readuntil(b"data: one\n\n"), 10)
    read.set()
    await asyncio.wait_for(reader.readuntil(b"data: two\n\n"), 10)
    writer.close()


async def test_a_good_answer_is_passed_as_it_came(
    provider: Provider, gateway: Gateway, token: str
) -> None:
    """The bytes of a good answer are not looked at, whatever they say."""

    async def answer_with_it(it: Exchange) -> None:
        await it.reply(b'{"content":"%b"}' % quote(it))

    provider.script = answer_with_it
    assert (await call(gateway, token)).body == b'{"content":"%b"}' % KEY.encode()


async def test_masks_of_the_provider_stay(provider: Provider, gateway: Gateway, token: str) -> None:
    """A key that the provider has masked itself helps its owner, and passes."""
    message = b'{"error":"Incorrect API key provided: %b****%b."}' % (
        KEY[:8].encode(),
        KEY[-4:].encode(),
    )

    async def mask(it: Exchange) -> None:
        await it.reply(message, status=UNAUTHORIZED)

    provider.script = mask
    assert (await call(gateway, token)).body == message


async def test_no_echo_is_written_down(
    provider: Provider, start_gateway: Callable[..., Gateway]
) -> None:
    """Not even a provider that calls its model by the key gets it into log or audit."""

    async def everywhere(it: Exchange) -> None:
        status = b"200 OK" if len(provider.received) == 1 else UNAUTHORIZED
        key = quote(it)
        body = b'{"model":"%b","id":"%b","usage":{"prompt_tokens":1,"completion_tokens":1}}' % (
            key,
            key,
        )
        await it.send(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\nx-request-id: %b\r\nx-%b: 1\r\n"
            b"content-length: %d\r\n\r\n%b" % (status, key, key, len(body), body)
        )

    provider.script = everywhere
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(
        start_gateway, {"openai": upstream}, extra={"logs": {"level": "debug"}}
    )
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    for status in (200, 401):
        assert (await call(gateway, session["token"])).status == status
    metrics = await asyncio.to_thread(gateway.metrics)
    await asyncio.to_thread(gateway.stop)
    assert KEY.encode() not in everything_written(gateway) + metrics.encode()
    models = [end["usage"]["model"] for end in gateway.events("call.end")]
    assert models == [STARS.decode(), ""]
