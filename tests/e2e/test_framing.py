"""Request framing: what could be read in two ways gets a 4xx or a close, and no provider hears."""

import asyncio
from collections.abc import AsyncIterator, Callable
from itertools import pairwise
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider
from tests.simulators.wire import exchange, parse, request

BODY = b'{"model":"m"}'
LINE = b"POST /openai/v1/chat/completions HTTP/1.1\r\n"
HOST = b"Host: g\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"

MALFORMED = {
    "both lengths": LINE + HOST + b"@" + LENGTH + CHUNKED + b"\r\n0\r\n\r\n",
    "both lengths, turned": LINE + HOST + b"@" + CHUNKED + LENGTH + b"\r\n" + BODY,
    "two lengths": LINE + HOST + b"@" + LENGTH + LENGTH + b"\r\n" + BODY,
    "a signed length": LINE + HOST + b"@Content-Length: +13\r\n\r\n" + BODY,
    "a list of lengths": LINE + HOST + b"@Content-Length: 13, 13\r\n\r\n" + BODY,
    "a huge length": LINE + HOST + b"@Content-Length: 99999999999999999999\r\n\r\n" + BODY,
    "another coding": LINE + HOST + b"@Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "an unknown coding": LINE + HOST + b"@Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding named twice": LINE + HOST + b"@" + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "space before the colon": LINE + HOST + b"@Content-Length : 13\r\n\r\n" + BODY,
    "two hosts": LINE + HOST + HOST + b"@" + LENGTH + b"\r\n" + BODY,
    "no host": LINE + b"@" + LENGTH + b"\r\n" + BODY,
    "a folded line": LINE + HOST + b"@X: a\r\n b\r\n" + LENGTH + b"\r\n" + BODY,
    "bare line feeds": (LINE + HOST + b"@" + LENGTH + b"\r\n").replace(b"\r\n", b"\n") + BODY,
    "one bare line feed": LINE + HOST + b"@X: a\n" + LENGTH + b"\r\n" + BODY,
    "a bare carriage return": LINE + HOST + b"@X: a\rb\r\n" + LENGTH + b"\r\n" + BODY,
    "a zero byte": LINE + HOST + b"@X: a\x00b\r\n" + LENGTH + b"\r\n" + BODY,
    "space in a name": LINE + HOST + b"@X y: b\r\n" + LENGTH + b"\r\n" + BODY,
    "chunk size in 0x": LINE + HOST + b"@" + CHUNKED + b"\r\n0xd\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunk size too large": LINE + HOST + b"@" + CHUNKED + b"\r\nfffffffffffffffff\r\n",
    "chunk without its end": LINE + HOST + b"@" + CHUNKED + b"\r\nd\r\n" + BODY + b"XX0\r\n\r\n",
    "chunk size, line feed": LINE + HOST + b"@" + CHUNKED + b"\r\nd\n" + BODY + b"\r\n0\r\n\r\n",
    "HTTP/1.0": LINE.replace(b"1.1", b"1.0") + HOST + b"@" + LENGTH + b"\r\n" + BODY,
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "absolute": LINE.replace(b"/openai", b"http://evil/openai") + HOST + b"@" + LENGTH + b"\r\n" + BODY,
    "dot segments": LINE.replace(b"/v1/", b"/v1/../v1/") + HOST + b"@" + LENGTH + b"\r\n" + BODY,
    "encoded dots": LINE.replace(b"/v1/", b"/v1/%2e%2E/v1/") + HOST + b"@" + LENGTH + b"\r\n" + BODY,
    "doubled slash": LINE.replace(b"/v1/", b"//v1/") + HOST + b"@" + LENGTH + b"\r\n" + BODY,
    "a head too large": LINE + HOST + b"@X: " + b"a" * 70_000 + b"\r\n\r\n",
    "too many fields": LINE + HOST + b"@" + b"X: a\r\n" * 200 + b"\r\n",
    "an expectation": LINE + HOST + b"@Expect: miracles\r\n" + LENGTH + b"\r\n" + BODY,
}  # fmt: skip


def _with_token(raw: bytes, token: str) -> bytes:
    return raw.replace(
        b"@", b"Connection: close\r\nAuthorization: Bearer " + token.encode() + b"\r\n", 1
    )


@pytest_asyncio.fixture
async def open_port(gateway: Gateway, token: str) -> AsyncIterator[tuple[int, str]]:
    """The gateway's port and a token that would be let through."""
    yield gateway.proxy, token


async def test_malformed_requests_reach_nobody(
    open_port: tuple[int, str], provider: Provider
) -> None:
    """Every malformed case gets a 4xx or 505 or a close, and the provider hears of none of them."""
    port, token = open_port
    for name, raw in MALFORMED.items():
        answer = await exchange(port, _with_token(raw, token))
        if answer:
            assert parse(answer).status in {400, 404, 417, 431, 505}, (name, answer[:200])
            assert answer.count(b"HTTP/1.1 ") == 1, name
    assert provider.received == []


async def test_a_pipelined_request_is_not_served(
    open_port: tuple[int, str], provider: Provider
) -> None:
    """A second request sent before the first was answered is dropped with the connection."""
    port, token = open_port
    one = request(token, BODY, closes=False)
    answer = await exchange(port, one + one + one)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert len(provider.received) == 1


async def test_a_request_cut_short_at_any_byte_reaches_nobody_whole(
    open_port: tuple[int, str], provider: Provider
) -> None:
    """A caller that hangs up at any byte of its request never gets a call through."""
    port, token = open_port
    whole = request(token, BODY)
    for end in range(0, len(whole), 7):
        await exchange(port, whole[:end], half_close=True)
    assert provider.received == []


@given(cuts=st.lists(st.integers(1, 600), max_size=12), chunked=st.booleans())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_chunking_gives_the_same_result(
    framing_gateway: "Running", cuts: list[int], *, chunked: bool
) -> None:
    """However a valid request is cut into reads, the provider gets the same request."""
    framing_gateway.check(cuts, chunked=chunked)


class Running:
    """A gateway and a provider in a loop of their own, for tests that are no coroutines."""

    def __init__(self, runner: asyncio.Runner, provider: Provider, port: int, token: str) -> None:
        self.runner, self.provider, self.port, self.token = runner, provider, port, token

    def check(self, cuts: list[int], *, chunked: bool) -> None:
        """Send one valid request cut at these places and compare what arrived."""
        raw = request(self.token, BODY)
        if chunked:
            raw = raw.replace(LENGTH, CHUNKED).replace(
                b"\r\n\r\n" + BODY,
                b"\r\n\r\n5\r\n" + BODY[:5] + b"\r\n8\r\n" + BODY[5:] + b"\r\n0\r\n\r\n",
            )
        places = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
        pieces = [raw[a:b] for a, b in pairwise(places)]
        self.provider.received.clear()
        answer = parse(self.runner.run(exchange(self.port, *pieces)))
        assert answer.status == 200
        assert [each.body for each in self.provider.received] == [BODY]


@pytest.fixture
def framing_gateway(tmp_path: Path, start_gateway: Callable[..., Gateway]) -> "Running":  # type: ignore[misc]
    """One gateway for all examples of a property."""
    del tmp_path
    with asyncio.Runner() as runner:
        provider = Provider()
        runner.run(provider.__aenter__())
        upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
        gateway = start_gateway({"openai": upstream})
        token = gateway.open_session({"openai": KEY})["token"]
        yield Running(runner, provider, gateway.proxy, token)
        runner.run(provider.__aexit__())
