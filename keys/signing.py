"""Ed25519 signatures in the form of C2SP signed notes: keys, key ids, signature lines.

A note is text that ends in a line feed, an empty line, and signature lines
`— <name> base64(key id ‖ signature)` (https://c2sp.org/signed-note). The key id is the first four
bytes of SHA-256(name ‖ 0x0A ‖ kind ‖ public key). Two kinds of key sign here: 0x01 signs the text
itself; 0x04, a cosigner, signs a checkpoint and the time at which it saw it
(https://c2sp.org/tlog-cosignature). Lines of keys that nobody asked for are passed over, as the
format demands, but every line must be spelt as it is written here. No I/O.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_ED25519: Final = b"\x01"
_COSIGNATURE: Final = b"\x04"
_DASH: Final = "\u2014"

MAX_SIGNATURES: Final = 64
"""On one note; the format asks for 16 at least."""


class BadSignature(Exception):
    """A note that is not signed by the expected key, or not a note."""

    code = "bad_signature"


def _key_id(name: str, kind: bytes, public: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + kind + public).digest()[:4]


def _vkey(name: str, kind: bytes, public: bytes) -> str:
    encoded = base64.b64encode(kind + public).decode()
    return f"{name}+{_key_id(name, kind, public).hex()}+{encoded}"


def is_key_name(name: str) -> bool:
    """Return whether the text may name a key: no space, no plus, not empty."""
    return bool(name) and "+" not in name and not any(char.isspace() for char in name)


@dataclass(frozen=True, slots=True)
class Note:
    """A text and what stands below it, before anybody has verified anything."""

    text: str
    lines: tuple[str, ...]

    @classmethod
    def from_text(cls, note: str) -> Self:
        """Return the parts of a note.

        Raises:
            BadSignature: It is not a note, or is spelt in another way than it is written here.
        """
        text, separator, signatures = note.rpartition("\n\n")
        if not separator or not signatures.endswith("\n"):
            raise BadSignature("not a signed note")
        lines = tuple(signatures[:-1].split("\n"))
        if len(lines) > MAX_SIGNATURES:
            raise BadSignature("more signatures than a note may have")
        for line in lines:
            _read_line(line)
        return cls(text + "\n", lines)

    def signatures_of(self, name: str, key_id: bytes) -> list[bytes]:
        """Return what the key of this name and id signed."""
        read = map(_read_line, self.lines)
        return [blob[4:] for named, blob in read if named == name and blob[:4] == key_id]


def _read_line(line: str) -> tuple[str, bytes]:
    dash, _, rest = line.partition(" ")
    name, _, encoded = rest.partition(" ")
    try:
        blob = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise BadSignature("not a signature line") from None
    # Base64 has unused bits: another spelling of the same bytes was not written by us.
    is_canonical = base64.b64encode(blob).decode() == encoded
    if dash != _DASH or not is_key_name(name) or len(blob) <= 4 or not is_canonical:
        raise BadSignature("not a signature line")
    return name, blob


class _PrivateKey:
    """A private key and its name. Prints only its public side."""

    __slots__ = ("_private", "name", "public")
    _kind: ClassVar[bytes]

    def __init__(self, name: str, seed: bytes) -> None:
        """Take a name and the 32-byte seed of an Ed25519 key."""
        if not is_key_name(name):
            raise ValueError("not a key name")
        self.name = name
        self._private = Ed25519PrivateKey.from_private_bytes(seed)
        self.public = self._private.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        """Return the public side."""
        return f"{type(self).__name__}({self.vkey})"

    @property
    def vkey(self) -> str:
        """Return the verification key: `name+hex(key id)+base64(kind ‖ public key)`."""
        return _vkey(self.name, self._kind, self.public)

    def _line(self, signature: bytes) -> str:
        blob = _key_id(self.name, self._kind, self.public) + signature
        return f"{_DASH} {self.name} {base64.b64encode(blob).decode()}\n"


class Signer(_PrivateKey):
    """Signs notes."""

    __slots__ = ()
    _kind = _ED25519

    def sign_note(self, text: str) -> str:
        """Return the note of `text`, which must end in a line feed."""
        return text + "\n" + self._line(self._private.sign(text.encode()))


class Cosigner(_PrivateKey):
    """Says when it saw a checkpoint."""

    __slots__ = ()
    _kind = _COSIGNATURE

    def cosign(self, text: str, at: int) -> str:
        """Return the signature line for a checkpoint's text, seen at `at` seconds since the epoch."""
        signature = self._private.sign(_cosigned(text, at))
        return self._line(at.to_bytes(8, "big") + signature)


def _cosigned(text: str, at: int) -> bytes:
    return f"cosignature/v1\ntime {at}\n{text}".encode()


class _PublicKey:
    """A public key and its name."""

    __slots__ = ("_key", "name", "public")
    _kind: ClassVar[bytes]

    def __init__(self, name: str, public: bytes) -> None:
        self.name = name
        self.public = public
        self._key = Ed25519PublicKey.from_public_bytes(public)

    @property
    def vkey(self) -> str:
        """Return the key as `from_vkey` reads it."""
        return _vkey(self.name, self._kind, self.public)

    @property
    def key_id(self) -> bytes:
        """Return the four bytes that name the key beside its name."""
        return _key_id(self.name, self._kind, self.public)

    @classmethod
    def from_vkey(cls, vkey: str) -> Self:
        """Return the verifier that a vkey names.

        Raises:
            ValueError: It is not a vkey of this kind, or its key id is not its own.
        """
        name, _, rest = vkey.strip().partition("+")
        key_id, _, encoded = rest.partition("+")
        try:
            key = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            raise ValueError("not a verification key") from None
        if not is_key_name(name) or len(key) != 33 or key[:1] != cls._kind:
            raise ValueError(f"not a verification key of kind {cls._kind[0]}")
        if _key_id(name, cls._kind, key[1:]).hex() != key_id:
            raise ValueError("the verification key's id does not match its key")
        return cls(name, key[1:])

    def _verify(self, signature: bytes, message: bytes) -> None:
        try:
            self._key.verify(signature, message)
        except InvalidSignature:
            raise BadSignature("the signature does not match") from None


class Verifier(_PublicKey):
    """Opens the notes of one key."""

    __slots__ = ()
    _kind = _ED25519

    def open_note(self, note: str) -> str:
        """Return the text of a note that this key signed, whoever else did.

        Raises:
            BadSignature: It did not, or this is no note.
        """
        parts = Note.from_text(note)
        signatures = parts.signatures_of(self.name, self.key_id)
        if not signatures:
            raise BadSignature("the note is not signed by this key")
        for signature in signatures:
            self._verify(signature, parts.text.encode())
        return parts.text


class CosignatureVerifier(_PublicKey):
    """Reads when one cosigner saw a checkpoint."""

    __slots__ = ()
    _kind = _COSIGNATURE

    def time_of(self, note: str) -> int:
        """Return the latest time, in seconds since the epoch, that this key put on the note.

        Raises:
            BadSignature: It put none, or this is no note.
        """
        parts = Note.from_text(note)
        blobs = parts.signatures_of(self.name, self.key_id)
        if not blobs:
            raise BadSignature("the note is not cosigned by this key")
        times = []
        for blob in blobs:
            at = int.from_bytes(blob[:8], "big")
            self._verify(blob[8:], _cosigned(parts.text, at))
            times.append(at)
        return max(times)
