"""The control process's account of sessions: who opened them, how long they live, what is sealed.

It never holds a key or a session secret: keys come as `Secret`s, are sealed and wiped; the session
secret goes into the token and is wiped.

Laws of this file:
- a token is handed out only after the opening is durable in the audit log and every worker holds
  the session; a session that not every worker holds is destroyed;
- nobody is told that a session closed before it is gone from every worker;
- no session is open that a standing kill hits;
- time is judged here alone: workers report use, the sweep closes what is old or idle;
- a control process that takes over adopts what all workers hold, and nothing else.
"""

import asyncio
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from gateway.audit.event import (
    CredentialRecord,
    Event,
    SessionClosed,
    SessionOpened,
    SessionRenewed,
    SessionRotated,
)
from gateway.audit.journal import AuditUnavailable
from gateway.clock import Clock
from gateway.config import Sessions
from gateway.errors import Refused
from gateway.identity.session_tokens import SessionTokenIssuer
from keys.errors import NoCredential, UnsealFailed
from keys.session import (
    Deposit,
    SealedCredential,
    SessionRecord,
    renew_session,
    rotate_session,
    seal_session,
)
from policies.kills import Kill, KillTable
from policies.request import Principal

MAX_OVERLAP_SECONDS: Final = 3600
"""How long calls under way may go on with a key that was replaced."""


RECORDED_AT_ONCE: Final = 256
"""How many endings wait for one flush of the log where many sessions end together."""


class Fleet(Protocol):
    """The workers, as the ledger needs them."""

    async def put(
        self, principal: Principal, record: SessionRecord, *, label: str, used_at: float
    ) -> None:
        """Return when every worker serves the session as the record says."""

    async def drop(self, session_id: str, reason: str) -> int:
        """Return, when every worker has forgotten the session, how many live calls were cut."""


Recorder = Callable[[Event], Awaitable[None]]
"""Returns when the event is durable; raises `AuditUnavailable` if it cannot be."""


@dataclass(slots=True)
class Entry:
    """One open session."""

    principal: Principal
    record: SessionRecord
    label: str
    used_at: float

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


class SessionLedger:
    """Every open session of this gateway."""

    def __init__(  # noqa: PLR0913 - the composition root names every part once
        self,
        *,
        fleet: Fleet,
        tokens: SessionTokenIssuer,
        record: Recorder,
        fingerprint_key: bytes,
        kills: KillTable,
        limits: Sessions,
        clock: Clock,
    ) -> None:
        self._fleet = fleet
        self._tokens = tokens
        self._record = record
        self._fingerprint_key = fingerprint_key
        self._kills = kills
        self._limits = limits
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._opening: Counter[tuple[str, str]] = Counter()

    def __len__(self) -> int:
        """Return how many sessions are open."""
        return len(self._entries)

    async def open(  # noqa: PLR0913 - what a session is made of
        self,
        principal: Principal,
        deposits: Sequence[Deposit],
        *,
        ttl_seconds: int | None,
        idle_seconds: int | None,
        label: str,
        client_address: str,
        form: str = "plain",
    ) -> tuple[Entry, str]:
        """Return a new session and its token.

        Raises:
            Refused: There are too many, its lifetime is not allowed, or a kill hits it.
            AuditUnavailable: Its opening cannot be recorded.
        """
        try:
            lifetime, idle = self._lifetime(ttl_seconds), self._idle(idle_seconds)
            with self._room_for(principal):
                entry, secret = self._seal(principal, deposits, lifetime, idle, label)
                self._refuse_killed(entry.principal, entry.record)
                await self._record(_opened(entry, form, client_address))
                # A crash here: an opening is on record, and nothing was opened.
                self._entries[entry.record.session_id] = entry
        finally:
            wipe(deposits)
        try:
            await self._begin(entry)
            return entry, self._mint(entry, secret)
        finally:
            secret[:] = bytes(len(secret))

    async def _begin(self, entry: Entry) -> None:
        """Serve a session that was just recorded; one that was killed meanwhile is destroyed."""
        try:
            self._refuse_killed(entry.principal, entry.record)
        except Refused:
            await self.close(entry.record.session_id, "killed")
            raise
        await self._serve(entry, entry.record)

    async def _serve(self, entry: Entry, record: SessionRecord) -> None:
        """Have every worker serve the session so; one that not all of them serve is destroyed."""
        try:
            await self._fleet.put(entry.principal, record, label=entry.label, used_at=entry.used_at)
        except Refused:
            await self.close(record.session_id, "not_served")
            raise

    def _refuse_killed(self, principal: Principal, record: SessionRecord) -> None:
        kill = self._kills.find_session(
            principal, record.session_id, [each.fingerprint for each in record.credentials]
        ) or self._kills.find_provider(each.provider for each in record.credentials)
        if kill is not None:
            raise Refused("killed", f"An operator stopped this (kill {kill.kill_id}).")

    def _lifetime(self, asked: int | None) -> int:
        lifetime = int(self._limits.default_ttl) if asked is None else asked
        if not 1 <= lifetime <= self._limits.max_ttl:
            raise Refused("invalid_body", f"ttl_seconds must be 1 to {int(self._limits.max_ttl)}.")
        return lifetime

    def _overlap(self, asked: int | None) -> int:
        overlap = int(self._limits.overlap) if asked is None else asked
        if not 0 <= overlap <= MAX_OVERLAP_SECONDS:
            raise Refused("invalid_body", f"overlap_seconds must be 0 to {MAX_OVERLAP_SECONDS}.")
        return overlap

    def _idle(self, asked: int | None) -> int:
        idle = int(self._limits.idle) if asked is None else asked
        if not 1 <= idle <= self._limits.max_ttl:
            raise Refused("invalid_body", f"idle_seconds must be 1 to {int(self._limits.max_ttl)}.")
        return idle

    @contextmanager
    def _room_for(self, principal: Principal) -> Iterator[None]:
        """Hold a place for one more session until it counts among the open ones."""
        owner = (principal.issuer, principal.subject)
        if len(self._entries) + self._opening.total() >= self._limits.total:
            raise Refused("overloaded", "Too many sessions are open.", retry_after_seconds=30)
        own = sum(
            (entry.principal.issuer, entry.principal.subject) == owner
            for entry in self._entries.values()
        )
        if own + self._opening[owner] >= self._limits.per_subject:
            raise Refused("too_many_sessions", "Close a session before you open another.")
        self._opening[owner] += 1
        try:
            yield
        finally:
            self._opening[owner] -= 1
            if not self._opening[owner]:
                del self._opening[owner]

    def _seal(
        self,
        principal: Principal,
        deposits: Sequence[Deposit],
        lifetime: int,
        idle: int,
        label: str,
    ) -> tuple[Entry, bytearray]:
        now = int(self._clock.now())
        blank = SessionRecord(
            session_id=secrets.token_hex(16),
            tenant=principal.tenant,
            issuer=principal.issuer,
            subject=principal.subject,
            generation=1,
            revision=1,
            created_at=now,
            expires_at=now + lifetime,
            idle_seconds=idle,
            credentials=(),
        )
        record, secret = seal_session(blank, deposits, self._fingerprint_key)
        return Entry(principal, record, label, self._clock.now()), secret

    def _mint(self, entry: Entry, secret: bytearray) -> str:
        record = entry.record
        return self._tokens.mint(
            session_id=record.session_id,
            generation=record.generation,
            subject=record.subject,
            tenant=record.tenant,
            secret=secret,
            now=int(self._clock.now()),
            expires_at=record.expires_at,
        )

    def find(self, session_id: str, principal: Principal) -> Entry:
        """Return the caller's own session of this id.

        Raises:
            Refused: There is none; another caller's is as good as none.
        """
        entry = self._entries.get(session_id)
        if entry is None or not _is_owner(entry, principal):
            raise Refused("session_not_found", "There is no such session of yours.")
        return entry

    def list_of(self, principal: Principal) -> list[Entry]:
        """Return the caller's own sessions."""
        return [entry for entry in self._entries.values() if _is_owner(entry, principal)]

    async def renew(
        self, entry: Entry, secret: bytes, ttl_seconds: int | None
    ) -> tuple[Entry, str]:
        """Return the session's next generation and its token; the old token stops working.

        Raises:
            Refused: The secret is not this session's, or the lifetime is not allowed.
            AuditUnavailable: The renewal cannot be recorded.
        """
        before = entry.record
        expires_at = int(self._clock.now()) + self._lifetime(ttl_seconds)
        try:
            record = renew_session(before, secret, expires_at)
        except UnsealFailed:
            raise Refused("invalid_session_token", "The session token is not valid.") from None
        await self._change(entry, record, _renewed(record))
        kept = bytearray(secret)
        try:
            return entry, self._mint(entry, kept)
        finally:
            kept[:] = bytes(len(kept))

    async def rotate(  # noqa: PLR0913 - what a rotation is made of
        self,
        entry: Entry,
        secret: bytes,
        deposits: Sequence[Deposit],
        *,
        overlap_seconds: int | None,
        client_address: str,
        form: str = "plain",
    ) -> Entry:
        """Replace keys of the session; calls from now on use the new ones, under the same token.

        Raises:
            Refused: The secret is not this session's, it holds no key for a provider, the overlap is
                not allowed, or a kill hits the new key.
            AuditUnavailable: The rotation cannot be recorded; the old keys stay.
        """
        before = entry.record
        try:
            overlap = self._overlap(overlap_seconds)
            record = rotate_session(before, secret, deposits, self._fingerprint_key, overlap)
        except NoCredential:
            raise Refused(
                "invalid_body", "Only keys for providers that the session holds can be replaced."
            ) from None
        except UnsealFailed:
            raise Refused("invalid_session_token", "The session token is not valid.") from None
        finally:
            wipe(deposits)
        self._refuse_killed(entry.principal, record)
        await self._change(entry, record, _rotated(before, record, form, client_address))
        return entry

    async def _change(self, entry: Entry, record: SessionRecord, event: Event) -> None:
        """Record a change of an open session, then have every worker serve it so."""
        before = entry.record
        # Taken before anything is awaited: of two changes at once, the second builds on the first.
        entry.record = record
        entry.used_at = self._clock.now()
        try:
            await self._record(event)
        except AuditUnavailable:
            if entry.record is record:
                entry.record = before
            raise
        if self._entries.get(record.session_id) is not entry:
            raise Refused("session_not_found", "The session was closed meanwhile.")
        await self._serve(entry, record)

    async def close_killed(self, kill: Kill) -> int:
        """Close every session that this kill hits; return how many.

        The workers have destroyed them already, at the kill's own word.
        """
        only = KillTable([kill])
        hit = [entry for entry in self._entries.values() if _is_hit(entry, only)]
        for entry in hit:
            self._entries.pop(entry.record.session_id, None)
        closed = [_closed(entry.record, "killed", 0) for entry in hit]
        for start in range(0, len(closed), RECORDED_AT_ONCE):
            await asyncio.gather(*map(self._record, closed[start : start + RECORDED_AT_ONCE]))
        return len(hit)

    async def close(self, session_id: str, reason: str) -> int:
        """Destroy a session everywhere, then record it; return how many live calls were cut.

        Raises:
            AuditUnavailable: It is closed, but that could not be recorded.
            Refused: It is closed here; a worker that does not answer closes it when it runs again.
        """
        entry = self._entries.pop(session_id, None)
        if entry is None:
            return 0
        cut = 0
        try:
            cut = await self._fleet.drop(session_id, reason)
        finally:
            await self._record(_closed(entry.record, reason, cut))
        return cut

    def adopt(self, entry: Entry) -> None:
        """Go on with a session that a control process before this one opened."""
        self._entries[entry.record.session_id] = entry

    def entries(self) -> list[Entry]:
        """Return every open session."""
        return list(self._entries.values())

    def touch(self, session_ids: Sequence[str]) -> None:
        """Note that these sessions carried a call."""
        now = self._clock.now()
        for session_id in session_ids:
            entry = self._entries.get(session_id)
            if entry is not None:
                entry.used_at = now

    def due(self) -> list[tuple[str, str]]:
        """Return the sessions to close now, each with the reason."""
        now = self._clock.now()
        return [
            (session_id, "expired" if entry.record.expires_at <= now else "idle")
            for session_id, entry in self._entries.items()
            if entry.record.expires_at <= now or entry.used_at + entry.record.idle_seconds <= now
        ]

    def all_ids(self) -> list[str]:
        """Return the id of every open session."""
        return list(self._entries)


def wipe(deposits: Iterable[Deposit]) -> None:
    """Wipe deposited keys."""
    for deposit in deposits:
        deposit.credential.wipe()


def _is_owner(entry: Entry, principal: Principal) -> bool:
    owner = entry.principal
    return (owner.issuer, owner.subject, owner.tenant) == (
        principal.issuer,
        principal.subject,
        principal.tenant,
    )


def _is_hit(entry: Entry, kills: KillTable) -> bool:
    record = entry.record
    fingerprints = [each.fingerprint for each in record.credentials]
    return kills.find_session(entry.principal, record.session_id, fingerprints) is not None


def _opened(entry: Entry, form: str, client_address: str) -> SessionOpened:
    record = entry.record
    return SessionOpened(
        session=record.session_id,
        tenant=record.tenant,
        issuer=record.issuer,
        subject=record.subject,
        credentials=_credentials(record.credentials),
        deposit=form,
        expires_at=record.expires_at,
        client_address=client_address,
    )


def _credentials(sealed: Iterable[SealedCredential]) -> tuple[CredentialRecord, ...]:
    return tuple(
        CredentialRecord(provider=each.provider, fingerprint=each.fingerprint) for each in sealed
    )


def _rotated(
    before: SessionRecord, record: SessionRecord, form: str, client_address: str
) -> SessionRotated:
    pairs = zip(before.credentials, record.credentials, strict=True)
    changed = [(old, new) for old, new in pairs if new is not old]
    return SessionRotated(
        session=record.session_id,
        tenant=record.tenant,
        issuer=record.issuer,
        subject=record.subject,
        credentials=_credentials(new for _, new in changed),
        replaced=tuple(old.fingerprint for old, _ in changed),
        deposit=form,
        overlap_seconds=record.overlap_seconds,
        client_address=client_address,
    )


def _renewed(record: SessionRecord) -> SessionRenewed:
    return SessionRenewed(
        session=record.session_id,
        tenant=record.tenant,
        issuer=record.issuer,
        subject=record.subject,
        generation=record.generation,
        expires_at=record.expires_at,
    )


def _closed(record: SessionRecord, reason: str, cut_calls: int) -> SessionClosed:
    return SessionClosed(
        session=record.session_id,
        tenant=record.tenant,
        issuer=record.issuer,
        subject=record.subject,
        reason=reason,
        cut_calls=cut_calls,
    )
