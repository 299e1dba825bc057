"""HTTP/1.1 in full, through the whole governed path: what each side sees on the wire."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import exchange, parse, request

MULTIPART = b"content-type: multipart/form-data; boundary=b\r\n"
FORM_HEAD = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
)


@pytest_asyncio.fixture
async def wire(
    gateway: Gateway,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """One connection of a caller."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
    yield reader, writer
    writer.close()


Wire = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return head and body of one answer with a length, leaving the connection open."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or b"0")
    return head, await reader.readexactly(length)


async def test_expect_continue(provider: Provider, token: str, wire: Wire) -> None:
    """A caller that waits to be asked is asked once, and only for a call that may get further."""
    reader, writer = wire
    expect = b"content-type: application/json\r\nExpect: 100-continue\r\n"
    body = b'{"model":"m"}'
    head = request(token, body, headers=expect, closes=False)[: -len(body)]
    writer.write(head)
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert provider.received == []
    writer.write(body)
    assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 OK")
    assert provider.received[0].values(b"expect") == []
    writer.write(head.replace(token.encode(), b"nonsense"))
    refused = await reader.readuntil(b"\r\n\r\n")
    assert refused.startswith(b"HTTP/1.1 401 ")
    assert len(provider.received) == 1


async def test_expect_continue_of_an_upload(provider: Provider, token: str, wire: Wire) -> None:
    """An upload that is streamed is asked for as well."""
    reader, writer = wire
    body = FORM_HEAD + b"data\r\n--b--\r\n"
    expect = MULTIPART + b"Expect: 100-continue\r\n"
    raw = request(token, body, path=b"/openai/v1/files", headers=expect, closes=False)
    writer.write(raw[: -len(body)])
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(body)
    assert (await read_answer(reader))[0].startswith(b"HTTP/1.1 200 OK")
    assert provider.received[0].body == body


async def test_head_has_no_body(provider: Provider, token: str, wire: Wire) -> None:
    """HEAD goes where GET goes; its answer shows the length and has no body; the connection lives."""

    async def answer(it: Exchange) -> None:
        await it.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 1234\r\n\r\n"
        )

    provider.script = answer
    reader, writer = wire
    asked = request(token, b"", path=b"/openai/v1/models/m", method=b"HEAD", closes=False)
    for _ in range(2):
        writer.write(asked.replace(b"Content-Length: 0\r\n", b""))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: 1234" in head
    assert provider.received[0].line == b"HEAD /v1/models/m HTTP/1.1"
    assert provider.connections == 2  # whether a body follows a HEAD is a provider's word


@pytest.mark.parametrize(
    ("status", "fields"),
    [(b"204 No Content", b""), (b"304 Not Modified", b'etag: "x"\r\n')],
)
async def test_answers_without_a_body(
    provider: Provider, token: str, wire: Wire, status: bytes, fields: bytes
) -> None:
    """204 and 304 end with their head, on both connections, which go on."""

    async def answer(it: Exchange) -> None:
        await it.send(b"HTTP/1.1 %b\r\n%b\r\n" % (status, fields))

    provider.script = answer
    reader, writer = wire
    raw = request(token, b"", path=b"/openai/v1/files/f", method=b"DELETE", closes=False)
    for _ in range(2):
        writer.write(raw)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status)
        assert b"transfer-encoding" not in head
        assert fields in head
    assert provider.connections == 1


async def test_connections_are_kept_on_both_sides(
    provider: Provider, token: str, wire: Wire
) -> None:
    """Fifty calls on one connection take one connection to the provider."""
    reader, writer = wire
    for _ in range(50):
        writer.write(request(token, closes=False))
        assert await read_answer(reader)
    assert provider.connections == 1


DOUBTFUL = {
    "it asked to close": b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
    "it said more than it announced": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200",
}


@pytest.mark.parametrize("raw", DOUBTFUL.values(), ids=DOUBTFUL.keys())
async def test_a_doubtful_connection_is_not_used_again(
    provider: Provider, token: str, wire: Wire, raw: bytes
) -> None:
    """After an answer that leaves a doubt, the next call gets a connection of its own."""

    async def answer(it: Exchange) -> None:
        await it.send(raw)

    provider.script = answer
    reader, writer = wire
    for _ in range(3):
        writer.write(request(token, closes=False))
        assert (await read_answer(reader))[1] == b"ok"
    assert provider.connections == 3


INVALID = {
    "both lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nabc",
    "another coding": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nabc",
    "a bad chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    "a folded line": b"HTTP/1.1 200 OK\r\nx: a\r\n b\r\ncontent-length: 0\r\n\r\n",
    "a switch of protocol": b"HTTP/1.1 101 Other\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "an endless head": b"HTTP/1.1 200 OK\r\n" + b"x: " + b"a" * 200_000 + b"\r\n\r\n",
    "a head of many fields": b"HTTP/1.1 200 OK\r\n" + b"x: a\r\n" * 40_000 + b"\r\n",
}  # fmt: skip


@pytest.mark.parametrize("raw", INVALID.values(), ids=INVALID.keys())
async def test_invalid_answers(
    provider: Provider, token: str, gateway: Gateway, raw: bytes
) -> None:
    """What could be read in two ways is never shown: a 502 in the dialect, or a broken transfer."""

    async def answer(it: Exchange) -> None:
        await it.send(raw)
        await it.wait_until_left()

    provider.script = answer
    answer_seen = parse(await exchange(gateway.proxy, request(token)))
    if answer_seen.status == 502:
        assert json.loads(answer_seen.body)["error"]["code"] == "upstream_invalid"
    else:
        assert not answer_seen.is_whole
    assert len(provider.received) == 1


async def test_interim_answers_are_passed_over(
    provider: Provider, token: str, gateway: Gateway
) -> None:
    """100 and 103 of a provider are not the answer."""

    async def answer(it: Exchange) -> None:
        await it.send(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
        )
        await it.reply(b"{}")

    provider.script = answer
    seen = parse(await exchange(gateway.proxy, request(token)))
    assert (seen.status, seen.body, seen.values(b"link")) == (200, b"{}", [])


WHOLE = {
    "length": b"HTTP/1.1 200 OK\r\ncontent-type: a/b\r\ncontent-length: 5\r\n\r\nhello",
    "chunked": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n3;x=y\r\nabc\r\n0\r\n\r\n"
    ),
    "stream": (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        b'd\r\ndata: {}\n\ndat\r\n8\r\na: {"a":\r\n0\r\n\r\n'
    ),
}


@pytest.mark.parametrize("whole", WHOLE.values(), ids=WHOLE.keys())
async def test_an_answer_cut_at_any_byte_is_never_whole(
    provider: Provider, token: str, gateway: Gateway, whole: bytes
) -> None:
    """Wherever the provider hangs up early, the caller sees a 502 or a broken transfer."""
    kept = 0

    async def cut(it: Exchange) -> None:
        await it.send(whole[:kept])
        it.writer.close()

    provider.script = cut
    for kept in range(len(whole) + 1):
        seen = parse(await exchange(gateway.proxy, request(token)))
        if kept == len(whole):
            assert (seen.status, seen.is_whole) == (200, True)
        else:
            assert seen.status == 502 or not seen.is_whole, whole[:kept]


async def test_a_body_that_ends_with_the_connection(
    provider: Provider, token: str, gateway: Gateway
) -> None:
    """A provider without any framing is understood, and its answer reaches the caller framed."""

    async def answer(it: Exchange) -> None:
        await it.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nall there is")
        it.writer.close()

    provider.script = answer
    seen = parse(await exchange(gateway.proxy, request(token)))
    assert (seen.body, seen.is_whole) == (b"all there is", True)


async def test_an_answer_before_the_upload_ended(
    provider: Provider, token: str, gateway: Gateway
) -> None:
    """A provider that refuses an upload early is heard at once; neither connection is used again."""

    async def early(it: Exchange) -> None:
        await it.reply(b'{"error":{}}', status=b"413 Content Too Large")

    provider.reads_body = False
    provider.script = early
    raw = request(
        token, FORM_HEAD + b"x" * 100, path=b"/openai/v1/files", headers=MULTIPART, closes=False
    ).replace(b"Content-Length: ", b"Content-Length: 9")
    seen = parse(await exchange(gateway.proxy, raw))
    assert (seen.status, seen.body) == (413, b'{"error":{}}')


def peak_kib(gateway: Gateway) -> int:
    """Return the largest amount of memory that any worker ever had resident."""
    peaks = []
    for pid in gateway.children():
        if b"gateway.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
            status = Path(f"/proc/{pid}/status").read_text()
            peaks.append(int(status.partition("VmHWM:")[2].split()[0]))
    return max(peaks)


class Stall:
    """Tells when a writer could not go on for a moment: the other side takes no more."""

    def __init__(self) -> None:
        self.seen = asyncio.Event()

    async def drain(self, writer: asyncio.StreamWriter) -> None:
        """Wait for room; note it when that takes long."""
        waiting = asyncio.ensure_future(writer.drain())
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        if not done:
            self.seen.set()
        await waiting


async def test_a_large_upload_is_never_held(
    provider: Provider, token: str, gateway: Gateway, wire: Wire
) -> None:
    """64 MiB to a provider that does not read wait in the caller, not in the gateway."""
    size, piece, stall = 64 * 2**20, b"x" * 2**18, Stall()
    received, end = 0, b"\r\n--b--\r\n"
    whole = len(FORM_HEAD) + size + len(end)

    async def read_late(it: Exchange) -> None:
        nonlocal received
        await stall.seen.wait()
        while received < whole:
            received += len(await it.reader.read(2**18))
        await it.reply(b"{}")

    provider.reads_body = False
    provider.script = read_late
    reader, writer = wire
    head = request(token, b"", path=b"/openai/v1/files", headers=MULTIPART, closes=False)
    length = b"Content-Length: %d\r\n" % whole
    before = peak_kib(gateway)
    writer.write(head.replace(b"Content-Length: 0\r\n", length) + FORM_HEAD)
    for _ in range(size // len(piece)):
        writer.write(piece)
        await stall.drain(writer)
    writer.write(end)
    assert (await read_answer(reader))[1] == b"{}"
    assert received == whole
    assert peak_kib(gateway) - before < 24 * 1024


async def test_a_slow_caller_slows_the_provider(
    provider: Provider, token: str, gateway: Gateway, wire: Wire
) -> None:
    """64 MiB to a caller that does not read wait in the provider, not in the gateway."""
    size, piece, stall = 64 * 2**20, b"y" * 2**18, Stall()

    async def pour(it: Exchange) -> None:
        await it.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        for _ in range(size // len(piece)):
            it.writer.write(piece)
            await stall.drain(it.writer)

    provider.script = pour
    reader, writer = wire
    before = peak_kib(gateway)
    writer.write(request(token, closes=False))
    await stall.seen.wait()
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"content-length: %d" % size in head
    left = size
    while left:
        left -= len(await reader.read(2**18))
    assert peak_kib(gateway) - before < 24 * 1024


async def test_events_arrive_one_by_one(provider: Provider, token: str, wire: Wire) -> None:
    """Each event reaches the caller before the provider sends the next: nothing is buffered."""
    heard = asyncio.Event()

    async def one_by_one(it: Exchange) -> None:
        await it.begin_stream()
        for number in range(20):
            await it.chunk(b'data: {"choices":[],"n":%d}\n\n' % number)
            await heard.wait()
            heard.clear()
        await it.chunk(b"")

    provider.script = one_by_one
    reader, writer = wire
    body = b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}'
    writer.write(request(token, body, closes=False))
    await reader.readuntil(b"\r\n\r\n")
    for number in range(20):
        event = b'data: {"choices":[],"n":%d}\n\n' % number
        assert await reader.readuntil(event + b"\r\n") == b"%x\r\n" % len(event) + event + b"\r\n"
        heard.set()
    assert await reader.readexactly(5) == b"0\r\n\r\n"


async def test_a_body_beyond_the_limit_is_refused(
    provider: Provider, start_gateway: Callable[..., Gateway]
) -> None:
    """A JSON body over `buffered_body` gets 413, announced or not, and reaches nobody."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    extra = {"limits": {"buffered_body": "10KiB", "streamed_body": "20KiB"}}
    gateway = await asyncio.to_thread(start_gateway, {"openai": upstream}, extra=extra)
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    token = session["token"]
    body = b'{"model":"m","x":"%b"}' % (b"x" * 11_000)
    seen = parse(await exchange(gateway.proxy, request(token, body)))
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (413, "body_too_large")
    chunked = request(token, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    seen = parse(
        await exchange(gateway.proxy, chunked + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
    )
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (413, "body_too_large")
    upload = FORM_HEAD + b"x" * 21_000 + b"\r\n--b--\r\n"
    raw = request(token, upload, path=b"/openai/v1/files", headers=MULTIPART)
    assert parse(await exchange(gateway.proxy, raw)).status == 413
    assert provider.received == []
