"""A provider in the test's own event loop: it records raw requests and answers by a script.

It exists beside `aimock` because it can do what no friendly server does: cut an answer at any byte,
answer early, never answer, and show exactly which bytes arrived.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Received:
    """One request as it arrived: the head's bytes, its fields, and the decoded body."""

    line: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    is_complete: bool = False

    def values(self, name: bytes) -> list[bytes]:
        """Return every value of a field."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


@dataclass
class Exchange:
    """What an answering script may use: the request, and the wire."""

    request: Received
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self.writer.write(data)
        await self.writer.drain()

    async def reply(
        self, body: bytes, *, status: bytes = b"200 OK", content_type: bytes = b"application/json"
    ) -> None:
        """Send a whole answer with a length."""
        await self.send(
            b"HTTP/1.1 %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b"
            % (status, content_type, len(body), body)
        )

    async def begin_stream(self, content_type: bytes = b"text/event-stream") -> None:
        """Send the head of a chunked answer."""
        await self.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ntransfer-encoding: chunked\r\n\r\n"
            % content_type
        )

    async def chunk(self, data: bytes) -> None:
        """Send one chunk; an empty one ends the answer."""
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def wait_until_left(self) -> None:
        """Return when the other side has hung up."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass


Script = Callable[[Exchange], Awaitable[None]]


async def ok(exchange: Exchange) -> None:
    """Answer 200 with a small JSON body."""
    await exchange.reply(b'{"ok":true}')


@dataclass
class Provider:
    """The listening double."""

    script: Script = ok
    received: list[Received] = field(default_factory=list)
    connections: int = 0
    tls: ssl.SSLContext | None = None
    reads_body: bool = True
    port: int = 0

    async def __aenter__(self) -> Self:
        """Listen on a free loopback port."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, ssl=self.tls, limit=2**20
        )
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop, whatever is still under way."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                request = await self._read_request(reader)
                await self.script(Exchange(request, reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _read_request(self, reader: asyncio.StreamReader) -> Received:
        head = await reader.readuntil(b"\r\n\r\n")
        line, *fields = head[:-4].split(b"\r\n")
        headers = []
        for each in fields:
            name, _, value = each.partition(b":")
            headers.append((name, value.strip()))
        request = Received(line, headers)
        self.received.append(request)
        length = request.values(b"content-length")
        if not self.reads_body:
            return request
        if request.values(b"transfer-encoding"):
            while size := int(await reader.readuntil(b"\r\n"), 16):
                request.body += await reader.readexactly(size)
                assert await reader.readexactly(2) == b"\r\n"
            assert await reader.readexactly(2) == b"\r\n"
        elif length:
            request.body = await reader.readexactly(int(length[0]))
        request.is_complete = True
        return request
