"""What the story of a call asks of the world, and what it is told: its head, and how an exchange went.

`gateway.execution` tells the story, a generator that yields these commands; whoever drives it
(`gateway.proxy.driver`, a test) serves them. No I/O.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import msgspec

from gateway.audit.event import CallDenied, CallEnd, CallStart
from gateway.audit.journal import AuditUnavailable
from gateway.errors import Refused
from gateway.identity.sessions import KeyLease
from gateway.limits.reservation import Reservation
from gateway.problems import Problem
from gateway.providers.dialect import Dialect
from gateway.providers.multipart import MultipartScanner
from gateway.providers.provider import Provider
from gateway.response import Header, ResponseGuard
from keys.region import Slot
from policies.limits import Demand
from policies.quota import QuotaStatus, Usage

Admission = Reservation | QuotaStatus


class RequestHead:
    """What a caller's connection says before its body. Never printed: it carries credentials.

    `headers` have lower-case names. `content_length` is 0 without a body and -1 where the body is
    chunked.
    """

    __slots__ = ("client_address", "content_length", "headers", "is_upgrade", "method", "target")

    def __init__(  # noqa: PLR0913 - one argument for each thing a head says
        self,
        *,
        method: bytes,
        target: bytes,
        headers: list[Header],
        content_length: int,
        client_address: str,
        is_upgrade: bool = False,
    ) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.content_length = content_length
        self.client_address = client_address
        self.is_upgrade = is_upgrade

    def header(self, name: bytes) -> bytes:
        """Return the first value of the field `name` (lower-case), or nothing."""
        for key, value in self.headers:
            if key == name:
                return value
        return b""


class ReadBody(msgspec.Struct, frozen=True):
    """Resume with the whole body, at most `limit` bytes."""

    limit: int


class PeekBody(msgspec.Struct, frozen=True):
    """Resume once `is_enough`, which gets each piece of the body once, says so, or the body ended.

    The bytes stay queued for the exchange: a peek consumes nothing. Where `limit` bytes are held and
    it is not enough, `too_much` is raised here.
    """

    limit: int
    is_enough: Callable[[bytes], bool]
    too_much: Refused


class AwaitKeys(msgspec.Struct, frozen=True):
    """Resume when the issuer's keys have come; raise `Refused` here if they do not."""

    issuer: str
    kid: str


class AwaitSession(msgspec.Struct, frozen=True):
    """Resume when the shared store has been asked; raise `Refused` here if it does not answer."""

    session_id: str


class Admit(msgspec.Struct, frozen=True):
    """Resume with the `Reservation` or the refusing `QuotaStatus` that `begin` calls back with."""

    begin: Callable[[Callable[[Admission], None]], None]


class Record(msgspec.Struct, frozen=True):
    """Resume when the event is recorded, with its position `<origin>#<index>`; raise
    `AuditUnavailable` here if it cannot be.
    """  # noqa: D205 - one sentence

    event: CallStart | CallEnd | CallDenied


class Exchange(msgspec.Struct, kw_only=True):
    """What became of a forwarded call.

    `refusal` is set where no response byte was sent, so that the story may still answer. `status`
    is what the caller saw, 0 for nothing.
    """

    outcome: str = "complete"
    fault: str = ""
    status: int = 0
    upstream_status: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    first_byte_seconds: float = 0.0
    refusal: Refused | None = None


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """Carry the call to the provider and the answer back; resume with the `Exchange`.

    Once `lease` is over, the exchange is to be cut. `compose` lays the upstream head out in a secret
    slot; it is called once, when a connection is ready to take it, and raises `Refused` if the key
    may be used no more. `body` is None where the caller's bytes are streamed as they come. The bytes
    that complete the answer are held until `Finish`.
    """

    provider: Provider
    session_id: str
    lease: KeyLease
    compose: Callable[[], Slot]
    body: bytes | None
    response: ResponseGuard
    inspect: MultipartScanner | None = None
    is_head: bool = False


class Finish(msgspec.Struct, frozen=True):
    """Release the held end of the answer."""


class Break(msgspec.Struct, frozen=True):
    """Break the answer off so that no caller takes it for whole."""


class Answer(msgspec.Struct, frozen=True):
    """Send the gateway's own answer."""

    problem: Problem
    dialect: Dialect | None
    headers: Sequence[Header]


Command = (
    ReadBody
    | PeekBody
    | AwaitKeys
    | AwaitSession
    | Admit
    | Record
    | Forward
    | Finish
    | Break
    | Answer
)
Story = Generator[Command, Any, None]


class Limiter(Protocol):
    """Where the limits of a policy set are counted: in this process, or in a store that `waits`."""

    waits: bool

    def admit(self, asked: Sequence[Demand], call_id: str) -> Admission:
        """Return what the call may hold, or what refuses it."""

    def begin(
        self, asked: Sequence[Demand], call_id: str, then: Callable[[Admission], None]
    ) -> None:
        """Call `then` once with what `admit` would return."""

    def settle(self, reservation: Reservation, actual: Usage) -> None:
        """Count what the call took in place of what it had reserved; once, however often called."""


class Recorder(Protocol):
    """The part of an audit recorder that a driver needs to serve `Record`."""

    def append(
        self,
        event: CallStart | CallEnd | CallDenied,
        on_durable: Callable[[AuditUnavailable | None], None],
    ) -> str:
        """Record one event; return its position."""
