"""Sessions of one gateway, in the memory of its control process. No I/O.

Nothing here waits, so that every operation is one step to whoever shares the event loop.
"""

from collections.abc import AsyncIterator, Iterable

from gateway.config import Sessions
from gateway.store.sessions import Entry, too_many_in_all, too_many_of_owner, why_due
from policies.request import Principal


class MemoryStore:
    """Every open session of this gateway."""

    def __init__(self, limits: Sessions) -> None:
        self._limits = limits
        self._entries: dict[str, Entry] = {}

    async def open(self, entry: Entry) -> None:
        """Keep a new session, if there is room."""
        if len(self._entries) >= self._limits.total:
            raise too_many_in_all()
        if len(await self.owned_by(entry.principal)) >= self._limits.per_subject:
            raise too_many_of_owner()
        self._entries[entry.record.session_id] = entry

    async def replace(self, entry: Entry, revision: int) -> bool:
        """Keep this in place of the session's `revision`."""
        session_id = entry.record.session_id
        before = self._entries.get(session_id)
        if before is None or before.record.revision != revision:
            return False
        self._entries[session_id] = entry
        return True

    async def close(
        self, session_id: str, _reason: str, *, due_at: float | None = None
    ) -> Entry | None:
        """Forget a session and return it."""
        entry = self._entries.get(session_id)
        if entry is None or (due_at is not None and entry.deadline > due_at):
            return None
        return self._entries.pop(session_id)

    async def find(self, session_id: str) -> Entry | None:
        """Return the open session of this id."""
        return self._entries.get(session_id)

    async def owned_by(self, principal: Principal) -> list[Entry]:
        """Return what is open of this issuer and subject."""
        owner = (principal.issuer, principal.subject)
        return [
            entry
            for entry in self._entries.values()
            if (entry.principal.issuer, entry.principal.subject) == owner
        ]

    async def scan(self) -> AsyncIterator[list[Entry]]:
        """Yield every open session."""
        yield self.held()

    async def due(self, now: float) -> list[tuple[str, str]]:
        """Return sessions that end by `now`."""
        return [
            (session_id, why_due(entry.record.expires_at, now))
            for session_id, entry in self._entries.items()
            if entry.deadline <= now
        ]

    def touch(self, session_ids: Iterable[str], used_at: float) -> None:
        """Note that these sessions carried a call."""
        for session_id in session_ids:
            entry = self._entries.get(session_id)
            if entry is not None:
                entry.used_at = max(entry.used_at, used_at)

    def adopt(self, entry: Entry) -> None:
        """Go on with a session that a control process before this one opened."""
        self._entries[entry.record.session_id] = entry

    def recall(self, session_id: str) -> Entry | None:
        """Return the open session of this id."""
        return self._entries.get(session_id)

    def held(self) -> list[Entry]:
        """Return every open session: workers hold all of them."""
        return list(self._entries.values())
