"""Watching a multipart body as it streams: the model's name, and that there is only one.

A body is held only until its model is known; what follows streams. The scanner finds part boundaries
(RFC 2046 5.1.1), reads the value of the `model` part, and refuses a second one anywhere later in the
stream, or anything that another reader could take for one. What it cannot follow it refuses: a body
that cannot be read is not governed.

No I/O.
"""

import re
from typing import Final

from gateway.errors import Refused

MAX_PART_HEAD_BYTES: Final = 8 * 1024
MAX_MODEL_BYTES: Final = 256
MAX_PARTS: Final = 256

_BOUNDARY = re.compile(
    rb';\s*boundary=(?:"([^"\r\n]{1,70})"|([^\s";,]{1,70}))(?=\s*(?:;|$))', re.IGNORECASE
)
_NAME = re.compile(rb'(?:^|[;\s])name=(?:"((?:[^"\\]|\\.)*)"|([^\s";]*))', re.IGNORECASE)
_DISPOSITION = b"content-disposition:"


class MultipartScanner:
    """One body's parts, as far as they have come."""

    def __init__(self, content_type: bytes, expected: str | None = None) -> None:
        """Take the request's Content-Type, and the model that the call was judged by.

        With `expected`, any other model in the body is refused; "" means that none may come.

        Raises:
            Refused: It is not multipart/form-data with exactly one boundary.
        """
        found = _BOUNDARY.findall(content_type)
        if (
            not content_type.lower().startswith(b"multipart/form-data")
            or len(found) != 1
            or b"boundary*" in content_type.lower()
        ):
            raise _invalid("The body must be multipart/form-data with one boundary.")
        boundary = found[0][0] or found[0][1]
        self._delimiter = b"\r\n--" + boundary
        # A delimiter at the very start has no line break before it; lend it one.
        self._buffer = b"\r\n"
        self._in_head = False
        self._is_model = False
        self._value = b""
        self._parts = 0
        self._has_ended = False
        self._model: str | None = None
        self._expected = expected

    @property
    def model(self) -> str:
        """Return the value of the `model` part, "" where none has come."""
        return self._model or ""

    @property
    def is_decided(self) -> bool:
        """Whether the model is known, or can no longer come."""
        return self._model is not None or self._has_ended

    def feed(self, data: bytes) -> None:
        """Follow more of the body.

        Raises:
            Refused: It cannot be followed, or names a model twice.
        """
        self._buffer += data
        while self._step():
            pass

    def finish(self) -> None:
        """Say that the body is complete.

        Raises:
            Refused: It does not end as a multipart body does: what it holds last was not seen whole.
        """
        if not self._has_ended:
            raise _invalid("The multipart body has no end.")

    def _step(self) -> bool:
        if self._has_ended:
            self._buffer = b""  # an epilogue says nothing (RFC 2046 5.1.1)
            return False
        return self._head_step() if self._in_head else self._content_step()

    def _content_step(self) -> bool:
        if not self._parts and not self._buffer.startswith(self._delimiter[: len(self._buffer)]):
            # A preamble says nothing (RFC 2046 5.1.1), but a lenient reader may find parts in it,
            # with line feeds alone before its boundaries.
            raise _invalid("The body does not begin with its boundary.")
        position = self._buffer.find(self._delimiter)
        if position < 0:
            keep = len(self._delimiter) - 1
            self._take(self._buffer[:-keep])
            self._buffer = self._buffer[-keep:]
            return False
        end = position + len(self._delimiter)
        if len(self._buffer) < end + 2:
            return False
        mark = self._buffer[end : end + 2]
        if mark not in {b"\r\n", b"--"}:
            raise _invalid("A multipart boundary is followed by neither a line break nor the end.")
        self._take(self._buffer[:position])
        self._end_part()
        self._buffer = self._buffer[end + 2 :]
        self._has_ended = mark == b"--"
        self._in_head = not self._has_ended
        return True

    def _head_step(self) -> bool:
        position = self._buffer.find(b"\r\n\r\n")
        if position < 0:
            if len(self._buffer) > MAX_PART_HEAD_BYTES:
                raise _invalid("A part's head is too large.")
            return False
        self._begin_part(self._buffer[:position])
        # The line break before an empty part's delimiter is the one that ends its head.
        self._buffer = self._buffer[position + 2 :]
        self._in_head = False
        return True

    def _begin_part(self, head: bytes) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS or len(head) > MAX_PART_HEAD_BYTES:
            raise _invalid("The body has too many parts, or too large ones' heads.")
        lines = [line for line in head.split(b"\r\n") if line.lower().startswith(_DISPOSITION)]
        if len(lines) != 1 or b"name*" in lines[0].lower():
            raise _invalid("A part does not name its field once and plainly.")
        names = _NAME.findall(lines[0])
        if len(names) != 1:
            raise _invalid("A part does not name its field once and plainly.")
        name = (names[0][0] or names[0][1]).strip()
        if b"\\" in name or b"%" in name:
            raise _invalid("A part's name is encoded.")
        self._is_model = name.lower() in {b"model", b"model[]"}
        if self._is_model and self._model is not None:
            raise _invalid("The body names a model twice.")
        self._value = b""

    def _take(self, content: bytes) -> None:
        if self._is_model:
            self._value += content
            if len(self._value) > MAX_MODEL_BYTES + 2:
                raise _invalid("The model's name is too long.")

    def _end_part(self) -> None:
        if self._is_model:
            self._model = self._value.removeprefix(b"\r\n").decode(errors="replace")
            self._is_model = False
            if self._expected is not None and self._model != self._expected:
                raise _invalid("The body names another model than the one that was judged.")


def _invalid(message: str) -> Refused:
    return Refused("invalid_body", message)
