"""Records as processes hold them and tell each other: sealed credentials wrapped once more.

Between uses no process of a host holds what a session token could open: every `sealed` of a record
is wrapped under the boot key (`keys.boot_secrets`), which exists in memory that the kernel hides. It
is unwrapped to be changed, to be kept where other hosts read it, and, in a slot, to be used.

Wrapped form: nonce (12 bytes) ‖ ciphertext ‖ tag (16), AES-256-GCM. A random nonce is safe up to 2^32
wrappings under one key (SP 800-38D 8.3): a gateway that changed a thousand sessions a second would
reach that in fifty days, and draws a boot key at every start. No I/O.
"""

import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keys.envelope import Buffer
from keys.errors import UnsealFailed
from keys.session import SessionRecord

_NONCE_BYTES: Final = 12
_TAG_BYTES: Final = 16
WRAPPING_BYTES: Final = _NONCE_BYTES + _TAG_BYTES
"""How much longer the wrapped form is."""


class Wrapping:
    """Wraps under one boot key, which is never copied here. Prints nothing of it."""

    __slots__ = ("_boot_key",)

    def __init__(self, boot_key: Buffer) -> None:
        self._boot_key = boot_key

    def wrap(self, record: SessionRecord) -> SessionRecord:
        """Return the record as it is held."""
        return _each_sealed(record, self._wrap)

    def unwrap(self, record: SessionRecord) -> SessionRecord:
        """Return the record as it was sealed.

        Raises:
            UnsealFailed: It was not wrapped under this key.
        """
        return _each_sealed(record, self._unwrap)

    def unwrap_into(self, wrapped: Buffer, out: memoryview) -> None:
        """Lay the sealed form out, `WRAPPING_BYTES` shorter.

        Raises:
            UnsealFailed: It was not wrapped under this key.
        """
        view = memoryview(wrapped)
        if len(view) < WRAPPING_BYTES:
            raise UnsealFailed
        try:
            AESGCM(self._boot_key).decrypt_into(view[:_NONCE_BYTES], view[_NONCE_BYTES:], None, out)
        except InvalidTag:
            raise UnsealFailed from None

    def _wrap(self, sealed: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + AESGCM(self._boot_key).encrypt(nonce, sealed, None)

    def _unwrap(self, wrapped: bytes) -> bytes:
        sealed = bytearray(max(0, len(wrapped) - WRAPPING_BYTES))
        self.unwrap_into(wrapped, memoryview(sealed))
        return bytes(sealed)

    def __repr__(self) -> str:
        """Return nothing of the key."""
        return "Wrapping(…)"


def _each_sealed(record: SessionRecord, change: Callable[[bytes], bytes]) -> SessionRecord:
    changed = (replace(each, sealed=change(each.sealed)) for each in record.credentials)
    return replace(record, credentials=tuple(changed))
