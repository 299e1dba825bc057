"""One caller's connection: strict request framing, one call at a time, then the next.

Whatever could be understood in two ways ends the connection with a 4xx and reaches no provider:
llhttp refuses most of it (both lengths, unknown codings, folded lines, bare line feeds, bad chunk
sizes), and this file the rest (HTTP/1.0, two hosts, a second request before the first was
answered). A connection is never used again after such a doubt.
"""

import asyncio
from typing import TYPE_CHECKING, cast

import httptools

from gateway.errors import Refused
from gateway.problems import problem_from, render
from gateway.proxy.driver import Driver
from gateway.response import Header
from gateway.story import RequestHead

if TYPE_CHECKING:
    from gateway.proxy.server import Proxy

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

LAST_WORDS_SECONDS = 0.25
"""How long a connection that ends badly stays open for what was said last."""

MAX_LINGER_BYTES = 1024 * 1024
"""How much of a refused request's body is read and dropped, so that the refusal can be read."""


class Downstream(asyncio.Protocol):
    """A caller's connection."""

    def __init__(self, proxy: "Proxy") -> None:
        self._proxy = proxy
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._driver: Driver | None = None
        self._client_address = ""
        self._is_closing = False
        self._lingered = 0
        self._lingering_since = 0.0
        self._is_reading_paused = False
        self._write_paused_at = 0.0
        self._last_activity = 0.0
        self._fd = -1
        self._expect_next()

    def _expect_next(self) -> None:
        self._method = b""
        self._target = b""
        self._headers: list[Header] = []
        self._body: list[bytes] = []
        self._read_bytes = 0
        self._field_bytes = 0
        self._begun_at = 0.0
        self._hosts = 0
        self._content_length = 0
        self._is_chunked = False
        self._expects_continue = False
        self._has_begun = False
        self._head_parsed = False
        self._message_complete = False
        self._body_told = False
        self._extra = False
        self._is_upgrade = False
        self._asks_for_websocket = False
        self._asks_to_keep_alive = False

    # --- for the driver ---

    @property
    def keeps_alive(self) -> bool:
        """Whether the caller may send another request after this answer."""
        return (
            self._message_complete
            and not self._extra
            and not self._is_upgrade
            and not self._proxy.is_draining
            and self._asks_to_keep_alive
        )

    def write(self, data: bytes) -> None:
        """Queue bytes for the caller."""
        if self._transport is not None:
            self._transport.write(data)

    def send_continue(self) -> None:
        """Ask for the body, where the caller waits to be asked (RFC 9110 10.1.1)."""
        if self._expects_continue and not self._message_complete:
            self._expects_continue = False
            self.write(CONTINUE)

    def pause_reading(self) -> None:
        """Let the caller wait until the provider has read; notice if it leaves meanwhile."""
        if self._transport is not None and not self._is_reading_paused:
            self._is_reading_paused = True
            self._transport.pause_reading()
            self._proxy.hangups.watch(self._fd, self._on_gone)

    def resume_reading(self) -> None:
        """Read from the caller again."""
        if self._is_reading_paused:
            self._is_reading_paused = False
            self._proxy.hangups.forget(self._fd)
            if self._transport is not None and not self._transport.is_closing():
                self._last_activity = self._proxy.now()
                self._transport.resume_reading()

    def _on_gone(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def finish(self, *, keeps_alive: bool) -> None:
        """End the call: go on with the next request, or close once the answer has left."""
        self._driver = None
        self._last_activity = self._proxy.now()
        if self._transport is None:
            return
        if keeps_alive:
            self._expect_next()
            self.resume_reading()
        elif self._message_complete and not self._extra:
            self._transport.close()
        else:
            self._linger()

    def break_off(self, last_words: bytes = b"") -> None:
        """End the answer so that it cannot be taken for a whole one."""
        self._driver = None
        if self._transport is None:
            return
        if last_words:
            # An SDK that reads them together with the end of the connection sees but the broken end.
            self._transport.write(last_words)
            self._end_soon()
        else:
            self._transport.abort()

    def _linger(self) -> None:
        """Read and drop for a moment: closing over unread bytes would reset the answer away."""
        self._is_closing = True
        self._lingering_since = self._proxy.now()
        self.resume_reading()
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection in, unless there are too many."""
        # uvloop's transports have the interface without being subclasses.
        self._transport = cast("asyncio.Transport", transport)
        peer = transport.get_extra_info("peername")
        self._client_address = peer[0] if peer else ""
        self._fd = transport.get_extra_info("socket").fileno()
        self._last_activity = self._proxy.now()
        if not self._proxy.admit(self):
            if self._proxy.is_flooded:
                self._transport.abort()
            else:
                self._turn_away()

    def _turn_away(self) -> None:
        """Say that this connection is one too many, and close it whatever it sends."""
        refusal = Refused("overloaded", "Too many connections.", retry_after_seconds=1)
        self._proxy.metrics.observe_denied(refusal.code)
        self.write(render(problem_from(refusal), None, (), keep_alive=False))
        self._end_soon()

    def _end_soon(self) -> None:
        """Give what was written the time to arrive: closing over unread bytes would reset it away."""
        self._is_closing = True
        self._lingering_since = self._proxy.now()
        if self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(LAST_WORDS_SECONDS, self._transport.abort)

    def connection_lost(self, _exc: Exception | None) -> None:
        """Cancel what runs for this caller."""
        if self._is_reading_paused:
            self._proxy.hangups.forget(self._fd)
        self._transport = None
        self._proxy.forget(self)
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.on_downstream_lost()

    def eof_received(self) -> bool:
        """Close: a caller that hangs up has lost interest in the answer."""
        return False

    def pause_writing(self) -> None:
        """Pass the caller's back-pressure on."""
        self._write_paused_at = self._proxy.now()
        if self._driver is not None:
            self._driver.on_downstream_pause()

    def resume_writing(self) -> None:
        """Pass its end on."""
        self._write_paused_at = 0.0
        self._last_activity = self._proxy.now()
        if self._driver is not None:
            self._driver.on_downstream_resume()

    def data_received(self, data: bytes) -> None:
        """Parse one read, then act on what it completed."""
        self._last_activity = self._proxy.now()
        if self._is_closing:
            self._lingered += len(data)
            if self._lingered > MAX_LINGER_BYTES and self._transport is not None:
                self._transport.abort()
            return
        if self._message_complete:
            self._extra = True  # a second request before the first was answered
            return
        if not self._has_begun:
            self._has_begun = True
            self._begun_at = self._last_activity
        refusal = self._parse(data)
        if refusal is not None:
            self._on_bad_framing(refusal)
        elif self._head_parsed:
            self._on_progress()
        else:
            self._read_bytes += len(data)
            if self._read_bytes > self._proxy.limits.head_bytes:
                self._on_bad_framing(Refused("head_too_large", "The request head is too large."))

    def _parse(self, data: bytes) -> Refused | None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
            if not self._asks_for_websocket and self._method != b"CONNECT":
                return self._parse_without_upgrade(rest)
            self._is_upgrade = True
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            return cause if isinstance(cause, Refused) else Refused("invalid_request", "")
        except httptools.HttpParserError:
            if not self._message_complete:
                return Refused("invalid_request", "The request is not well-formed HTTP/1.1.")
            self._extra = True
        return None

    def _parse_without_upgrade(self, rest: bytes) -> Refused | None:
        """Read the request as if no other protocol had been offered (RFC 9110 7.8 allows it).

        Java's client offers h2c with each request over plain HTTP. The parser takes the body for the
        other protocol's, so the head is read once more without the offer.
        """
        lines = [b"%b %b HTTP/1.1" % (self._method, self._target)]
        for name, value in self._headers:
            if name == b"connection" and b"close" in value.lower():
                lines.append(b"connection: close")
            elif name not in {b"connection", b"upgrade", b"http2-settings"}:
                lines.append(b"%b: %b" % (name, value))
        begun_at = self._begun_at
        self._parser = httptools.HttpRequestParser(self)
        self._expect_next()
        self._has_begun, self._begun_at = True, begun_at
        return self._parse(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    def _on_bad_framing(self, refusal: Refused) -> None:
        if self._driver is not None:
            self._driver.on_bad_body(refusal)
        else:
            self._refuse(refusal)

    def _on_progress(self) -> None:
        if self._driver is None and not self._body_told:
            fixed = self._proxy.fixed_answer(self._method, self._target)
            if fixed is not None and self._message_complete:
                self.write(fixed)
                self.finish(keeps_alive=self.keeps_alive)
                return
            self._body_told = self._message_complete
            self._driver = Driver(self._proxy, self)
            self._driver.start(
                self._request_head(), self._take_body(), is_complete=self._message_complete
            )
            return
        driver = self._driver
        if driver is not None and not self._body_told:
            self._body_told = self._message_complete
            driver.on_body(self._take_body(), is_complete=self._message_complete)

    def _take_body(self) -> bytes:
        """Return what this read brought of the body: one piece, however many chunks it was."""
        pieces, self._body = self._body, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _request_head(self) -> RequestHead:
        return RequestHead(
            method=self._method,
            target=self._target,
            headers=self._headers,
            content_length=-1 if self._is_chunked else self._content_length,
            client_address=self._client_address,
            is_upgrade=self._is_upgrade,
        )

    def _refuse(self, refusal: Refused) -> None:
        """Answer what never became a call, and close."""
        self._proxy.metrics.observe_denied(refusal.code)
        self.write(render(problem_from(refusal), None, (), keep_alive=False))
        self._linger()

    # --- time ---

    def check(self, now: float) -> None:
        """End what has waited too long; called about once a second."""
        limits = self._proxy.limits
        idle = now - self._last_activity
        if self._transport is None:
            return
        # A caller that does not read holds a provider's connection.
        paused_at, driver = self._write_paused_at, self._driver
        has_stalled = bool(paused_at) and now - paused_at > limits.idle_seconds
        if self._is_closing:
            if now - self._lingering_since > limits.linger_seconds:
                self._transport.abort()
        elif driver is not None and has_stalled:
            driver.on_downstream_stalled()
        elif driver is not None:
            # While the caller keeps the provider waiting, the provider's silence is none.
            driver.check(now, 0.0 if paused_at else idle)
        elif has_stalled:
            self._transport.abort()
        elif self._has_begun:
            # From its first byte, however steadily the rest drips in.
            if now - self._begun_at > limits.head_seconds:
                self._refuse(Refused("request_timeout", "The request head did not arrive in time."))
        elif idle > limits.keep_alive_seconds:
            self._transport.close()

    def drain(self) -> None:
        """Close now if no call is under way."""
        if self._driver is None and self._transport is not None and not self._is_closing:
            self._transport.close()

    def cut(self, code: str, message: str) -> None:
        """End the call that is under way, telling why."""
        if self._driver is not None:
            self._driver.cut(code, message)

    # --- httptools callbacks: note, never act ---

    def on_message_begin(self) -> None:
        """Notice a request behind the first."""
        if self._message_complete:
            self._extra = True

    def on_url(self, url: bytes) -> None:
        """Collect the raw request target."""
        if not self._extra:
            self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a field; trailers are validated and dropped."""
        if self._extra:
            return
        self._field_bytes += len(name) + len(value) + 4
        if self._field_bytes > self._proxy.limits.head_bytes:
            raise Refused("head_too_large", "The request head is too large.")
        if self._head_parsed:
            return
        name = name.lower()
        self._headers.append((name, value))
        if len(self._headers) > self._proxy.limits.headers:
            raise Refused("head_too_large", "The request has too many header fields.")
        if name == b"host":
            self._hosts += 1
        elif name == b"content-length":
            self._content_length = int(value)
        elif name == b"transfer-encoding":
            if value.strip().lower() != b"chunked":
                raise Refused("invalid_request", "Only the chunked transfer coding is understood.")
            self._is_chunked = True
        elif name == b"upgrade":
            self._asks_for_websocket = b"websocket" in value.lower()
        elif name == b"expect":
            if value.strip().lower() != b"100-continue":
                raise Refused("expectation_failed", "Only 100-continue is understood.")
            self._expects_continue = True

    def on_headers_complete(self) -> None:
        """Check what the head says as a whole."""
        if self._extra:
            return
        # Noted here: once the parser has seen a second request behind this one, it tells of that.
        self._method = self._parser.get_method()
        if self._parser.get_http_version() != "1.1":
            raise Refused("http_version_not_supported", "Use HTTP/1.1.")
        if self._hosts != 1:
            raise Refused("invalid_request", "Exactly one Host is needed.")
        self._head_parsed = True
        self._asks_to_keep_alive = bool(self._parser.should_keep_alive())
        self._field_bytes = 0  # from here it counts trailers

    def on_body(self, body: bytes) -> None:
        """Collect what this read holds of the body."""
        if not self._extra:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """Note the end of the request."""
        if not self._extra:
            self._message_complete = True
