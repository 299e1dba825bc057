"""The control process's account of sessions: who opened them, how long they live, what is sealed.

It never holds a key or a session secret: keys come as `Secret`s, are sealed and wiped; the session
secret goes into the token and is wiped.

Laws of this file:
- a token is handed out only after the opening is durable in the audit log and every worker holds
  the session; a session that not every worker holds is destroyed;
- nobody is told that a session closed before it is gone from every worker;
- no session is open that a standing kill hits;
- time is judged here alone: workers report use, the sweep closes what is old or idle;
- what the store keeps is open, and nothing else: whatever it was asked is asked again once workers
  hold the answer, for a session may be closed by another replica meanwhile;
- a session that the store cannot be asked to forget is forgotten here at once, and its end is not
  confirmed.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
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
from gateway.store.sessions import Entry, SessionStore, StoreUnavailable
from keys.errors import NoCredential, UnsealFailed
from keys.session import (
    Deposit,
    SealedCredential,
    SessionRecord,
    renew_session,
    rotate_session,
    seal_session,
)
from keys.wrapping import Wrapping
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

    def forget(self, session_id: str, reason: str) -> None:
        """Have every worker forget the session, without waiting."""


Recorder = Callable[[Event], Awaitable[None]]
"""Returns when the event is durable; raises `AuditUnavailable` if it cannot be."""


class SessionLedger:
    """Opens, changes and closes sessions: the store keeps them, workers serve them, all wrapped."""

    def __init__(  # noqa: PLR0913 - the composition root names every part once
        self,
        *,
        store: SessionStore,
        fleet: Fleet,
        tokens: SessionTokenIssuer,
        record: Recorder,
        fingerprint_key: bytes,
        wrapping: Wrapping,
        kills: KillTable,
        limits: Sessions,
        clock: Clock,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._tokens = tokens
        self._record = record
        self._fingerprint_key = fingerprint_key
        self._wrapping = wrapping
        self._kills = kills
        self._limits = limits
        self._clock = clock

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
            entry, secret = self._seal(principal, deposits, lifetime, idle, label)
        finally:
            wipe(deposits)
        try:
            self._refuse_killed(entry.principal, entry.record)
            await self._keep(entry, form, client_address)
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
        await self._serve(entry)

    async def _keep(self, entry: Entry, form: str, client_address: str) -> None:
        try:
            await self._store.open(entry)
            # A crash from here on: a session that nobody has the token of, until it idles out.
            await self._record(_opened(entry, form, client_address))
        except (StoreUnavailable, AuditUnavailable):
            with suppress(StoreUnavailable):
                await self._store.close(entry.record.session_id, "not_opened")
            raise

    async def _serve(self, entry: Entry) -> None:
        """Have every worker serve the session so; one that not all of them serve is destroyed."""
        session_id = entry.record.session_id
        try:
            await self._fleet.put(
                entry.principal, entry.record, label=entry.label, used_at=entry.used_at
            )
            kept = await self._store.find(session_id)
        except Refused:
            await self.close(session_id, "not_served")
            raise
        if kept is None:
            # Closed before, or while, workers were told: by its owner, a kill, another replica.
            await self._fleet.drop(session_id, "closed")
            raise Refused("session_not_found", "The session was closed meanwhile.")
        if kept.record.revision != entry.record.revision:
            # Changed again by another replica; what it told us may have come before our own word.
            await self._fleet.put(
                kept.principal, kept.record, label=kept.label, used_at=kept.used_at
            )

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
        return Entry(principal, self._wrapping.wrap(record), label, self._clock.now()), secret

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

    async def find(self, session_id: str, principal: Principal) -> Entry:
        """Return the caller's own session of this id.

        Raises:
            Refused: There is none; another caller's is as good as none.
        """
        entry = await self._store.find(session_id)
        if entry is None or not _is_owner(entry, principal):
            raise Refused("session_not_found", "There is no such session of yours.")
        return entry

    async def list_of(self, principal: Principal) -> list[Entry]:
        """Return the caller's own sessions."""
        owned = await self._store.owned_by(principal)
        return [entry for entry in owned if _is_owner(entry, principal)]

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
            renewed = renew_session(self._wrapping.unwrap(before), secret, expires_at)
        except UnsealFailed:
            raise Refused("invalid_session_token", "The session token is not valid.") from None
        record = self._wrapping.wrap(renewed)
        changed = await self._change(entry, record, _renewed(record))
        kept = bytearray(secret)
        try:
            return changed, self._mint(changed, kept)
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
            rotated = rotate_session(
                self._wrapping.unwrap(before), secret, deposits, self._fingerprint_key, overlap
            )
        except NoCredential:
            raise Refused(
                "invalid_body", "Only keys for providers that the session holds can be replaced."
            ) from None
        except UnsealFailed:
            raise Refused("invalid_session_token", "The session token is not valid.") from None
        finally:
            wipe(deposits)
        self._refuse_killed(entry.principal, rotated)
        record = self._wrapping.wrap(rotated)
        return await self._change(entry, record, _rotated(before, record, form, client_address))

    async def _change(self, entry: Entry, record: SessionRecord, event: Event) -> Entry:
        """Keep and record a change of an open session, then have every worker serve it so."""
        changed = Entry(entry.principal, record, entry.label, self._clock.now())
        # Of two changes at once, the second finds another revision than it read.
        if not await self._store.replace(changed, entry.record.revision):
            raise Refused("session_mismatch", "The session was changed or closed meanwhile.")
        try:
            await self._record(event)
        except AuditUnavailable:
            with suppress(StoreUnavailable):
                await self._store.replace(entry, record.revision)
            raise
        await self._serve(changed)
        return changed

    async def close_killed(self, kills: Iterable[Kill]) -> int:
        """Close every session that one of these kills hits; return how many.

        The workers have destroyed them already, at the kill's own word.

        Raises:
            AuditUnavailable: They are closed, but that could not be recorded.
            StoreUnavailable: Some may be open still, to whom the kill does not hit.
        """
        only = KillTable(kills)
        hit: list[str] = []
        async for entries in self._store.scan():
            hit += [entry.record.session_id for entry in entries if _is_hit(entry, only)]
        closed = []
        for session_id in hit:
            ended = await self._store.close(session_id, "killed")
            self._fleet.forget(session_id, "killed")
            if ended is not None:
                closed.append(_closed(ended.record, "killed", 0))
        for start in range(0, len(closed), RECORDED_AT_ONCE):
            await asyncio.gather(*map(self._record, closed[start : start + RECORDED_AT_ONCE]))
        return len(closed)

    async def close_own(self, session_id: str, principal: Principal) -> int:
        """Close the caller's own session; where the store does not answer, what is held of it here.

        Raises:
            Refused: There is none of theirs, or as `close` says.
            AuditUnavailable: It is closed, but that could not be recorded.
        """
        try:
            await self.find(session_id, principal)
        except StoreUnavailable:
            entry = self._store.recall(session_id)
            if entry is None or not _is_owner(entry, principal):
                raise
        return await self.close(session_id, "closed")

    async def close(self, session_id: str, reason: str, *, due_at: float | None = None) -> int:
        """Destroy a session everywhere, then record it; return how many live calls were cut.

        With `due_at` only if it ends by then: it may have been used since somebody looked.

        Raises:
            AuditUnavailable: It is closed, but that could not be recorded.
            StoreUnavailable: It is closed here; the store hears of it before it is served again.
            Refused: It is closed here; a worker that does not answer closes it when it runs again.
        """
        try:
            entry = await self._store.close(session_id, reason, due_at=due_at)
        except StoreUnavailable:
            if due_at is None:  # an owner's word counts at once; time is the store's to judge
                await self._fleet.drop(session_id, reason)
            raise
        if entry is None:
            return 0
        cut = 0
        try:
            cut = await self._fleet.drop(session_id, reason)
        finally:
            await self._record(_closed(entry.record, reason, cut))
        return cut

    async def close_due(self) -> list[Refused | AuditUnavailable]:
        """Close every session whose time is over; return what went wrong with some."""
        now = self._clock.now()
        faults: list[Refused | AuditUnavailable] = []
        for session_id, reason in await self._store.due(now):
            try:
                await self.close(session_id, reason, due_at=now)
            except (Refused, AuditUnavailable) as error:
                faults.append(error)
        return faults


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
    changed = [(old, new) for old, new in pairs if new.revision != old.revision]
    return SessionRotated(
        session=record.session_id,
        tenant=record.tenant,
        issuer=record.issuer,
        subject=record.subject,
        credentials=_credentials(new for _, new in changed),
        replaced=tuple(old.fingerprint for old, _ in changed),
        deposit=form,
        overlap_seconds=max((new.overlap_seconds for _, new in changed), default=0),
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
