"""`/.well-known/veklom-hpke`: the keys to which deposits may be sealed, signed by the deployment.

The document is a C2SP signed note by the key that auditors pin. Its first line, `veklom.hpke.v1` and
the deployment's name with a space between, is no checkpoint's: an origin holds no space. So neither
can be passed off as the other.
"""

from typing import Final

from gateway.api.deposits import to_base64url
from gateway.clock import Clock
from gateway.errors import Refused
from gateway.providers.dialect import to_json
from keys.errors import CustodyError
from keys.hpke import AEAD_NAME, KDF_NAME, DepositKey, DepositKeyRing, SealedDeposit
from keys.signing import Signer
from policies.request import Principal

CONTEXT: Final = "veklom.hpke.v1"

_SAID: Final = {
    "unknown_kid": "Seal to a key that /.well-known/veklom-hpke publishes now.",
    "deposit_replayed": "This deposit was opened before; seal the keys again.",
    "deposit_not_opened": "The deposit is not sealed to this gateway for this caller.",
    "overloaded": "Too many deposits were opened.",
}


class DepositKeys:
    """Publishes the ring's keys, and opens what was sealed to them."""

    def __init__(self, ring: DepositKeyRing, signer: Signer, clock: Clock) -> None:
        self._ring = ring
        self._signer = signer
        self._clock = clock
        self._published: tuple[str, bytes] = ("", b"")

    def document(self) -> bytes:
        """Return the signed document, as JSON."""
        keys = self._ring.current(self._clock.now())
        kid, document = self._published
        if kid != keys[0].kid:
            listed = {
                "audience": self._ring.audience,
                "expires_at": min(key.expires_at for key in keys),
                "keys": [_to_public(key) for key in keys],
            }
            text = f"{CONTEXT} {self._ring.audience}\n{to_json(listed).decode()}\n"
            document = to_json({"note": self._signer.sign_note(text), "vkey": self._signer.vkey})
            self._published = keys[0].kid, document
        return document

    def open(self, sealed: SealedDeposit, principal: Principal) -> bytearray:
        """Return what the caller sealed, once, to be wiped.

        Raises:
            Refused: It does not open for this caller, or did before.
        """
        now = self._clock.now()
        try:
            return self._ring.open(sealed, principal.issuer, principal.subject, now)
        except CustodyError as error:
            waits = 60 if error.code == "overloaded" else None
            raise Refused(error.code, _SAID[error.code], retry_after_seconds=waits) from None

    def forget_expired(self) -> None:
        """Forget keys that are too old; called now and then."""
        self._ring.forget_expired(self._clock.now())


def _to_public(key: DepositKey) -> dict[str, object]:
    return {
        "kid": key.kid,
        "kem": key.kem,
        "kdf": KDF_NAME,
        "aead": AEAD_NAME,
        "public_key": to_base64url(key.public),
        "expires_at": key.expires_at,
    }
