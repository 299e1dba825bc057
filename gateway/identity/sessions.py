"""A worker's view of open sessions: who opened them, and the way to the sealed keys.

Records come from the control process and go when it says so; expiry by time is checked on use as
well, so that a late message opens nothing. No I/O.
"""

from collections.abc import Iterable
from dataclasses import replace

import msgspec

from gateway.clock import Clock
from gateway.errors import Refused
from keys.echo import blot
from keys.errors import CustodyError, NoCredential, UnknownSession
from keys.region import Slot
from keys.session import SessionRecord
from keys.vault import HeldKey, SessionVault
from policies.request import Principal


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """An open session: its principal and its record, without the keys, which the vault holds.

    `label` is only kept for the control process.
    """

    principal: Principal
    record: SessionRecord
    label: str = ""


class KeyLease:
    """The right of one call to use one key: taken once, so that a call knows one key from start to end.

    Never printed: it holds the session secret.
    """

    __slots__ = ("_key", "_secret", "_vault")

    def __init__(self, vault: SessionVault, key: HeldKey, secret: bytes) -> None:
        self._vault = vault
        self._key = key
        self._secret = secret

    @property
    def fingerprint(self) -> str:
        """The key's name."""
        return self._key.fingerprint

    @property
    def credential_bytes(self) -> int:
        """How long the key is."""
        return self._key.size

    @property
    def is_over(self) -> bool:
        """Whether the key was destroyed: the session closed, or the key's overlap ended."""
        return self._key.is_destroyed

    def compose_head(self, before: bytes, after: bytes) -> Slot:
        """Return a slot that holds `before`, the unsealed credential and `after`.

        Raises:
            Refused: The key was destroyed while the call was under way, or does not open.
        """
        try:
            return self._vault.compose_head(self._key, self._secret, before, after)
        except CustodyError as error:
            raise Refused(error.code, "The session's key cannot be used.") from error

    def blot(self, data: bytearray) -> int:
        """Blot the unsealed credential out of `data`, as `keys.echo.blot` does.

        Raises:
            Refused: The key was destroyed while the call was under way, or does not open.
        """
        slot = self.compose_head(b"", b"")
        try:
            return blot(slot.view, slot.whole[len(slot.view) :], data)
        finally:
            slot.release()

    def __repr__(self) -> str:
        """Return nothing of the secret."""
        return f"KeyLease({self._key!r})"


class SessionTable:
    """The open sessions of one worker."""

    def __init__(self, vault: SessionVault, clock: Clock, *, is_shared: bool = False) -> None:
        """Take the vault; where sessions are shared, none is served before a lease is granted."""
        self._vault = vault
        self._clock = clock
        self._is_shared = is_shared
        self._sessions: dict[str, Session] = {}
        self._touched: set[str] = set()
        self._used_at: dict[str, float] = {}
        self._is_suspended = is_shared

    def __len__(self) -> int:
        """Return how many sessions are open."""
        return len(self._sessions)

    def put(
        self, principal: Principal, record: SessionRecord, *, label: str = "", used_at: float = 0.0
    ) -> int:
        """Serve a session, or another revision of it; return how many keys that destroyed."""
        destroyed = self._vault.put(record, self._clock.monotonic())
        # The vault alone holds the keys: what it overwrites is then nowhere else.
        bare = tuple(replace(each, sealed=b"") for each in record.credentials)
        record = replace(record, credentials=bare)
        session = Session(principal=principal, record=record, label=label)
        self._sessions[record.session_id] = session
        self._used_at[record.session_id] = max(self.used_at(record.session_id), used_at)
        return destroyed

    def drop(self, session_id: str) -> None:
        """Destroy a session's sealed keys; without them its token opens nothing."""
        self._sessions.pop(session_id, None)
        self._used_at.pop(session_id, None)
        self._touched.discard(session_id)
        self._vault.drop(session_id)

    def destroy_replaced(self, fingerprint: str) -> int:
        """Destroy the keys of this name that live on in an overlap; return how many."""
        return self._vault.destroy_replaced(fingerprint)

    def end_overlaps(self) -> int:
        """Destroy keys that were replaced, and whose overlap is over; return how many."""
        return self._vault.sweep(self._clock.monotonic())

    def all(self) -> list[Session]:
        """Return every open session."""
        return list(self._sessions.values())

    def complete(self, session: Session) -> SessionRecord:
        """Return the session's record with its wrapped keys, for the control process."""
        return self._vault.complete(session.record)

    def suspend(self) -> None:
        """Serve no session until `resume`: what was closed meanwhile could not be heard."""
        self._is_suspended = True

    def resume(self) -> None:
        """Serve again."""
        self._is_suspended = False

    def find(self, session_id: str) -> Session | None:
        """Return the open session of this id.

        Raises:
            Refused: Sessions are suspended.
        """
        if self._is_suspended:
            raise Refused(
                "control_unavailable",
                "Whether the session is still open cannot be known now.",
                retry_after_seconds=1,
            )
        return self._sessions.get(session_id)

    def must_ask(self, session_id: str, generation: int) -> bool:
        """Return whether a shared store may know more of a session than this worker holds."""
        if not self._is_shared:
            return False
        session = self._sessions.get(session_id)
        return session is None or session.record.generation < generation

    def touch(self, session_id: str) -> None:
        """Note that the session carries a call; idle expiry is the control process's to judge."""
        self._touched.add(session_id)

    def note_use(self, live: Iterable[str], now: float) -> tuple[str, ...]:
        """Return the sessions touched since the last time, or `live`: a long stream is use, too.

        `now` (seconds since the epoch) is kept as their last use.
        """
        used = tuple(self._sessions.keys() & (self._touched | set(live)))
        self._touched.clear()
        self._used_at.update(dict.fromkeys(used, now))
        return used

    def used_at(self, session_id: str) -> float:
        """Return when the session last carried a call, in seconds since the epoch."""
        return self._used_at.get(session_id, 0.0)

    def lease(self, session: Session, provider: str, origin: str, secret: bytes) -> KeyLease:
        """Return the right to use the session's key for this provider at this origin.

        Raises:
            Refused: The session holds none, or has just closed.
        """
        try:
            key = self._vault.find(session.record.session_id, provider, origin)
        except NoCredential:
            raise Refused(
                "no_key_for_provider", f"The session holds no key for {provider!r}."
            ) from None
        except UnknownSession:
            raise Refused("session_unknown", "The session is closed.") from None
        return KeyLease(self._vault, key, secret)
