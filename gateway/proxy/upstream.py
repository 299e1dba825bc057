"""One connection to a provider: strict response framing, one exchange at a time, then reuse.

The caller's secret passes through here as a memoryview of a slot and nowhere else. After any doubt
about framing (a parser error, bytes nobody asked for, an answer that ended early) the connection
is not used again.
"""

import asyncio
import math
import os
import select
import ssl
from typing import Protocol, cast

import httptools

from gateway.providers.provider import Provider
from keys.region import Slot

Header = tuple[bytes, bytes]

MAX_RESPONSE_HEAD_BYTES = 64 * 1024
"""Twice what the most talkative provider was seen to send; a hostile one must not fill memory."""

_SWITCHING_PROTOCOLS = 101


class Listener(Protocol):
    """What an exchange wants to hear from its upstream connection."""

    def on_response_head(self, status: int, headers: list[Header], content_length: int) -> None:
        """Hear the head; `content_length` is -1 where the length is not declared."""

    def on_response_data(self, data: bytes, *, is_complete: bool) -> None:
        """Hear body bytes as one read delivered them; the last call says that it was the last."""

    def on_upstream_lost(self, *, is_invalid: bool) -> None:
        """Hear that the answer will not be completed."""

    def on_upstream_pause(self) -> None:
        """Hear that the provider takes no more body for now."""

    def on_upstream_resume(self) -> None:
        """Hear that the provider takes body again."""


class Upstream(asyncio.Protocol):
    """A connection to one provider."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.idle_since = 0.0
        self._listener: Listener | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._fd = -1
        self._poll: select.poll | None = None
        self._valid_until = math.inf
        self._lent: Slot | None = None
        self._is_head_request = False
        self._reset()

    def _reset(self) -> None:
        self._headers: list[Header] = []
        self._pieces: list[bytes] = []
        self._head_bytes = 0
        self._content_length = -1
        self._is_chunked = False
        self._head_parsed = False
        self._head_told = False
        self._complete = False
        self._told_complete = False
        self._extra = False

    # --- for the exchange ---

    @property
    def is_open(self) -> bool:
        """Whether another exchange may start here."""
        return self._transport is not None and not self._transport.is_closing()

    def is_fit(self, now: float) -> bool:
        """Return whether an idle connection may carry another call; `now` in seconds since epoch.

        It is open as far as we know; nothing waits to be read, neither bytes that nobody asked for
        nor the provider's farewell; the certificate that it was opened under is still valid.
        """
        return (
            self.is_open
            and now < self._valid_until
            and self._poll is not None
            and not self._poll.poll(0)
        )

    def start(self, listener: Listener, slot: Slot, body: bytes, *, is_head: bool) -> None:
        """Send one request: the head from `slot`, which is wiped as soon as it has left, and body.

        Raises:
            ConnectionError: The connection is gone; nothing was sent.
        """
        if self._transport is None:
            slot.release()
            raise ConnectionError("the upstream connection is gone")
        self._listener = listener
        self._is_head_request = is_head
        self._reset()
        head = slot.view
        if self._fd >= 0 and self._transport.get_write_buffer_size() == 0:
            # Straight from the secret slot into the kernel: no copy of the key is made, and the
            # slot is free again before the next statement.
            try:
                sent = os.writev(self._fd, [head, body]) if body else os.write(self._fd, head)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                slot.release()
                self.abort()
                raise ConnectionError("the upstream connection broke") from error
            if sent >= len(head):
                rest = body[sent - len(head) :] if body else b""
                slot.release()
                if rest:
                    self._transport.write(rest)
                return
            head = head[sent:]
        self._transport.write(head)
        self._lend(slot)
        if body:
            self._transport.write(body)

    def send(self, data: bytes) -> None:
        """Send more of the request body, already framed."""
        if self._transport is not None:
            self._transport.write(data)

    def pause_reading(self) -> None:
        """Let the provider wait until the caller has read."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read from the provider again."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        """Cancel the exchange: the provider sees the connection go at once."""
        self._listener = None
        if self._transport is not None:
            self._transport.abort()

    def detach(self) -> bool:
        """End the exchange; return whether the connection is fit for another."""
        self._listener = None
        return (
            self._told_complete
            and not self._extra
            and not self._is_head_request
            and self._lent is None
            and self.is_open
            and self._keeps_alive
        )

    # --- slots ---

    def _lend(self, slot: Slot) -> None:
        """Keep the slot until the transport needs it no longer; normally that is now."""
        self._lent = slot
        self._reclaim()

    def _reclaim(self) -> None:
        if self._lent is None:
            return
        if self._transport is None or self._transport.get_write_buffer_size() == 0:
            self._lent.release()
            self._lent = None
        else:
            asyncio.get_running_loop().call_later(0.005, self._reclaim)

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, and on plain TCP its descriptor."""
        # uvloop's transports have the interface without being subclasses.
        self._transport = cast("asyncio.Transport", transport)
        fd = transport.get_extra_info("socket").fileno()
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN | select.POLLRDHUP)
        certificate = transport.get_extra_info("peercert")
        if certificate:
            self._valid_until = ssl.cert_time_to_seconds(certificate["notAfter"])
        if transport.get_extra_info("ssl_object") is None:
            self._fd = fd

    def connection_lost(self, _exc: Exception | None) -> None:
        """Wipe what was lent, and end the exchange if one is under way."""
        self._transport = self._poll = None
        self._fd = -1
        self._reclaim()
        listener, self._listener = self._listener, None
        if listener is None:
            return
        if self._ends_with_connection and _exc is None:
            self._complete = True
            listener.on_response_data(b"", is_complete=True)
        else:
            listener.on_upstream_lost(is_invalid=False)

    def eof_received(self) -> bool:
        """Close: nobody half-closes towards a client and goes on talking."""
        return False

    @property
    def _ends_with_connection(self) -> bool:
        """Whether the body has no length but the connection's (RFC 9112 6.3, rule 8)."""
        return (
            self._head_told
            and not self._complete
            and not self._is_chunked
            and self._content_length < 0
        )

    def pause_writing(self) -> None:
        """Pass the provider's back-pressure on."""
        if self._listener is not None:
            self._listener.on_upstream_pause()

    def resume_writing(self) -> None:
        """Pass its end on."""
        if self._listener is not None:
            self._listener.on_upstream_resume()

    def data_received(self, data: bytes) -> None:
        """Parse one read and tell the exchange about it once."""
        listener = self._listener
        if listener is None:
            self.abort()  # bytes that nobody asked for
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._fail(listener)
            return
        except httptools.HttpParserError:
            if not self._complete:
                self._fail(listener)
                return
            self._extra = True
        if not self._head_told:
            if not self._head_parsed:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_RESPONSE_HEAD_BYTES:
                    self._fail(listener)
                return
            self._head_told = True
            if self._is_head_request:
                self._complete = True
            listener.on_response_head(
                self._parser.get_status_code(), self._headers, self._content_length
            )
        if self._listener is not listener:
            return
        pieces = self._pieces
        if pieces or self._complete:
            body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            pieces.clear()
            self._told_complete = self._complete
            listener.on_response_data(body, is_complete=self._complete)

    def _fail(self, listener: Listener) -> None:
        self.abort()
        listener.on_upstream_lost(is_invalid=True)

    # --- httptools callbacks ---

    def on_message_begin(self) -> None:
        """Notice a second answer: the connection is out of step."""
        if self._complete:
            self._extra = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a field of the head; trailers are validated and dropped."""
        if self._head_parsed:
            return
        self._headers.append((name, value))
        if len(name) == 17 and name.lower() == b"transfer-encoding":
            self._is_chunked = value.strip().lower() == b"chunked"
            if not self._is_chunked:
                raise ValueError("transfer coding")
        elif len(name) == 14 and name.lower() == b"content-length":
            self._content_length = int(value)

    def on_headers_complete(self) -> None:
        """End the head, unless it was an interim one (1xx)."""
        if self._extra:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self._headers = []
            if status == _SWITCHING_PROTOCOLS:
                raise ValueError("protocol switch")
            return
        self._head_parsed = True
        self._keeps_alive = self._parser.should_keep_alive()
        if status in {204, 304}:
            self._content_length = 0

    _keeps_alive = False

    def on_body(self, body: bytes) -> None:
        """Collect what this read holds of the body."""
        if not self._extra:
            self._pieces.append(body)

    def on_message_complete(self) -> None:
        """Note the end of the answer, unless it was an interim one."""
        if self._head_parsed and not self._extra:
            self._complete = True
