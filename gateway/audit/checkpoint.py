"""A signed tree head in the form of C2SP tlog-checkpoint: origin, size, root, signature. No I/O."""

import base64
import binascii
from dataclasses import dataclass
from typing import Self

from keys.signing import Signer, Verifier


class MalformedCheckpoint(ValueError):
    """A signed text that is not a checkpoint as we write them."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log committed to: its first `size` leaves have this root."""

    origin: str
    size: int
    root: bytes

    def to_text(self) -> str:
        """Return the note's text (https://c2sp.org/tlog-checkpoint)."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    def sign(self, signer: Signer) -> str:
        """Return the signed note."""
        return signer.sign_note(self.to_text())

    @classmethod
    def from_note(cls, note: str, verifier: Verifier) -> Self:
        """Return the checkpoint of a note.

        Raises:
            BadSignature: The key did not sign it.
            MalformedCheckpoint: It is signed, but is no checkpoint in canonical form.
        """
        text = verifier.open_note(note)
        lines = text.split("\n")
        if len(lines) != 4 or not lines[1].isascii() or not lines[1].isdigit():
            raise MalformedCheckpoint("not three lines of origin, size and root")
        try:
            root = base64.b64decode(lines[2], validate=True)
        except binascii.Error:
            raise MalformedCheckpoint("the root is not base64") from None
        checkpoint = cls(lines[0], int(lines[1]), root)
        if checkpoint.to_text() != text or len(root) != 32:
            raise MalformedCheckpoint("not in canonical form")
        return checkpoint
