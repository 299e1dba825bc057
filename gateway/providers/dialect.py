"""What a dialect knows: the shape of calls, of usage and of errors in one family of APIs. No I/O."""

import json
import re
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from policies.request import ModelCall, Operation

if TYPE_CHECKING:
    from gateway.providers.routes import Route


class BodyKind(StrEnum):
    """How a request's body is treated.

    `ACTION` is JSON that may be absent. `MULTIPART` names its model in a field that is looked for
    before the body goes on; an `UPLOAD` names none, and goes on from its first byte.
    """

    NONE = "none"
    JSON = "json"
    ACTION = "action"
    MULTIPART = "multipart"
    UPLOAD = "upload"


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens as the provider counted them: `input` with the cached ones, `output` with reasoning."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0
    source: str = "none"
    model: str = ""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """What an error body says: a stable code, a sentence, and where to look it up."""

    status: int
    code: str
    message: str
    request_id: str = ""
    rules: tuple[str, ...] = ()
    limit: str = ""

    def sentence(self) -> str:
        """Return the message with what a person needs to ask about it."""
        named = [f"rule {rule}" for rule in self.rules]
        if self.limit:
            named.append(f"limit {self.limit}")
        if self.request_id:
            named.append(f"decision {self.request_id}")
        return f"{self.message} [{self.code}{''.join(f', {name}' for name in named)}]"


class UsageReader(Protocol):
    """Reads usage from a response as it passes."""

    def feed(self, data: bytes) -> None:
        """Take note of body bytes; they are not changed or kept whole."""

    def usage(self) -> Usage:
        """Return what was found so far."""


class Dialect(Protocol):
    """One family of APIs."""

    name: str
    default_auth: tuple[bytes, bytes]
    headers: frozenset[bytes]
    request_id_header: bytes

    def match(self, method: bytes, path: bytes, base_path: bytes) -> "Matched | None":
        """Return the operation that a raw path (below the provider's prefix) names."""

    def read_call(self, route: "Route", body: bytes | None, body_bytes: int) -> ModelCall:
        """Return the facts of a call; raise `Refused` where the body cannot be read in one way."""

    def renamed(self, target: bytes, model: str) -> bytes:
        """Return an upstream target with another model, where the path holds one."""

    def usage_reader(self, route: "Route", call: ModelCall, content_type: bytes) -> UsageReader:
        """Return a reader for the response to this call."""

    def render_error(self, refusal: Refusal) -> bytes:
        """Return the JSON body that this dialect's SDKs turn into their own exception."""

    def stream_error(self, code: str, message: str) -> bytes:
        """Return the event that makes this dialect's SDKs raise in the middle of a stream."""


class Matched(msgspec.Struct, frozen=True, kw_only=True):
    """A path understood: the operation, whether a model answers it, and the path to send upstream."""

    operation: Operation
    body: BodyKind
    path: bytes
    model: str = ""
    stream: bool = False
    generates: bool = False


def to_json(value: object) -> bytes:
    """Return compact JSON."""
    return msgspec.json.encode(value)


# --- usage from both ends of a body --------------------------------------------------------------

HEAD_BYTES: Final = 8 * 1024
"""Anthropic's `message_start`, with the input tokens, is well inside the first 2 KiB."""

TAIL_BYTES: Final = 32 * 1024
"""Usage ends a body; after it come at most a few short fields and `[DONE]`."""

MAX_CANDIDATES: Final = 32
"""A hostile tail may say `"usage":{` thousands of times; real ones end with it, or a few nulls later."""

_MODEL = re.compile(rb'"(?:model|modelVersion)"\s*:\s*"([^"\\]{1,128})"')


class BothEnds:
    """Keeps the beginning and the end of a body, whatever its length."""

    def __init__(self) -> None:
        self._head = b""
        self._tail = bytearray()

    def feed(self, data: bytes) -> None:
        """Take note of more of the body."""
        if len(self._head) < HEAD_BYTES:
            self._head += data[: HEAD_BYTES - len(self._head)]
        self._tail += data[-TAIL_BYTES:]
        if len(self._tail) > 2 * TAIL_BYTES:
            del self._tail[:-TAIL_BYTES]

    def first(self, key: bytes) -> dict[str, Any]:
        """Return the first object under `key` near the beginning, or nothing."""
        return _object_at(self._head, self._head.find(b'"%b"' % key), key)

    def last(self, key: bytes) -> dict[str, Any]:
        """Return the last object under `key` near the end, or nothing."""
        tail = bytes(self._tail)
        quoted = b'"%b"' % key
        position = len(tail)
        for _ in range(MAX_CANDIDATES):
            position = tail.rfind(quoted, 0, position)
            found = _object_at(tail, position, key)
            if found or position < 0:
                return found
        return {}

    def model(self) -> str:
        """Return the model that the provider says answered."""
        match = _MODEL.search(self._head)
        return match[1].decode(errors="replace") if match else ""


_DECODER = json.JSONDecoder()


def _object_at(data: bytes, position: int, key: bytes) -> dict[str, Any]:
    if position < 0:
        return {}
    text = data[position + len(key) + 2 :].decode(errors="replace").lstrip()
    if not text.startswith(":"):
        return {}
    try:
        value, _ = _DECODER.raw_decode(text[1:].lstrip())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def count(found: dict[str, Any], *path: str) -> int:
    """Return the whole number at a path into a usage object, 0 where there is none."""
    value: object = found
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int) and 0 <= value < 2**53 else 0
