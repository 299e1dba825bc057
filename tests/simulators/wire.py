"""Raw HTTP/1.1 for tests: what goes over the socket is what the test wrote."""

import asyncio
import ssl
from dataclasses import dataclass


@dataclass
class Response:
    """An answer as it arrived. `is_whole` is false where it broke off."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    is_whole: bool
    raw: bytes

    def values(self, name: bytes) -> list[bytes]:
        """Return every value of a field."""
        return [value for key, value in self.headers if key.lower() == name]


async def exchange(
    port: int, *pieces: bytes, half_close: bool = False, context: ssl.SSLContext | None = None
) -> bytes:
    """Send the pieces on one connection and return all that comes until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if half_close:
            writer.write_eof()
        async with asyncio.timeout(10):
            return await reader.read(-1)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def request(
    token: str,
    body: bytes = b'{"model":"gpt-5-mini","messages":[]}',
    *,
    path: bytes = b"/openai/v1/chat/completions",
    method: bytes = b"POST",
    headers: bytes = b"content-type: application/json\r\n",
    closes: bool = True,
) -> bytes:
    """Return the bytes of a request with a length."""
    return (
        b"%b %b HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer %b\r\n%bContent-Length: %d\r\n%b\r\n%b"
        % (
            method,
            path,
            token.encode(),
            headers,
            len(body),
            b"Connection: close\r\n" if closes else b"",
            body,
        )
    )


def parse(raw: bytes) -> Response:
    """Return the final response in `raw`, interim ones skipped."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        return parse(rest)
    line, *fields = head.split(b"\r\n")
    headers = [
        (name.lower(), value.strip())
        for name, _, value in (each.partition(b":") for each in fields)
    ]
    named = dict(headers)
    status = int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else 0
    if named.get(b"transfer-encoding") == b"chunked":
        body, whole = _unchunk(rest)
    else:
        length = int(named.get(b"content-length", b"0"))
        body, whole = rest[:length], len(rest) >= length
    return Response(status, headers, body, whole and status > 0, raw)


def _unchunk(rest: bytes) -> tuple[bytes, bool]:
    body = b""
    while True:
        size, found, rest = rest.partition(b"\r\n")
        if not found:
            return body, False
        length = int(size, 16)
        if length == 0:
            return body, rest == b"\r\n"
        if len(rest) < length + 2:
            return body + rest[:length], False
        body += rest[:length]
        rest = rest[length + 2 :]
