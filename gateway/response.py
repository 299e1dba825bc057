"""What may happen to a provider's answer on its way back to the caller. No I/O."""

from collections.abc import Sequence

from gateway.audit.event import UsageRecord
from gateway.errors import Refused
from gateway.providers.dialect import UsageReader
from gateway.providers.echoes import Blot, EchoFilter, without_echo
from gateway.providers.headers import response_headers
from gateway.providers.routes import Route
from gateway.providers.stream_usage import UsageEventFilter
from policies.request import ModelCall

Header = tuple[bytes, bytes]

BYTES_PER_TOKEN = 4
"""Of an answer that is no stream: fewer of its bytes than of a request are anything but words."""

_BLANK_LINE = (b"\n\n", b"\n\r\n", b"\r\r")
"""How an event ends, in the three spellings that a stream may choose from."""


class ResponseGuard:
    """What may happen to a response on its way back: headers chosen, usage read, bytes untouched.

    There are two exceptions: the usage event that the gateway itself asked an OpenAI-compatible
    provider for is taken out again; and where header fields or an error quote the credential, it
    is blotted out, byte for byte.
    """

    def __init__(  # noqa: PLR0913 - what an answer is held against
        self,
        *,
        route: Route,
        asked: ModelCall,
        credential_bytes: int,
        extra_headers: list[Header],
        blot: Blot,
        removes_usage_event: bool,
    ) -> None:
        self._route = route
        self._asked = asked
        self._credential_bytes = credential_bytes
        self._extra_headers = extra_headers
        self._blot = blot
        self._reader: UsageReader | None = None
        self._filter: UsageEventFilter | EchoFilter | None = None
        self._removes_usage_event = removes_usage_event
        self._is_event_stream = False
        self._last_bytes = b"\n\n"  # before the first event is between events
        self._status = 0
        self._passed = 0

    def begin(self, status: int, headers: Sequence[Header]) -> list[Header]:
        """Return the header fields for the caller, framing left out.

        Raises:
            Refused: The answer is a redirect. Following it, here or in the caller's SDK, would
                carry a credential to a host that nobody deposited it for. Or it may quote the
                credential, and the session has closed.
        """
        if 300 <= status < 400 and status != 304:
            raise Refused("upstream_redirected", "The provider answered with a redirect.")
        content_type = b""
        for name, value in headers:
            if name.lower() == b"content-type":
                content_type = value
                break
        self._status = status
        self._is_event_stream = content_type.startswith(b"text/event-stream")
        if status < 300:
            self._reader = self._route.provider.dialect.usage_reader(
                self._route, self._asked, content_type
            )
        if status >= 400:
            self._filter = EchoFilter(self._blot, self._credential_bytes)
        elif self._removes_usage_event and self._is_event_stream and status == 200:
            self._filter = UsageEventFilter()
        passing = without_echo(response_headers(headers), self._blot, self._credential_bytes)
        return passing + self._extra_headers

    @property
    def changes_length(self) -> bool:
        """Whether the body may come out shorter than the provider's Content-Length says."""
        return isinstance(self._filter, UsageEventFilter)

    def feed(self, data: bytes) -> bytes:
        """Return what of `data` goes to the caller now.

        Raises:
            Refused: It may quote the credential, and the session has closed.
        """
        if self._reader is not None:
            self._reader.feed(data)
            self._passed += data.count(b"data:") if self._is_event_stream else len(data)
        if self._filter is not None:
            data = self._filter.feed(data)
        if self._is_event_stream:
            self._last_bytes = (self._last_bytes + data[-3:])[-3:]
        return data

    def end(self) -> bytes:
        """Return what was held back, at the end of the body."""
        return self._filter.end() if self._filter is not None else b""

    def interrupt(self, code: str, message: str) -> bytes:
        """Return the dialect's in-stream error event, or nothing where none can be told apart.

        In the middle of an event it would complete what was never whole, and an SDK would fail on
        the event's JSON instead of on ours.
        """
        if not self._is_event_stream or not self._last_bytes.endswith(_BLANK_LINE):
            return b""
        return self._route.provider.dialect.stream_error(code, message)

    @property
    def tokens_passed(self) -> int:
        """Return about how many tokens came: one an event, or one in four bytes."""
        return self._passed if self._is_event_stream else self._passed // BYTES_PER_TOKEN

    def usage(self) -> UsageRecord:
        """Return what the provider said it counted."""
        if self._reader is None:
            return UsageRecord()
        usage = self._reader.usage()
        return UsageRecord(
            input=usage.input,
            output=usage.output,
            cache_read=usage.cache_read,
            cache_write=usage.cache_write,
            reasoning=usage.reasoning,
            source=usage.source,
            model=self._without_echo(usage.model),
        )

    def _without_echo(self, model: str) -> str:
        """Return what the provider calls its model: into the record goes no credential either."""
        if len(model) < self._credential_bytes:
            return model
        name = bytearray(model.encode())
        try:
            self._blot(name)
        except Refused:
            return ""
        return name.decode()
