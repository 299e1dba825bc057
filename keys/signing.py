"""Ed25519 signatures in the form of C2SP signed notes: keys, key ids, signature lines.

A note is text that ends in a line feed, an empty line, and signature lines
`— <name> base64(key id ‖ signature)` (https://c2sp.org/signed-note). The key id is the first four
bytes of SHA-256(name ‖ 0x0A ‖ 0x01 ‖ public key). Parsing refuses every spelling but the one that
`sign_note` writes: a note that reads back differently was not written by us. No I/O.
"""

import base64
import binascii
import hashlib
from typing import Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_ED25519: Final = b"\x01"
_DASH: Final = "\u2014"


class BadSignature(Exception):
    """A note that is not signed by the expected key, or not a note."""

    code = "bad_signature"


def _key_id(name: str, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + _ED25519 + public).digest()[:4]


def is_key_name(name: str) -> bool:
    """Return whether the text may name a key: no space, no plus, not empty."""
    return bool(name) and "+" not in name and not any(char.isspace() for char in name)


class Signer:
    """A private key and its name; signs notes. Prints only its public side."""

    __slots__ = ("_private", "name", "public")

    def __init__(self, name: str, seed: bytes) -> None:
        """Take a name and the 32-byte seed of an Ed25519 key."""
        if not is_key_name(name):
            raise ValueError("not a key name")
        self.name = name
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._private.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        """Return the public side."""
        return f"Signer({self.vkey})"

    @property
    def vkey(self) -> str:
        """Return the verification key: `name+hex(key id)+base64(0x01 ‖ public key)`."""
        encoded = base64.b64encode(_ED25519 + self.public).decode()
        return f"{self.name}+{_key_id(self.name, self.public).hex()}+{encoded}"

    def sign_note(self, text: str) -> str:
        """Return the note of `text`, which must end in a line feed."""
        signature = self._private.sign(text.encode())
        return text + "\n" + _signature_line(self.name, self.public, signature)


class Verifier:
    """A public key and its name; opens notes."""

    __slots__ = ("_key", "name", "public")

    def __init__(self, name: str, public: bytes) -> None:
        self.name = name
        self.public = public
        self._key = Ed25519PublicKey.from_public_bytes(public)

    @classmethod
    def from_vkey(cls, vkey: str) -> Self:
        """Return the verifier that a vkey names.

        Raises:
            ValueError: It is not an Ed25519 vkey, or its key id is not its own.
        """
        name, _, rest = vkey.strip().partition("+")
        key_id, _, encoded = rest.partition("+")
        try:
            key = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            raise ValueError("not a verification key") from None
        if not is_key_name(name) or len(key) != 33 or key[:1] != _ED25519:
            raise ValueError("not an Ed25519 verification key")
        if _key_id(name, key[1:]).hex() != key_id:
            raise ValueError("the verification key's id does not match its key")
        return cls(name, key[1:])

    def open_note(self, note: str) -> str:
        """Return the text of a note that this key, and no other, signed.

        Raises:
            BadSignature: It did not, or the note is spelt in another way than `sign_note` does.
        """
        text, separator, line = note.rpartition("\n\n")
        if not separator:
            raise BadSignature("not a signed note")
        text += "\n"
        try:
            blob = base64.b64decode(line.rstrip("\n").rpartition(" ")[2], validate=True)
        except (binascii.Error, ValueError):
            raise BadSignature("not a signature line") from None
        if line != _signature_line(self.name, self.public, blob[4:]):
            raise BadSignature("the note is not signed by this key")
        try:
            self._key.verify(blob[4:], text.encode())
        except InvalidSignature:
            raise BadSignature("the signature does not match") from None
        return text


def _signature_line(name: str, public: bytes, signature: bytes) -> str:
    blob = base64.b64encode(_key_id(name, public) + signature).decode()
    return f"{_DASH} {name} {blob}\n"
