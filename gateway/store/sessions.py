"""What is kept of an open session, and what the control process asks of whatever keeps it.

Two keep it: `MemoryStore` for one gateway, `RedisStore` for a fleet; one suite of tests holds both to
this page. Instants are the gateway's own, in seconds since the epoch. No I/O.
"""

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Protocol

from gateway.errors import Refused
from keys.session import SessionRecord
from policies.request import Principal


class StoreUnavailable(Refused):
    """The store does not answer now; what was asked may or may not have been done."""

    def __init__(self) -> None:
        super().__init__(
            "store_unavailable", "Sessions cannot be reached now.", retry_after_seconds=1
        )


@dataclass(slots=True)
class Entry:
    """One open session. The keys in the record are sealed."""

    principal: Principal
    record: SessionRecord
    label: str
    used_at: float

    @property
    def deadline(self) -> float:
        """When it ends unless it is used before."""
        return min(self.record.expires_at, self.used_at + self.record.idle_seconds)

    def to_public(self) -> dict[str, object]:
        """Return what its owner may see."""
        record = self.record
        return {
            "session_id": record.session_id,
            "label": self.label,
            "created_at": record.created_at,
            "expires_at": record.expires_at,
            "idle_seconds": record.idle_seconds,
            "generation": record.generation,
            "providers": {
                each.provider: {"fingerprint": each.fingerprint} for each in record.credentials
            },
        }


class SessionStore(Protocol):
    """Keeps every open session. Each operation is done whole or not at all.

    All that are `async` raise `StoreUnavailable` where the store cannot be asked.
    """

    async def open(self, entry: Entry) -> None:
        """Keep a new session.

        Raises:
            Refused: Its owner has too many, or there are too many in all.
        """

    async def replace(self, entry: Entry, revision: int) -> bool:
        """Keep this in place of the session's `revision`; return whether that was the latest."""

    async def close(
        self, session_id: str, reason: str, *, due_at: float | None = None
    ) -> Entry | None:
        """Forget a session; return whose it was, to one caller only. With `due_at`, if it ends by then.

        What is returned need not hold the sealed keys.
        """

    async def find(self, session_id: str) -> Entry | None:
        """Return the open session of this id."""

    async def owned_by(self, principal: Principal) -> list[Entry]:
        """Return what is open of this issuer and subject."""

    def scan(self) -> AsyncIterator[list[Entry]]:
        """Yield every open session, some at a time."""

    async def due(self, now: float) -> list[tuple[str, str]]:
        """Return sessions that end by `now`, each with the reason: expired or idle."""

    def touch(self, session_ids: Iterable[str], used_at: float) -> None:
        """Note that these sessions carried a call; never shortens what is left of one."""

    def adopt(self, entry: Entry) -> None:
        """Go on with a session that a control process before this one knew."""

    def recall(self, session_id: str) -> Entry | None:
        """Return what this gateway's workers may hold of a session, whether or not it is open."""

    def held(self) -> list[Entry]:
        """Return the sessions that this gateway's workers may hold."""


def why_due(expires_at: float, now: float) -> str:
    """Return why a session that is due ends."""
    return "expired" if expires_at <= now else "idle"


def too_many_in_all() -> Refused:
    """Return the refusal where `sessions.total` is reached."""
    return Refused("overloaded", "Too many sessions are open.", retry_after_seconds=30)


def too_many_of_owner() -> Refused:
    """Return the refusal where `sessions.per_subject` is reached."""
    return Refused("too_many_sessions", "Close a session before you open another.")
