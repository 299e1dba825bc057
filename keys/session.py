"""Opening, renewing and rotating: credentials in, a sealed record and a session secret out.

`SessionRecord` may be stored and relayed: it holds no secret. The session secret is for the session
token alone; whoever gets it here passes it on and wipes it. No I/O.
"""

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from keys.errors import NoCredential
from keys.secret import Secret


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedCredential:
    """One provider's key, sealed for one origin at the session's `revision`.

    `overlap_seconds` is how long calls under way may go on with the key that this one replaced.
    """

    provider: str
    origin: str
    fingerprint: str
    revision: int
    overlap_seconds: int = 0
    sealed: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRecord:
    """What is kept of a session; instants in seconds since the epoch.

    `generation` counts its tokens, `revision` every change of the record.
    """

    session_id: str
    tenant: str
    issuer: str
    subject: str
    generation: int
    revision: int
    created_at: int
    expires_at: int
    idle_seconds: int
    credentials: tuple[SealedCredential, ...]

    def binding(self, provider: str, origin: str, revision: int) -> Binding:
        """Return what a credential of this session is bound to, sealed at `revision`."""
        return Binding(
            tenant=self.tenant,
            issuer=self.issuer,
            subject=self.subject,
            provider=provider,
            origin=origin,
            session_id=self.session_id,
            generation=self.generation,
            revision=revision,
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
    with _sealing_key(session_secret, blank.session_id) as key:
        credentials = tuple(_seal(blank, each, key, fingerprint_key) for each in deposits)
    return replace(blank, credentials=credentials), session_secret


def renew_session(record: SessionRecord, session_secret: Buffer, expires_at: int) -> SessionRecord:
    """Return the record's next generation, sealed under the same secret with another expiry.

    Raises:
        UnsealFailed: The secret is not this record's.
    """
    renewed = replace(
        record,
        generation=record.generation + 1,
        revision=record.revision + 1,
        expires_at=expires_at,
    )
    with _sealing_key(session_secret, record.session_id) as key:
        credentials = tuple(_reseal(each, record, renewed, key) for each in record.credentials)
    return replace(renewed, credentials=credentials)


def rotate_session(
    record: SessionRecord,
    session_secret: Buffer,
    deposits: Sequence[Deposit],
    fingerprint_key: Buffer,
    overlap_seconds: int,
) -> SessionRecord:
    """Return the record's next revision, in which each deposit replaces its provider's key.

    The generation stays, and with it the token: whoever calls with it calls with the new key.

    Raises:
        NoCredential: The session holds no key for one of these providers.
        UnsealFailed: The secret is not this record's.
    """
    replaced = {each.provider: each for each in deposits}
    if not replaced.keys() <= {each.provider for each in record.credentials}:
        raise NoCredential
    rotated = replace(record, revision=record.revision + 1)
    credentials = []
    with _sealing_key(session_secret, record.session_id) as key:
        for each in record.credentials:
            deposit = replaced.get(each.provider)
            if deposit is None:
                credentials.append(each)
                continue
            # Its key must open what is replaced: nobody but the token's owner may replace it.
            _reseal(each, record, rotated, key)
            sealed = _seal(rotated, deposit, key, fingerprint_key)
            credentials.append(replace(sealed, overlap_seconds=overlap_seconds))
    return replace(rotated, credentials=tuple(credentials))


@contextmanager
def _sealing_key(session_secret: Buffer, session_id: str) -> Iterator[bytearray]:
    """Give out the session's sealing key, and wipe it."""
    key = bytearray(KEY_BYTES)
    derive_key_into(session_secret, session_id, memoryview(key))
    try:
        yield key
    finally:
        key[:] = bytes(KEY_BYTES)


def _seal(
    record: SessionRecord, deposit: Deposit, key: Buffer, fingerprint_key: Buffer
) -> SealedCredential:
    credential = deposit.credential.reveal()
    binding = record.binding(deposit.provider, deposit.origin, record.revision)
    return SealedCredential(
        provider=deposit.provider,
        origin=deposit.origin,
        fingerprint=fingerprint(fingerprint_key, deposit.provider, credential),
        revision=record.revision,
        sealed=seal(key, credential, binding.to_associated_data()),
    )


def _reseal(
    each: SealedCredential, record: SessionRecord, renewed: SessionRecord, key: Buffer
) -> SealedCredential:
    old = record.binding(each.provider, each.origin, each.revision)
    new = renewed.binding(each.provider, each.origin, renewed.revision)
    with Secret(bytes(len(each.sealed) - OVERHEAD_BYTES)) as plain:
        unseal_into(key, each.sealed, old.to_associated_data(), plain.reveal())
        sealed = seal(key, plain.reveal(), new.to_associated_data())
    return replace(each, revision=renewed.revision, sealed=sealed)
