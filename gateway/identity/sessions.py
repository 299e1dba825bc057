"""A worker's view of open sessions: who opened them, and the way to the sealed keys.

Records come from the control process and go when it says so; expiry by time is checked on use as
well, so that a late message opens nothing. No I/O.
"""

import msgspec

from gateway.errors import Refused
from keys.echo import blot
from keys.errors import CustodyError
from keys.region import Slot
from keys.session import SessionRecord
from keys.vault import SessionVault
from policies.request import Principal


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """An open session: its principal and its record. The keys in the record are sealed."""

    principal: Principal
    record: SessionRecord


class SessionTable:
    """The open sessions of one worker."""

    def __init__(self, vault: SessionVault) -> None:
        self._vault = vault
        self._sessions: dict[str, Session] = {}
        self._touched: set[str] = set()

    def __len__(self) -> int:
        """Return how many sessions are open."""
        return len(self._sessions)

    def put(self, principal: Principal, record: SessionRecord) -> None:
        """Serve a session, or its newer generation."""
        self._vault.put(record)
        self._sessions[record.session_id] = Session(principal=principal, record=record)

    def drop(self, session_id: str) -> None:
        """Destroy a session's sealed keys; without them its token opens nothing."""
        self._sessions.pop(session_id, None)
        self._touched.discard(session_id)
        self._vault.drop(session_id)

    def find(self, session_id: str) -> Session | None:
        """Return the open session of this id."""
        return self._sessions.get(session_id)

    def touch(self, session_id: str) -> None:
        """Note that the session carries a call; idle expiry is the control process's to judge."""
        self._touched.add(session_id)

    def take_touched(self) -> tuple[str, ...]:
        """Return the sessions touched since the last time."""
        touched = tuple(self._touched)
        self._touched.clear()
        return touched

    def compose_head(  # noqa: PLR0913, PLR0917 - the parts of one head
        self,
        session_id: str,
        secret: bytes,
        provider: str,
        origin: str,
        before: bytes,
        after: bytes,
    ) -> Slot:
        """Return a slot that holds `before`, the unsealed credential and `after`.

        Raises:
            Refused: The session closed while the call was under way, or its keys do not open.
        """
        try:
            return self._vault.compose_head(session_id, secret, provider, origin, before, after)
        except CustodyError as error:
            raise Refused(error.code, "The session's key cannot be used.") from error

    def blot(
        self, session_id: str, secret: bytes, provider: str, origin: str, data: bytearray
    ) -> int:
        """Blot the unsealed credential out of `data`, as `keys.echo.blot` does.

        Raises:
            Refused: The session closed while the call was under way, or its keys do not open.
        """
        slot = self.compose_head(session_id, secret, provider, origin, b"", b"")
        try:
            return blot(slot.view, slot.whole[len(slot.view) :], data)
        finally:
            slot.release()
