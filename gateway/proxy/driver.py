"""Carries one call: serves what the story asks for with bytes, connections and time.

The story (`gateway.execution`) decides; this file knows how a body is gathered, a provider reached
and an answer passed back, and says what became of it. Every way an exchange can end leads through
`_conclude`, once.
"""

from typing import TYPE_CHECKING, Any, assert_never

from gateway.audit.journal import AuditUnavailable
from gateway.errors import Fault, Refused
from gateway.problems import render
from gateway.proxy.upstream import Upstream
from gateway.response import Header
from gateway.story import (
    Admit,
    Answer,
    AwaitKeys,
    AwaitSession,
    Break,
    Command,
    Exchange,
    Finish,
    Forward,
    PeekBody,
    ReadBody,
    Record,
    RequestHead,
    Story,
)

if TYPE_CHECKING:
    from gateway.proxy.downstream import Downstream
    from gateway.proxy.server import Proxy

_LAST_CHUNK = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    """Return one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Driver:
    """One call on one caller's connection."""

    def __init__(self, proxy: "Proxy", downstream: "Downstream") -> None:
        self._proxy = proxy
        self._downstream = downstream
        self._story: Story | None = None
        self._command: Command | None = None
        self._began_at = 0.0
        self._is_head = False
        self._queued: bytes | bytearray = b""
        self._peeked_bytes = 0
        self._body_complete = False
        self._is_gone = False
        self._position = ""
        # the exchange
        self._forward: Forward | None = None
        self._upstream: Upstream | None = None
        self._exchange = Exchange()
        self._sent_at = 0.0
        self._heard_at = 0.0
        self._head_sent = False
        self._body_framed_as_chunks = False
        self._is_request_chunked = False
        self._has_response_body = True
        self._last_words = b""
        self._held = b""

    # --- the story ---

    def start(self, head: RequestHead, body: bytes, *, is_complete: bool) -> None:
        """Begin the story with what has already come of the body."""
        self._began_at = self._proxy.now()
        self._is_head = head.method == b"HEAD"
        self._is_request_chunked = head.content_length < 0
        self._body_complete = is_complete
        self._queue(body)
        self._story = self._proxy.execution.run(head)
        self._proxy.calls_started += 1
        self._resume(None)

    def _resume(self, value: Any) -> None:
        if self._story is None:
            return
        try:
            command = self._story.send(value)
        except StopIteration:
            return
        self._serve(command)

    def _throw(self, error: Exception) -> None:
        if self._story is None:
            return
        try:
            command = self._story.throw(error)
        except StopIteration:
            return
        self._serve(command)

    def _serve(self, command: Command) -> None:
        self._command = command
        match command:
            case Record():
                self._record(command)
            case ReadBody() | PeekBody():
                self._read_body()
            case Forward():
                self._begin_exchange(command)
            case Finish():
                self._finish()
            case Answer():
                self._answer(command)
            case Admit():
                command.begin(self._resume)
            case AwaitKeys():
                self._proxy.await_keys(command.issuer, command.kid, self._on_arrival)
            case AwaitSession():
                self._proxy.await_session(command.session_id, self._on_arrival)
            case Break():
                self._close_story()
                self._downstream.break_off(self._last_words)
            case _:
                assert_never(command)

    def _close_story(self) -> None:
        self._story = None
        self._take_queue()

    # --- records, keys and sessions ---

    def _record(self, command: Record) -> None:
        try:
            self._position = self._proxy.recorder.append(command.event, self._on_durable)
        except AuditUnavailable as error:
            self._throw(error)

    def _on_durable(self, error: AuditUnavailable | None) -> None:
        if error is not None:
            self._throw(error)
        else:
            self._resume(self._position)

    def _on_arrival(self, refusal: Refused | None) -> None:
        if refusal is not None:
            self._throw(refusal)
        else:
            self._resume(None)

    # --- the request's body ---

    def on_body(self, data: bytes, *, is_complete: bool) -> None:
        """Take in more of the body."""
        self._body_complete = is_complete
        if self._forward is not None and self._upstream is not None:
            if self._forward.body is None:
                self._stream_body(data)
            return
        self._queue(data)
        self._read_body()

    def on_bad_body(self, refusal: Refused) -> None:
        """Stop: the body's framing broke, so nothing after it can be trusted."""
        if isinstance(self._command, ReadBody | PeekBody):
            self._throw(refusal)
        elif self._forward is not None:
            self._conclude("client_abort", Fault.DOWNSTREAM, refusal)
        else:
            self._is_gone = True

    def _queue(self, data: bytes) -> None:
        """Hold more of the body: the first read as it is, several in one buffer that grows."""
        if not self._queued:
            self._queued = data
        else:
            if isinstance(self._queued, bytes):
                self._queued = bytearray(self._queued)
            self._queued += data
        self._proxy.buffered_bytes += len(data)

    def _take_queue(self) -> bytes:
        """Return what is held, and hold it no longer."""
        self._proxy.buffered_bytes -= len(self._queued)
        taken, self._queued = bytes(self._queued), b""
        return taken

    def _read_body(self) -> None:
        command = self._command
        if self._is_gone:
            self._throw(Refused("client_disconnected", "The caller left."))
        elif isinstance(command, ReadBody):
            if len(self._queued) > command.limit:
                self._throw(Refused("body_too_large", "The body is larger than may be held."))
            elif self._holds_too_much():
                self._throw(Refused("overloaded", "Too much is held.", retry_after_seconds=1))
            elif self._body_complete:
                self._queued = bytes(self._queued)  # counted as held until the exchange has it
                self._resume(self._queued)
            else:
                self._ask_for_more()
        elif isinstance(command, PeekBody):
            self._peek_body(command)
        elif len(self._queued) > self._proxy.limits.ahead_bytes:
            self._downstream.pause_reading()

    def _peek_body(self, command: PeekBody) -> None:
        fresh = bytes(memoryview(self._queued)[self._peeked_bytes :])
        self._peeked_bytes += len(fresh)
        try:
            is_enough = command.is_enough(fresh) or self._body_complete
        except Refused as refusal:
            self._throw(refusal)
            return
        if len(self._queued) > command.limit and not is_enough:
            self._throw(command.too_much)
        elif self._holds_too_much():
            self._throw(Refused("overloaded", "Too much is held.", retry_after_seconds=1))
        elif is_enough:
            self._command = None
            self._resume(None)
        else:
            self._ask_for_more()

    def _holds_too_much(self) -> bool:
        return self._proxy.buffered_bytes > self._proxy.limits.buffered_total_bytes

    def _ask_for_more(self) -> None:
        """Let the caller send on: it may have been asked to wait before anybody wanted a body."""
        self._downstream.send_continue()
        self._downstream.resume_reading()

    # --- the exchange: out ---

    def _begin_exchange(self, forward: Forward) -> None:
        self._forward = forward
        self._heard_at = self._sent_at = self._proxy.now()
        if self._is_gone:
            self._conclude("client_abort", Fault.DOWNSTREAM)
            return
        self._proxy.enter(forward.session_id, self)
        try:
            self._proxy.pool.acquire(forward.provider, self._on_connection)
        except Refused as refusal:
            self._conclude("gateway_error", Fault.GATEWAY, refusal)

    def _on_connection(self, upstream: Upstream | Refused) -> None:
        forward = self._forward
        if forward is None or self._exchange_is_over:
            if isinstance(upstream, Upstream):
                self._proxy.pool.give_back(upstream)
            return
        if isinstance(upstream, Refused):
            self._conclude("upstream_error", Fault.UPSTREAM, upstream)
            return
        self._upstream = upstream
        try:
            slot = forward.compose()
        except Refused as refusal:
            self._upstream = None
            self._proxy.pool.give_back(upstream)
            self._conclude("gateway_error", Fault.GATEWAY, refusal)
            return
        try:
            upstream.start(self, slot, forward.body or b"", is_head=forward.is_head)
        except ConnectionError:
            self._lose_upstream(Refused("upstream_unreachable", "The provider hung up."))
            return
        self._heard_at = self._sent_at = self._proxy.now()
        if forward.body is not None:
            self._exchange.request_bytes = len(forward.body)
            self._take_queue()
        else:
            begun = self._take_queue()
            self._ask_for_more()
            self._stream_body(begun)

    def _stream_body(self, data: bytes) -> None:
        forward, upstream = self._forward, self._upstream
        if forward is None or upstream is None:
            return
        self._exchange.request_bytes += len(data)
        if forward.inspect is not None:
            try:
                forward.inspect.feed(data)
                if self._body_complete:
                    forward.inspect.finish()
            except Refused as refusal:
                self._conclude("gateway_error", Fault.DOWNSTREAM, refusal)
                return
        if data:
            upstream.send(chunk(data) if self._is_request_chunked else data)
        limit = self._proxy.limits.streamed_body_bytes
        if limit and self._exchange.request_bytes > limit:
            too_large = Refused("body_too_large", "The body is larger than may be streamed.")
            self._conclude("gateway_error", Fault.DOWNSTREAM, too_large)
        elif self._body_complete and self._is_request_chunked:
            upstream.send(_LAST_CHUNK)

    def on_upstream_pause(self) -> None:
        """Stop reading the caller's body while the provider is slow."""
        self._downstream.pause_reading()

    def on_upstream_resume(self) -> None:
        """Read on."""
        self._downstream.resume_reading()

    # --- the exchange: back ---

    def on_response_head(self, status: int, headers: list[Header], content_length: int) -> None:
        """Pass the head on; it leaves with the first of the body, in one write."""
        forward = self._forward
        if forward is None:
            return
        now = self._heard_at = self._proxy.now()
        self._exchange.first_byte_seconds = now - self._sent_at
        self._exchange.upstream_status = self._exchange.status = status
        try:
            fields = forward.response.begin(status, headers)
        except Refused as refusal:
            if refusal.code.startswith("upstream_"):
                self._lose_upstream(refusal)
            else:
                self._conclude("gateway_error", Fault.GATEWAY, refusal)
            return
        lines = [b"HTTP/1.1 %d %b" % (status, _REASONS.get(status, b""))]
        lines += [b"%b: %b" % field for field in fields]
        self._has_response_body = not (forward.is_head or status in {204, 304})
        if not self._has_response_body:
            if content_length >= 0 and forward.is_head:
                lines.append(b"content-length: %d" % content_length)
        elif content_length >= 0 and not forward.response.changes_length:
            lines.append(b"content-length: %d" % content_length)
        else:
            self._body_framed_as_chunks = True
            lines.append(b"transfer-encoding: chunked")
        if not self._downstream.keeps_alive:
            lines.append(b"connection: close")
        lines.append(b"\r\n")
        self._held = b"\r\n".join(lines)

    def on_response_data(self, data: bytes, *, is_complete: bool) -> None:
        """Pass on what one read brought; what completes the answer waits for its record."""
        forward = self._forward
        if forward is None or self._exchange_is_over:
            return
        self._heard_at = self._proxy.now()
        try:
            body = forward.response.feed(data) if data else b""
        except Refused as refusal:
            self._conclude("gateway_error", Fault.GATEWAY, refusal)
            return
        if is_complete:
            body += forward.response.end()
        self._exchange.response_bytes += len(body)
        framed = chunk(body) if body and self._body_framed_as_chunks else body
        if not self._has_response_body:
            framed = b""
        if not is_complete:
            self._send(framed)
            return
        if self._body_framed_as_chunks:
            framed += _LAST_CHUNK
        self._held += framed
        self._release_upstream()
        self._conclude("complete", "")

    def _send(self, framed: bytes) -> None:
        if self._held:
            framed = self._held + framed
            self._held = b""
        if framed:
            self._head_sent = True
            self._downstream.write(framed)

    def on_upstream_lost(self, *, is_invalid: bool) -> None:
        """Break the answer off, or answer ourselves if nothing has been sent."""
        code = "upstream_invalid" if is_invalid else "upstream_unreachable"
        self._lose_upstream(Refused(code, "The provider's answer broke off."))

    def _lose_upstream(self, refusal: Refused) -> None:
        self._release_upstream()
        self._conclude("upstream_abort", Fault.UPSTREAM, refusal)

    def on_downstream_pause(self) -> None:
        """Stop reading the provider while the caller is slow."""
        if self._upstream is not None:
            self._upstream.pause_reading()

    def on_downstream_resume(self) -> None:
        """Read on."""
        if self._upstream is not None:
            self._upstream.resume_reading()

    # --- the ends ---

    @property
    def _exchange_is_over(self) -> bool:
        return not isinstance(self._command, Forward)

    def _conclude(self, outcome: str, fault: str, refusal: Refused | None = None) -> None:
        """End the exchange, however it ended; the story goes on to settle and record."""
        forward = self._forward
        if forward is None or self._exchange_is_over:
            return
        self._command = None
        self._proxy.leave(forward.session_id, self)
        if self._upstream is not None:
            upstream, self._upstream = self._upstream, None
            upstream.abort()
            self._proxy.pool.give_back(upstream)
        exchange = self._exchange
        exchange.outcome, exchange.fault = outcome, fault
        if not self._head_sent and outcome != "complete":
            self._held = b""
            exchange.status = 0
            exchange.refusal = refusal
        self._resume(exchange)

    def _release_upstream(self) -> None:
        if self._upstream is not None:
            upstream, self._upstream = self._upstream, None
            if not self._body_complete:
                upstream.abort()  # it answered before it had heard all; the rest has no taker
            self._proxy.pool.give_back(upstream)

    def _finish(self) -> None:
        self._close_story()
        keeps_alive = self._downstream.keeps_alive
        if self._held:
            self._downstream.write(self._held)
            self._held = b""
        self._downstream.finish(keeps_alive=keeps_alive)

    def _answer(self, command: Answer) -> None:
        self._close_story()
        keeps_alive = self._downstream.keeps_alive
        answer = render(command.problem, command.dialect, command.headers, keep_alive=keeps_alive)
        if self._is_head:  # its length stays, its body would be taken for the next answer
            answer = answer[: answer.index(b"\r\n\r\n") + 4]
        self._downstream.write(answer)
        self._downstream.finish(keeps_alive=keeps_alive)

    def on_downstream_lost(self) -> None:
        """Cancel upstream at once; the story still records how it ended."""
        self._is_gone = True
        if isinstance(self._command, ReadBody | PeekBody):
            self._read_body()
        else:
            self._conclude("client_abort", Fault.DOWNSTREAM)

    def on_downstream_stalled(self) -> None:
        """Break off: the caller has not read for too long."""
        self._conclude("timeout", Fault.DOWNSTREAM)

    @property
    def provider(self) -> str:
        """The provider that the exchange is with; nothing where there is none."""
        return self._forward.provider.name if self._forward is not None else ""

    @property
    def key(self) -> str:
        """The name of the key that the exchange is made with; nothing where there is none."""
        return self._forward.lease.fingerprint if self._forward is not None else ""

    @property
    def has_lost_its_key(self) -> bool:
        """Whether the exchange goes on with a key that may be used no more."""
        return self._forward is not None and self._forward.lease.is_over

    def cut(self, code: str, message: str) -> None:
        """End the exchange from our side; `code` says why, in the record too."""
        if self._forward is None or self._exchange_is_over:
            return
        if self._head_sent:
            event = self._forward.response.interrupt(code, message)
            if event:
                self._last_words = chunk(event) if self._body_framed_as_chunks else event
        outcome = "shutdown" if code == "draining" else code
        self._conclude(outcome, Fault.GATEWAY, Refused(code, message))

    def check(self, now: float, downstream_idle: float) -> None:
        """End what has waited too long."""
        limits = self._proxy.limits
        total = limits.total_seconds
        is_too_long = bool(total) and now - self._began_at > total
        if isinstance(self._command, ReadBody | PeekBody):
            if downstream_idle > limits.body_seconds or is_too_long:
                self._throw(Refused("request_timeout", "The body did not arrive in time."))
        elif self._forward is not None and not self._exchange_is_over:
            limit = limits.idle_seconds if self._head_sent else limits.first_byte_seconds
            # A caller that is still sending, or not reading, keeps its provider waiting rightly.
            waited = min(now - self._heard_at, downstream_idle)
            if waited > limit or is_too_long:
                refusal = Refused("upstream_timeout", "The provider did not answer in time.")
                self._conclude("timeout", Fault.UPSTREAM, refusal)


_REASONS = {
    200: b"OK", 201: b"Created", 202: b"Accepted", 204: b"No Content", 304: b"Not Modified",
    400: b"Bad Request", 401: b"Unauthorized", 402: b"Payment Required", 403: b"Forbidden",
    404: b"Not Found", 408: b"Request Timeout", 409: b"Conflict", 413: b"Content Too Large",
    422: b"Unprocessable Content", 429: b"Too Many Requests", 500: b"Internal Server Error",
    502: b"Bad Gateway", 503: b"Service Unavailable", 504: b"Gateway Timeout", 529: b"Overloaded",
}  # fmt: skip
"""Reason phrases mean nothing (RFC 9112 4), but people read them."""
