"""Sealing a credential so that only its session secret opens it, and only where it belongs.

The sealing key is derived from the session secret S by the one-step KDF of SP 800-56C with SHA-256
(S is uniform, so one step is enough), with a purpose and the session id as input. AES-256-GCM
binds, as associated data, everything that says where the credential may go: tenant, issuer,
subject, provider, origin, session, generation, revision and expiry. Altered in any of them, it does
not open.

Sealed form: version (1 byte, 0x01) ‖ nonce (12) ‖ ciphertext ‖ tag (16). A random nonce is safe:
a derived key seals a handful of credentials, far below the 2^32 of SP 800-38D 8.3. No I/O.
"""

import secrets
from dataclasses import astuple, dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash

from keys.errors import UnsealFailed

Buffer = bytes | bytearray | memoryview

SECRET_BYTES: Final = 32
KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
_VERSION: Final = 1
OVERHEAD_BYTES: Final = 1 + _NONCE_BYTES + _TAG_BYTES
"""How much longer the sealed form is than the credential."""

_PURPOSE = b"veklom session credential v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """Where a sealed credential belongs; `expires_at` in seconds since the epoch."""

    tenant: str
    issuer: str
    subject: str
    provider: str
    origin: str
    session_id: str
    generation: int
    revision: int
    expires_at: int

    def to_associated_data(self) -> bytes:
        """Return an encoding in which no two bindings are alike: each part carries its length."""
        parts = [str(part).encode() for part in astuple(self)]
        return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def new_session_secret() -> bytearray:
    """Return a fresh, uniform session secret."""
    return bytearray(secrets.token_bytes(SECRET_BYTES))


def derive_key_into(session_secret: Buffer, session_id: str, out: memoryview) -> None:
    """Derive the session's sealing key into `out`, `KEY_BYTES` long."""
    info = _PURPOSE + b"\0" + session_id.encode()
    ConcatKDFHash(SHA256(), KEY_BYTES, info).derive_into(session_secret, out)


def seal(key: Buffer, credential: Buffer, associated_data: bytes) -> bytes:
    """Return `credential` sealed under `key`."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return bytes([_VERSION]) + nonce + AESGCM(key).encrypt(nonce, credential, associated_data)


def unseal_into(key: Buffer, sealed: Buffer, associated_data: bytes, out: memoryview) -> int:
    """Unseal into the start of `out`; return how many bytes were written.

    Raises:
        UnsealFailed: The key is not the one, or a single bit of anything bound differs.
    """
    view = memoryview(sealed)
    length = len(view) - OVERHEAD_BYTES
    if length < 0 or view[0] != _VERSION or length > len(out):
        raise UnsealFailed
    nonce, body = view[1 : 1 + _NONCE_BYTES], view[1 + _NONCE_BYTES :]
    try:
        AESGCM(key).decrypt_into(nonce, body, associated_data, out[:length])
    except InvalidTag:
        raise UnsealFailed from None
    return length
