"""Opening and renewing a session: credentials in, a sealed record and a session secret out.

`SessionRecord` may be stored and relayed: it holds no secret. The session secret is for the session
token alone; whoever gets it here passes it on and wipes it. No I/O.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, replace

from keys.envelope import (
    KEY_BYTES,
    OVERHEAD_BYTES,
    Binding,
    Buffer,
    derive_key_into,
    new_session_secret,
    seal,
    unseal_into,
)
from keys.secret import Secret


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedCredential:
    """One provider's key, sealed for one origin."""

    provider: str
    origin: str
    fingerprint: str
    sealed: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """What is kept of a session; instants in seconds since the epoch."""

    session_id: str
    tenant: str
    issuer: str
    subject: str
    generation: int
    created_at: int
    expires_at: int
    idle_seconds: int
    credentials: tuple[SealedCredential, ...]

    def binding(self, provider: str, origin: str) -> Binding:
        """Return what a credential of this session is bound to."""
        return Binding(
            tenant=self.tenant,
            issuer=self.issuer,
            subject=self.subject,
            provider=provider,
            origin=origin,
            session_id=self.session_id,
            generation=self.generation,
            expires_at=self.expires_at,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Deposit:
    """A provider key as it came in: for one provider at one origin."""

    provider: str
    origin: str
    credential: Secret


def fingerprint(fingerprint_key: Buffer, provider: str, credential: Buffer) -> str:
    """Return a name for a key that says nothing about it: `v1:` and 128 bits of HMAC-SHA-256."""
    mac = hmac.new(bytes(fingerprint_key), provider.encode() + b"\0", hashlib.sha256)
    mac.update(credential)
    return f"v1:{mac.hexdigest()[:32]}"


def seal_session(
    blank: SessionRecord, deposits: Sequence[Deposit], fingerprint_key: Buffer
) -> tuple[SessionRecord, bytearray]:
    """Return `blank` with every deposit sealed in it, and the session secret that opens them."""
    session_secret = new_session_secret()
    key = bytearray(KEY_BYTES)
    derive_key_into(session_secret, blank.session_id, memoryview(key))
    try:
        credentials = tuple(
            SealedCredential(
                provider=deposit.provider,
                origin=deposit.origin,
                fingerprint=fingerprint(
                    fingerprint_key, deposit.provider, deposit.credential.reveal()
                ),
                sealed=seal(
                    key,
                    deposit.credential.reveal(),
                    blank.binding(deposit.provider, deposit.origin).to_associated_data(),
                ),
            )
            for deposit in deposits
        )
    finally:
        key[:] = bytes(KEY_BYTES)
    return replace(blank, credentials=credentials), session_secret


def renew_session(record: SessionRecord, session_secret: Buffer, expires_at: int) -> SessionRecord:
    """Return the record's next generation, sealed under the same secret with a later expiry.

    Raises:
        UnsealFailed: The secret is not this record's.
    """
    renewed = replace(record, generation=record.generation + 1, expires_at=expires_at)
    key = bytearray(KEY_BYTES)
    derive_key_into(session_secret, record.session_id, memoryview(key))
    credentials = []
    try:
        for each in record.credentials:
            old = record.binding(each.provider, each.origin).to_associated_data()
            new = renewed.binding(each.provider, each.origin).to_associated_data()
            with Secret(bytes(len(each.sealed) - OVERHEAD_BYTES)) as plain:
                unseal_into(key, each.sealed, old, plain.reveal())
                credentials.append(replace(each, sealed=seal(key, plain.reveal(), new)))
    finally:
        key[:] = bytes(KEY_BYTES)
    return replace(renewed, credentials=tuple(credentials))
