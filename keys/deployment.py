"""What replicas of one deployment have in common: a key for each purpose, and proof of origin.

The deployment key names credentials (`keys.session.fingerprint`). From it come, by the one-step KDF of
SP 800-56C with SHA-256 and the purpose as input, the seed that signs session tokens in a fleet and
the key that authenticates what replicas leave in a shared store. Whoever can write to that store but
lacks the deployment key can delete and repeat what was said there, and forge nothing.

Authenticated form: HMAC-SHA-256 (32 bytes) ‖ body. The MAC covers what kind of thing it is and
whose, each behind its length, so that nothing passes for something else. No I/O.
"""

import hashlib
import hmac
from typing import Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash

from keys.envelope import KEY_BYTES, Buffer
from keys.errors import Forged

MAC_BYTES: Final = 32

TOKEN_SEED: Final = b"veklom session token seed v1"
STORE: Final = b"veklom store authentication v1"


def derive(deployment_key: Buffer, purpose: bytes) -> bytes:
    """Return the deployment's key for one purpose."""
    return ConcatKDFHash(SHA256(), KEY_BYTES, purpose).derive(deployment_key)


class Authenticator:
    """Makes and checks the authenticated form, within one space of names. Prints no key."""

    __slots__ = ("_key", "_space")

    def __init__(self, deployment_key: Buffer, space: str) -> None:
        """Take the deployment key, and the space in which what is authenticated counts."""
        self._key = derive(deployment_key, STORE)
        self._space = space

    def __repr__(self) -> str:
        """Return the space only."""
        return f"Authenticator({self._space})"

    def mac(self, kind: str, name: str, body: bytes) -> bytes:
        """Return the MAC of `body`, as a `kind` of thing called `name`."""
        mac = hmac.new(self._key, digestmod=hashlib.sha256)
        for part in (self._space.encode(), kind.encode(), name.encode(), body):
            mac.update(len(part).to_bytes(8, "big") + part)
        return mac.digest()

    def protect(self, kind: str, name: str, body: bytes) -> bytes:
        """Return the authenticated form of `body`."""
        return self.mac(kind, name, body) + body

    def reveal(self, kind: str, name: str, protected: bytes) -> bytes:
        """Return the body.

        Raises:
            Forged: It was not made by a holder of the deployment key, or as something else.
        """
        mac, body = protected[:MAC_BYTES], protected[MAC_BYTES:]
        if not hmac.compare_digest(mac, self.mac(kind, name, body)):
            raise Forged
        return body
