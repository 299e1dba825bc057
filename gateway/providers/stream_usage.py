"""Asking an OpenAI-compatible stream for its usage, and taking the extra event out again.

A chat stream carries usage only where the caller asked for it. The gateway asks when the caller did
not, with the smallest edit of the body, and removes the one event that this adds. No I/O.
"""

from typing import TYPE_CHECKING, Any, Final

import msgspec

from policies.request import Operation

if TYPE_CHECKING:
    from gateway.providers.routes import Route

MAX_HELD_BYTES: Final = 64 * 1024
"""An incomplete event beyond this is passed on: a usage event is a few hundred bytes."""

_ASK = b'"stream_options":{"include_usage":true}'


class _Asked(msgspec.Struct):
    stream: bool | None = None
    stream_options: msgspec.Raw = msgspec.Raw()


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] | None = None
    usage: dict[str, Any] | None = None


_asked = msgspec.json.Decoder(_Asked)
_chunk = msgspec.json.Decoder(_Chunk)


def request_usage(route: "Route", body: bytes) -> bytes | None:
    """Return the body with the question added, None where there is nothing to ask.

    The field is put behind the opening brace; every other byte stays. A caller that set
    `stream_options` itself keeps its own.
    """
    if route.operation is not Operation.CHAT:
        return None
    try:
        asked = _asked.decode(body)
    except msgspec.DecodeError:
        return None
    if not asked.stream or bytes(asked.stream_options):
        return None
    brace = body.index(b"{")
    return body[: brace + 1] + _ASK + b"," + body[brace + 1 :]


class UsageEventFilter:
    """Passes an event stream on, without the event that holds usage and no choices.

    Whole events pass at once; of an incomplete one the bytes are held until it is complete.
    """

    def __init__(self) -> None:
        self._held = b""
        self._passes_rest = False

    def feed(self, data: bytes) -> bytes:
        """Return what of the stream may pass now."""
        if self._passes_rest:
            return data
        buffer = self._held + data if self._held else data
        passed: list[bytes] = []
        start = 0
        while (end := _event_end(buffer, start)) > 0:
            event = buffer[start:end]
            if not _is_usage_event(event):
                passed.append(event)
            start = end
        self._held = buffer[start:]
        if len(self._held) > MAX_HELD_BYTES:
            self._passes_rest = True
            passed.append(self.end())
        return b"".join(passed)

    def end(self) -> bytes:
        """Return what was held, at the end of the stream."""
        held, self._held = self._held, b""
        return b"" if _is_usage_event(held) else held


def _event_end(buffer: bytes, start: int) -> int:
    """Return the index behind the next event's blank line, 0 where it has not come."""
    ends = [
        found + len(blank)
        for blank in (b"\n\n", b"\r\n\r\n", b"\r\r")
        if (found := buffer.find(blank, start)) >= 0
    ]
    return min(ends, default=0)


def _is_usage_event(event: bytes) -> bool:
    if b'"usage"' not in event or b"data:" not in event:
        return False
    try:
        chunk = _chunk.decode(event.strip().removeprefix(b"data:"))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return chunk.choices == [] and chunk.usage is not None
