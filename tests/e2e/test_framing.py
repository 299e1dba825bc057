"""Request framing: what could be read in two ways gets a 4xx or a close, and no provider hears."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise

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
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)

MALFORMED = {
    "both lengths": LINE + HOST + b"@" + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "both lengths, turned": LINE + HOST + b"@" + CHUNKED + LENGTH + b"\r\n" + BODY,
    "two lengths": LINE + HOST + b"@" + LENGTH + LENGTH + b"\r\n" + BODY,
    "a signed length": LINE + HOST + b"@Content-Length: +13\r\n\r\n" + BODY,
    "a list of lengths": LINE + HOST + b"@Content-Length: 13, 13\r\n\r\n" + BODY,
    "a huge length": LINE + HOST + b"@Content-Length: 99999999999999999999\r\n\r\n" + BODY,
    "another coding": LINE + HOST + b"@Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS,
    "an unknown coding": LINE + HOST + b"@Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS,
    "a coding named twice": LINE + HOST + b"@" + CHUNKED + CHUNKED + b"\r\n" + CHUNKS,
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
    "a head too large": LINE + HOST + b"@X: " + b"a" * 70_000 + b"\r\n" + LENGTH + b"\r\n" + BODY,
    "too many fields": LINE + HOST + b"@" + b"X: a\r\n" * 200 + LENGTH + b"\r\n" + BODY,
    "trailers too large": LINE + HOST + b"@" + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"X: a\r\n" * 20_000,
    "an expectation": LINE + HOST + b"@Expect: miracles\r\n" + LENGTH + b"\r\n" + BODY,
}  # fmt: skip
CODES = {
    "HTTP/1.0": b"http_version_not_supported",
    "an expectation": b"expectation_failed",
    "a head too large": b"head_too_large",
    "too many fields": b"head_too_large",
    "trailers too large": b"head_too_large",
} | dict.fromkeys(("absolute", "dot segments", "encoded dots", "doubled slash"), b"invalid_target")
"""What a case is refused as, where it is not `invalid_request`."""


def _with_token(raw: bytes, token: str) -> bytes:
    return raw.replace(
        b"@", b"Connection: close\r\nAuthorization: Bearer " + token.encode() + b"\r\n", 1
    )


@pytest_asyncio.fixture
async def open_port(gateway: Gateway, token: str) -> AsyncIterator[tuple[int, str]]:
    """The gateway's port and a token that would be let through."""
    yield gateway.proxy, token


async def test_what_the_malformed_cases_are_made_of_passes(
    open_port: tuple[int, str], provider: Provider
) -> None:
    """The same requests without their fault are served: each case fails for its fault alone."""
    port, token = open_port
    for raw in (
        LINE + HOST + b"@" + LENGTH + b"\r\n" + BODY,
        LINE + HOST + b"@" + CHUNKED + b"\r\n" + CHUNKS,
        LINE + HOST + b"@" + CHUNKED + b"\r\n" + CHUNKS[:-2] + b"X: a\r\n\r\n",
        LINE + HOST + b"@" + b"X: a\r\n" * 100 + LENGTH + b"\r\n" + BODY,
    ):
        assert parse(await exchange(port, _with_token(raw, token))).status == 200
    assert [each.body for each in provider.received] == [BODY] * 4


@pytest.mark.parametrize("name", MALFORMED)
async def test_malformed_requests_reach_nobody(running: "Running", name: str) -> None:
    """Every malformed case is refused for what it is, once, and the provider hears of none."""
    running.provider.received.clear()
    raw = _with_token(MALFORMED[name], running.token)
    answer = await asyncio.to_thread(running.send, raw)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b'"%b"' % CODES.get(name, b"invalid_request") in answer
    assert 400 <= parse(answer).status < 506
    assert running.provider.received == []


async def test_a_pipelined_request_is_not_served(
    open_port: tuple[int, str], provider: Provider
) -> None:
    """A second request sent before the first was answered is dropped with the connection."""
    port, token = open_port
    one = request(token, BODY, closes=False)
    answer = await exchange(port, one + one + one)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert len(provider.received) == 1


@pytest.mark.parametrize("offer", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"])
async def test_a_second_request_says_nothing_of_the_first(
    open_port: tuple[int, str], provider: Provider, offer: bytes
) -> None:
    """What is sent behind a request in the same write changes neither its method nor its answer."""
    port, token = open_port
    one = request(token, BODY, headers=offer, closes=False)
    for method in (b"GET", b"DELETE", b"HEAD"):
        other = request(token, b"", path=b"/openai/v1/models", method=method, closes=False)
        answer = await exchange(port, one + other)
        assert parse(answer).status == 200
        assert answer.count(b"HTTP/1.1 ") == 1
    assert [each.line.split()[0] for each in provider.received] == [b"POST"] * 3


@pytest.mark.parametrize("path", [b"/openai/v1/chat/completions", b"/openai/v1/files"])
async def test_a_request_cut_short_at_any_byte_reaches_nobody_whole(
    open_port: tuple[int, str], provider: Provider, path: bytes
) -> None:
    """A caller that hangs up at any byte of its request never gets a whole call through."""
    port, token = open_port
    headers = b"content-type: application/json\r\n"
    if path.endswith(b"files"):
        headers = b"content-type: multipart/form-data; boundary=b\r\n"
    body = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--'
    whole = request(token, body if path.endswith(b"files") else BODY, path=path, headers=headers)
    # What of the token came is no matter of framing: one cut in it is as good as all.
    cuts = [at for at in range(len(whole)) if not 100 < at < whole.index(b"content-type")]
    for at in range(0, len(cuts), 25):
        await asyncio.gather(
            *(exchange(port, whole[:end], half_close=True) for end in cuts[at : at + 25])
        )
    assert not [each for each in provider.received if each.is_complete]


FIELD = st.tuples(
    st.from_regex(rb"x-[a-z]{1,9}", fullmatch=True),
    st.binary(max_size=40).map(lambda value: bytes(0x41 + each % 0x3E for each in value)),
)


@st.composite
def messages(draw: st.DrawFn) -> tuple[list[bytes], bytes]:
    """Draw a valid request below its token, cut into writes, and the body that it means."""
    text = draw(st.text(st.characters(codec="utf-8", exclude_characters="@"), max_size=300))
    body = json.dumps({"model": "m", "x": text}, ensure_ascii=draw(st.booleans())).encode()
    fields = b"".join(b"%b: %b\r\n" % each for each in draw(st.lists(FIELD, max_size=20)))
    fields += b"x-pad: %b\r\n" % (b"a" * draw(st.sampled_from([0, 0, 0, 20_000, 50_000])))
    places = draw(st.lists(st.integers(0, len(body)), max_size=5).map(sorted))
    chunks = [body[a:b] for a, b in pairwise([0, *places, len(body)]) if a < b]
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in chunks) + b"0\r\n\r\n"
    if draw(st.booleans()):
        raw = LINE + HOST + b"@" + fields + CHUNKED + b"\r\n" + chunked
    else:
        raw = LINE + HOST + b"@" + fields + b"Content-Length: %d\r\n\r\n" % len(body) + body
    cuts = draw(st.lists(st.integers(1, len(raw)), max_size=12).map(sorted))
    return [raw[a:b] for a, b in pairwise([0, *cuts, len(raw)]) if a < b], body


@given(message=messages())
@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_chunking_gives_the_same_result(
    running: "Running", message: tuple[list[bytes], bytes]
) -> None:
    """However a valid request is framed and cut into reads, the provider gets the same body."""
    pieces, body = message
    running.provider.received.clear()
    answer = parse(running.send(*(_with_token(piece, running.token) for piece in pieces)))
    assert answer.status == 200
    assert [each.body for each in running.provider.received] == [body]


class Running:
    """A gateway and a provider in a loop of their own, for tests that share them."""

    def __init__(self, runner: asyncio.Runner, provider: Provider, port: int, token: str) -> None:
        self.runner, self.provider, self.port, self.token = runner, provider, port, token

    def send(self, *pieces: bytes) -> bytes:
        """Send the pieces on one connection and return the answer."""
        return self.runner.run(exchange(self.port, *pieces))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One gateway for all cases and examples."""
    with asyncio.Runner() as runner:
        provider = Provider()
        runner.run(provider.__aenter__())
        upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
        with Gateway(tmp_path_factory.mktemp("gateway") / "g", {"openai": upstream}) as gateway:
            token = gateway.open_session({"openai": KEY})["token"]
            yield Running(runner, provider, gateway.proxy, token)
        runner.run(provider.__aexit__())
