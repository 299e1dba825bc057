"""What control and workers say to each other over inherited socket pairs.

A frame is a 4-byte big-endian length and one MessagePack document. The two sides share nothing
else: a worker learns of sessions, issuers' keys and the drain from here, and has no other inbox.
A frame over `MAX_FRAME_BYTES`, or one that does not decode, breaks the link: both ends are ours, so
it can only be a defect, and a process that met one must not go on deciding. A link that merely ends
tells that the other process did.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

import msgspec

from keys.session import SessionRecord
from policies.kills import Kill
from policies.request import Principal

MAX_FRAME_BYTES = 4 * 1024 * 1024
"""Far above the largest frame, a key set of 256 KiB or a metrics snapshot."""

FLUSH_SECONDS = 1.0
"""How long a process that ends waits for its last words to be read."""


class SessionKey(msgspec.Struct, frozen=True, kw_only=True, tag="session-key"):
    """Control's first word: the raw Ed25519 key that session tokens are verified with."""

    public_key: bytes


class PutSession(msgspec.Struct, frozen=True, kw_only=True, tag="put-session"):
    """Serve this session from now on; also sent with a new revision after a change.

    `label` and `used_at` (seconds since the epoch) are kept for the next control process.
    """

    n: int
    principal: Principal
    record: SessionRecord
    label: str
    used_at: float


class DropSession(msgspec.Struct, frozen=True, kw_only=True, tag="drop-session"):
    """Destroy the record and cut the session's live calls."""

    n: int
    session_id: str
    reason: str


class SessionAbsent(msgspec.Struct, frozen=True, kw_only=True, tag="session-absent"):
    """No such session is open in the fleet; `is_known=False` says that nobody can say so now."""

    session_id: str
    is_known: bool


class Lease(msgspec.Struct, frozen=True, kw_only=True, tag="lease"):
    """Serve sessions of the shared store until then and no longer; what was said before is true.

    `until` is on the machine's monotonic clock, which its processes share: a lease that waited to be
    read is no longer for it.
    """

    until: float


class LetStand(msgspec.Struct, frozen=True, kw_only=True, tag="let-stand"):
    """These kills stand, and no others: end what they hit."""

    n: int
    kills: tuple[Kill, ...]


class IssuerAbsent(msgspec.Struct, frozen=True, kw_only=True, tag="issuer-absent"):
    """The issuer does not answer: nobody can say now whether an unknown key is its own."""

    issuer: str


class IssuerKeys(msgspec.Struct, frozen=True, kw_only=True, tag="issuer-keys"):
    """An issuer's key set; `jwks=None` says that there is none: forget what you have."""

    issuer: str
    jwks: bytes | None


class Serve(msgspec.Struct, frozen=True, kw_only=True, tag="serve"):
    """You know all there is to know: accept callers, or go on."""


class KeepCounts(msgspec.Struct, frozen=True, kw_only=True, tag="keep-counts"):
    """Keep for the next control process what workers that are gone had counted; the highest `n` wins."""

    n: int
    data: dict[str, Any]


class SnapshotRequest(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot-request"):
    """Ask for the worker's counters."""

    n: int


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """A worker's first word on a new relay.

    A fresh worker has never served and is told everything; another one tells what it holds, a
    `Held` for each session, and gives back the counts it was given to keep. `Told` follows.
    """

    worker: int
    is_fresh: bool
    kept: KeepCounts | None = None


class Held(msgspec.Struct, frozen=True, kw_only=True, tag="held"):
    """A session that this worker serves."""

    principal: Principal
    record: SessionRecord
    label: str
    used_at: float


class Told(msgspec.Struct, frozen=True, kw_only=True, tag="told"):
    """That is all I hold."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The worker listens and can serve; `protections` as `gateway.boot.protect` found them."""

    worker: int
    protections: dict[str, str]


class Ack(msgspec.Struct, frozen=True, kw_only=True, tag="ack"):
    """Request `n` is done; `count` is how many live calls it cut."""

    n: int
    count: int = 0


class Touched(msgspec.Struct, frozen=True, kw_only=True, tag="touched"):
    """These sessions carried a call since the last such message."""

    session_ids: tuple[str, ...]


class KeysNeeded(msgspec.Struct, frozen=True, kw_only=True, tag="keys-needed"):
    """A token named a key that this worker does not know."""

    issuer: str
    kid: str


class SessionNeeded(msgspec.Struct, frozen=True, kw_only=True, tag="session-needed"):
    """A token names a session, or a generation of one, that this worker does not hold."""

    session_id: str


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot"):
    """The worker's counters, for request `n`; 0 where it sends them unasked, as its last word."""

    n: int
    data: dict[str, Any]


UNASKED = 0
"""The `n` of a message that nobody waits to have confirmed."""

ToWorker = (
    SessionKey
    | PutSession
    | DropSession
    | SessionAbsent
    | Lease
    | LetStand
    | IssuerKeys
    | IssuerAbsent
    | Serve
    | KeepCounts
    | SnapshotRequest
)
ToControl = Hello | Held | Told | Ready | Ack | Touched | KeysNeeded | SessionNeeded | Snapshot
Message = ToWorker | ToControl

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode_frame(message: Message) -> bytes:
    """Return the frame for one message."""
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body


class FrameReader:
    """Turns received bytes into messages, whatever the chunking. No I/O."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that `data` completes.

        Raises:
            ValueError: The frame is too large or is not one of ours; the link must end.
        """
        self._buffer += data
        messages = []
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "big")
            if size > MAX_FRAME_BYTES:
                raise ValueError("relay frame too large")
            if len(self._buffer) < 4 + size:
                break
            try:
                messages.append(_decoder.decode(self._buffer[4 : 4 + size]))
            except msgspec.DecodeError as error:
                raise ValueError("relay frame not understood") from error
            del self._buffer[: 4 + size]
        return messages


class Link(asyncio.Protocol):
    """One end of a relay. `on_lost` runs once, when the other process is gone."""

    def __init__(
        self, on_message: Callable[["Link", Message], None], on_lost: Callable[["Link"], None]
    ) -> None:
        self._on_message = on_message
        self._on_lost = on_lost
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_broken = False

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        on_message: Callable[["Link", Message], None],
        on_lost: Callable[["Link"], None],
    ) -> "Link":
        """Return a link over one end of a connected socket pair, which it then owns."""
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(lambda: cls(on_message, on_lost), sock=sock)
        return link

    def send(self, message: Message) -> None:
        """Queue one message; a no-op once the link is lost, which `on_lost` has told."""
        if self._transport is not None:
            self._transport.write(encode_frame(message))

    @property
    def is_lost(self) -> bool:
        """Whether the link has ended."""
        return self._lost.done()

    def close(self) -> None:
        """Flush and end the link."""
        if self._transport is not None:
            self._transport.close()

    async def finish(self) -> None:
        """End the link, and return when what was queued has left, or after `FLUSH_SECONDS`."""
        self.close()
        await asyncio.wait([self._lost], timeout=FLUSH_SECONDS)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        # uvloop's transports have the interface without being subclasses.
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Hand on each complete message; end the link at the first bad one."""
        try:
            messages = self._reader.feed(data)
        except ValueError:
            self.is_broken = True
            if self._transport is not None:
                self._transport.abort()
            return
        for message in messages:
            self._on_message(self, message)

    def connection_lost(self, _exc: Exception | None) -> None:
        """Tell the owner, once."""
        self._transport = None
        self._lost.set_result(None)
        self._on_lost(self)
