"""The worker's side of custody: records wrapped once more, and the moment of use.

What a worker holds of a session is wrapped under the boot key (`keys.boot_secrets`), never copied here,
so that a dump of the worker's ordinary memory opens nothing even with a token in it. `compose_head`
is the one way out: it lays an upstream head with the credential out in a slot. No I/O.
"""

import secrets
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keys.envelope import KEY_BYTES, Buffer, derive_key_into, unseal_into
from keys.errors import NoCredential, UnknownSession, UnsealFailed
from keys.region import SecretRegion, Slot
from keys.session import SessionRecord

_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class _Wrapped:
    origin: str
    associated_data: bytes
    nonce: bytes
    ciphertext: bytearray


class SessionVault:
    """The sealed credentials of every open session, by session and provider."""

    def __init__(self, region: SecretRegion, boot_key: Buffer) -> None:
        self._region = region
        self._boot_key = boot_key
        self._sessions: dict[str, dict[str, _Wrapped]] = {}

    def __len__(self) -> int:
        """Return how many sessions are held."""
        return len(self._sessions)

    def put(self, record: SessionRecord) -> None:
        """Hold a session's credentials, in place of an earlier generation's."""
        self.drop(record.session_id)
        wrapped = {}
        for each in record.credentials:
            nonce = secrets.token_bytes(_NONCE_BYTES)
            cipher = AESGCM(self._boot_key)
            wrapped[each.provider] = _Wrapped(
                each.origin,
                record.binding(each.provider, each.origin).to_associated_data(),
                nonce,
                bytearray(cipher.encrypt(nonce, each.sealed, None)),
            )
        self._sessions[record.session_id] = wrapped

    def drop(self, session_id: str) -> bool:
        """Overwrite and forget a session's credentials; return whether there were any."""
        session = self._sessions.pop(session_id, None)
        if session is None:
            return False
        for wrapped in session.values():
            wrapped.ciphertext[:] = bytes(len(wrapped.ciphertext))
        return True

    def compose_head(  # noqa: PLR0913, PLR0917 - the parts of one head
        self,
        session_id: str,
        session_secret: Buffer,
        provider: str,
        origin: str,
        before: bytes,
        after: bytes,
    ) -> Slot:
        """Return a slot whose view is `before`, the credential, `after`; the caller releases it.

        Raises:
            UnknownSession: The session is not, or no longer, held here.
            NoCredential: It holds no key for this provider at this origin.
            UnsealFailed: The secret is not this session's.
            RegionExhausted: Every slot is in use.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSession
        wrapped = session.get(provider)
        if wrapped is None or wrapped.origin != origin:
            raise NoCredential
        slot = self._region.lease()
        try:
            slot.use(self._compose(slot.whole, wrapped, session_id, session_secret, before, after))
        except BaseException:
            slot.use(len(slot.whole))  # whatever was written, wipe all of it
            slot.release()
            raise
        return slot

    def _compose(  # noqa: PLR0913, PLR0917 - the parts of one head
        self,
        memory: memoryview,
        wrapped: _Wrapped,
        session_id: str,
        session_secret: Buffer,
        before: bytes,
        after: bytes,
    ) -> int:
        # From the far end inwards lie, for this moment, the derived key and the sealed credential:
        # not even ciphertext that a token could open ever touches ordinary memory.
        start, size = len(before), len(wrapped.ciphertext) - _TAG_BYTES
        scratch = memory[len(memory) - KEY_BYTES - size :]
        sealed, key = scratch[:size], scratch[size:]
        room = len(memory) - len(scratch) - start - len(after)
        if room < size:
            raise UnsealFailed
        try:
            AESGCM(self._boot_key).decrypt_into(wrapped.nonce, wrapped.ciphertext, None, sealed)
            derive_key_into(session_secret, session_id, key)
            length = unseal_into(key, sealed, wrapped.associated_data, memory[start : start + room])
        except InvalidTag:  # pragma: no cover - only a defect or flipped memory leads here
            raise UnsealFailed from None
        finally:
            scratch[:] = bytes(len(scratch))
        memory[:start] = before
        end = start + length
        memory[end : end + len(after)] = after
        return end + len(after)
