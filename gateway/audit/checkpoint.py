"""A signed tree head in the form of C2SP tlog-checkpoint: origin, size, root, signatures. No I/O."""

import base64
import binascii
from dataclasses import dataclass
from typing import Self

from keys.signing import Note, Signer, Verifier


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
        return cls.from_text(verifier.open_note(note))

    @classmethod
    def claimed_by(cls, note: str) -> Self:
        """Return what a note says whose signatures nobody has looked at yet.

        Raises:
            BadSignature: It is no note.
            MalformedCheckpoint: It is no checkpoint in canonical form.
        """
        return cls.from_text(Note.from_text(note).text)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return the checkpoint of a note's text.

        Raises:
            MalformedCheckpoint: It is none in canonical form.
        """
        lines = text.split("\n")
        if len(lines) != 4 or not lines[1].isascii() or not lines[1].isdigit():
            raise MalformedCheckpoint("not three lines of origin, size and root")
        try:
            root = base64.b64decode(lines[2], validate=True)
        except (binascii.Error, ValueError):
            raise MalformedCheckpoint("the root is not base64") from None
        checkpoint = cls(lines[0], int(lines[1]), root)
        if checkpoint.to_text() != text or len(root) != 32:
            raise MalformedCheckpoint("not in canonical form")
        return checkpoint
