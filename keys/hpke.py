"""Sealed deposits: keys that come encrypted to this process, past whatever ends TLS before it.

HPKE (RFC 9180), base mode, one shot: DHKEM(X25519) or MLKEM768-X25519, HKDF-SHA256, AES-256-GCM.
`info` binds the version of this form, the deployment, the key's id, and who may deposit: under any
other of them the ciphertext does not open. (All of it stands in `info`, and the associated data is
empty, so that every library's one-shot interface can be the client.)

Laws of this file:
- a key lives `LIFETIME_SECONDS`, a younger one takes its place after `ROTATION_SECONDS`, and what
  is too old is forgotten: nobody opens later what was recorded today;
- a ciphertext opens once; its hash is kept as long as the key that opened it.

No I/O.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, Suite

from keys.errors import AlreadyOpened, DoesNotOpen, TooManyOpened, UnknownDepositKey

LIFETIME_SECONDS: Final = 600
ROTATION_SECONDS: Final = 300
"""Whoever fetched a key just before another took its place still has half its life to use it."""

MAX_OPENED: Final = 65_536
"""Hashes of opened ciphertexts that are kept, about 6 MB; a hundred deposits a second reach it."""

_VERSION: Final = "veklom deposit v1"


class Kem(StrEnum):
    """How a key is agreed upon; the second holds against quantum computers, too."""

    X25519 = "x25519"
    MLKEM768_X25519 = "mlkem768-x25519"


KDF_NAME: Final = "hkdf-sha256"
AEAD_NAME: Final = "aes-256-gcm"

_SUITES: Final = {
    Kem.X25519: Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
    Kem.MLKEM768_X25519: Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM),
}


def deposit_info(audience: str, kid: str, issuer: str, subject: str) -> bytes:
    """Return what a deposit is bound to: each part behind its length, four bytes, big-endian."""
    parts = [part.encode() for part in (_VERSION, audience, kid, issuer, subject)]
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedDeposit:
    """A deposit as it came in: `ciphertext` begins with the encapsulated key."""

    kid: str
    kem: str
    ciphertext: bytes


class DepositKey:
    """One key pair. Prints only its id."""

    __slots__ = ("_private", "created_at", "kem", "kid", "public")

    def __init__(
        self,
        kem: Kem,
        private: X25519PrivateKey | MLKEM768X25519PrivateKey,
        public: bytes,
        created_at: float,
    ) -> None:
        self.kem = kem
        self._private = private
        self.public = public
        self.kid = hashlib.sha256(kem.encode() + b"\0" + public).hexdigest()[:16]
        self.created_at = created_at

    def __repr__(self) -> str:
        """Return the id."""
        return f"DepositKey({self.kid})"

    @property
    def expires_at(self) -> int:
        """Until when it opens anything, in seconds since the epoch."""
        return int(self.created_at) + LIFETIME_SECONDS

    @classmethod
    def generate(cls, kem: Kem, now: float) -> Self:
        """Return a fresh key pair.

        Raises:
            UnsupportedAlgorithm: The cryptography that is installed does not offer this one.
        """
        classical = X25519PrivateKey.generate()
        public = classical.public_key().public_bytes_raw()
        if kem is Kem.X25519:
            return cls(kem, classical, public, now)
        lattice = MLKEM768PrivateKey.generate()
        both = lattice.public_key().public_bytes_raw() + public
        return cls(kem, MLKEM768X25519PrivateKey(lattice, classical), both, now)

    def open(self, ciphertext: bytes, info: bytes) -> bytearray:
        """Return the plaintext, for the caller to wipe.

        Raises:
            DoesNotOpen: It was sealed for another key or caller, or was altered.
        """
        try:
            return bytearray(_SUITES[self.kem].decrypt(ciphertext, self._private, info))
        except (InvalidTag, ValueError):
            raise DoesNotOpen from None


class DepositKeyRing:
    """The keys to which deposits may be sealed now, and what was opened with them."""

    def __init__(self, audience: str, *, max_opened: int = MAX_OPENED) -> None:
        self.audience = audience
        self._max_opened = max_opened
        self._keys: dict[str, DepositKey] = {}
        self._opened: dict[str, set[bytes]] = {}
        self._newest: tuple[DepositKey, ...] = ()

    def current(self, now: float) -> Sequence[DepositKey]:
        """Return the newest key of each kind, drawing them anew when they are due."""
        self.forget_expired(now)
        if not self._newest or now >= self._newest[0].created_at + ROTATION_SECONDS:
            self._newest = _generate_all(now)
            for key in self._newest:
                self._keys[key.kid] = key
                self._opened[key.kid] = set()
        return self._newest

    def forget_expired(self, now: float) -> None:
        """Forget every key that is too old, and what it opened."""
        for kid in [kid for kid, key in self._keys.items() if key.expires_at <= now]:
            del self._keys[kid], self._opened[kid]
        if self._newest and self._newest[0].kid not in self._keys:
            self._newest = ()

    def open(self, sealed: SealedDeposit, issuer: str, subject: str, now: float) -> bytearray:
        """Return the plaintext of a deposit, once, for the caller to wipe.

        Raises:
            UnknownDepositKey: The key is not, or no longer, one of these.
            AlreadyOpened: It was opened before.
            DoesNotOpen: It was sealed for another deployment or caller, or was altered.
            TooManyOpened: No more can be remembered for now.
        """
        self.forget_expired(now)
        key = self._keys.get(sealed.kid)
        if key is None or key.kem != sealed.kem:
            raise UnknownDepositKey
        seal = hashlib.sha256(sealed.ciphertext).digest()
        opened = self._opened[key.kid]
        if seal in opened:
            raise AlreadyOpened
        if sum(map(len, self._opened.values())) >= self._max_opened:
            raise TooManyOpened
        plain = key.open(sealed.ciphertext, deposit_info(self.audience, key.kid, issuer, subject))
        opened.add(seal)
        return plain


def _generate_all(now: float) -> tuple[DepositKey, ...]:
    keys = [DepositKey.generate(Kem.X25519, now)]
    try:
        keys.append(DepositKey.generate(Kem.MLKEM768_X25519, now))
    except UnsupportedAlgorithm:  # pragma: no cover - an OpenSSL without ML-KEM
        pass
    return tuple(keys)
