"""A C2SP tlog-proof: one event, its way to the root, and the checkpoint above it. No I/O.

The format's `extra` line, which proves nothing by itself, carries what a stranger needs to read the
rest: the event as it stands in the log, and the deployment key's word for the log's own keys.
"""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Final, Self

from gateway.audit.checkpoint import Checkpoint
from gateway.audit.tree import leaf_hash, verify_inclusion
from gateway.audit.trust import Delegated
from keys.signing import Verifier

HEADER: Final = "c2sp.org/tlog-proof@v1"
MEDIA_TYPE: Final = "text/plain"
MAX_PROOF_LINES: Final = 63


class MalformedProof(ValueError):
    """A text that is not a proof as it is written here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventProof:
    """One event of one log, and why to believe that it is there."""

    index: int
    hashes: tuple[bytes, ...]
    note: str
    event: str
    delegation: str

    def to_text(self) -> str:
        """Return the `.tlog-proof` (https://c2sp.org/tlog-proof)."""
        extra = json.dumps({"event": self.event, "delegation": self.delegation}).encode()
        lines = [
            HEADER,
            f"extra {base64.b64encode(extra).decode()}",
            f"index {self.index}",
            *(base64.b64encode(each).decode() for each in self.hashes),
        ]
        return "\n".join(lines) + "\n\n" + self.note

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Return what a proof claims.

        Raises:
            MalformedProof: It is none, or none of ours.
        """
        head, separator, note = text.partition("\n\n")
        header, _, rest = head.partition("\n")
        extra, _, rest = rest.partition("\n")
        index, *hashes = rest.split("\n")
        number = index.removeprefix("index ")
        if header != HEADER or not separator or len(hashes) > MAX_PROOF_LINES:
            raise MalformedProof("not a tlog-proof")
        if index == number or not number.isascii() or not number.isdigit():
            raise MalformedProof("no index")
        try:
            said = json.loads(base64.b64decode(extra.removeprefix("extra "), validate=True))
            proof = cls(
                index=int(number),
                hashes=tuple(base64.b64decode(each, validate=True) for each in hashes),
                note=note,
                event=said["event"],
                delegation=said["delegation"],
            )
        except (binascii.Error, ValueError, KeyError, TypeError):
            raise MalformedProof("not a proof that carries its event") from None
        if proof.to_text() != text:
            raise MalformedProof("not the one spelling of a proof")
        return proof

    def verify(self, deployment: Verifier) -> Checkpoint:
        """Return the checkpoint under which the event is, by the deployment's key.

        Raises:
            BadSignature, MalformedPolicy: The key does not vouch for the log, or the log and its clock
                did not sign.
            MalformedCheckpoint: What it signed is no checkpoint.
            ProofRefused: The event is not where the proof says.
        """
        keys = Delegated.from_note(self.delegation, deployment)
        checkpoint = Checkpoint.from_note(self.note, keys.log)
        keys.clock.time_of(self.note)
        leaf = leaf_hash(self.event.encode())
        verify_inclusion(leaf, self.index, checkpoint.size, self.hashes, checkpoint.root)
        return checkpoint
