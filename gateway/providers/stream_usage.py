"""Asking an OpenAI-compatible stream for its usage, and taking the extra event out again.

A chat stream carries usage only where the caller asked for it. The gateway asks when the caller did
not, with the smallest edit of the body, and removes the one event that this adds. No I/O.
"""

import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from gateway.errors import Refused
from gateway.providers.bodies import Governed, JsonObject
from policies.request import Operation

if TYPE_CHECKING:
    from gateway.providers.routes import Route

MAX_HELD_BYTES: Final = 64 * 1024
"""An incomplete event beyond this is passed on: a usage event is a few hundred bytes."""

# An event ends with an empty line, and lines end in any of three ways (WHATWG HTML 9.2.5).
_BLANKS = (b"\n\n", b"\n\r\n", b"\r\r")
_LONGEST_BLANK = 3
_BLANK = re.compile(rb"\n\r?\n|\r\r")
_EVENT = re.compile(rb"(?:[^\r\n]+(?:\r\n|\r|\n)?)++(?:(?<=\n)\r?\n|(?<=\r)\r)?")

_ASK = b'"include_usage":true'


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw] | None = None
    usage: dict[str, Any] | None = None


_UNGOVERNED = Governed()
_chunk = msgspec.json.Decoder(_Chunk)


def request_usage(route: "Route", body: bytes) -> bytes | None:
    """Return the body of a chat stream with the question added, None where it is not to be asked.

    One field is put in; every other byte stays. A caller that set `include_usage` itself, to
    whatever, keeps what it set: with false the usage of its call stays unknown.
    """
    if route.operation is not Operation.CHAT:
        return None
    fields = JsonObject(body, _UNGOVERNED)
    if "stream_options" not in fields:
        start = body.index(b"{") + 1
        return body[:start] + b'"stream_options":{%b},' % _ASK + body[start:]
    start, end = fields.span("stream_options")
    if body[start:end] == b"null":
        return body[:start] + b"{%b}" % _ASK + body[end:]
    try:
        options = JsonObject(body[start:end], _UNGOVERNED)
    except Refused:
        return None  # the provider will say that this is no object
    if "include_usage" in options:
        return None
    comma = b"," if body[start + 1 : end - 1].strip() else b""
    return body[: start + 1] + _ASK + comma + body[start + 1 :]


class UsageEventFilter:
    """Passes an event stream on, without the event that holds usage and no choices.

    Whole events pass at once; of an incomplete one the bytes are held until it is complete. Every
    byte is searched once, however small the events or the reads are. How a stream is cut into reads
    changes nothing about what passes in the end.
    """

    def __init__(self) -> None:
        self._held = bytearray()
        self._is_amid = False

    def feed(self, data: bytes) -> bytes:
        """Return what of the stream may pass now."""
        seam = max(0, len(self._held) - _LONGEST_BLANK + 1)
        self._held += data
        ends = [
            found + len(blank) for blank in _BLANKS if (found := self._held.rfind(blank, seam)) >= 0
        ]
        if ends:
            return self._pass(max(ends))
        if len(self._held) > MAX_HELD_BYTES:
            return self._pass_incomplete()
        return b""

    def end(self) -> bytes:
        """Return what was held, at the end of the stream."""
        return self._pass(len(self._held))

    def _pass(self, end: int) -> bytes:
        """Take the events that end at `end`, and return those that may pass."""
        whole = bytes(self._held[:end])
        del self._held[:end]
        behind = _BLANK.search(whole) if self._is_amid else None
        self._is_amid = False
        if b'"usage"' not in whole:
            return whole
        passed: list[bytes] = []
        start = 0
        for event in _EVENT.finditer(whole, behind.end() if behind else 0):
            if _is_usage_event(event[0]):
                passed.append(whole[start : event.start()])
                start = event.end()
        passed.append(whole[start:])
        return b"".join(passed)

    def _pass_incomplete(self) -> bytes:
        """Pass most of an event that is too large to be one of usage."""
        self._is_amid = True
        begun = bytes(self._held[:-_LONGEST_BLANK])
        del self._held[:-_LONGEST_BLANK]
        return begun


def _is_usage_event(event: bytes) -> bool:
    if b'"usage"' not in event or b"data:" not in event or len(event) > MAX_HELD_BYTES:
        return False
    try:
        chunk = _chunk.decode(event.strip().removeprefix(b"data:"))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return chunk.choices == [] and chunk.usage is not None
