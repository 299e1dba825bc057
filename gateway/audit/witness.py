"""C2SP tlog-witness, both sides: what a log asks of a witness, and what a witness answers. No I/O.

A witness remembers, for each log, the largest tree it has seen, and cosigns only what grows out of it:
a log that was cut back, or that shows different people different histories, is refused
(https://c2sp.org/tlog-witness).
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from gateway.audit.checkpoint import Checkpoint, MalformedCheckpoint
from gateway.audit.tree import EMPTY_ROOT, ProofRefused, verify_consistency
from keys.signing import BadSignature, Cosigner, Verifier

MAX_PROOF_LINES: Final = 63
MAX_REQUEST_BYTES: Final = 64 * 1024
"""The proof takes 3 KiB at most; the rest is for signatures."""

SIZE_TYPE: Final = "text/x.tlog.size"


class MalformedRequest(ValueError):
    """Not a request to add a checkpoint."""


def to_request(old: int, proof: Sequence[bytes], note: str) -> bytes:
    """Return the body that asks a witness which has seen `old` leaves to cosign a checkpoint."""
    lines = "".join(base64.b64encode(each).decode() + "\n" for each in proof)
    return f"old {old}\n{lines}\n{note}".encode()


def _from_request(body: bytes) -> tuple[int, list[bytes], str]:
    try:
        head, separator, note = body.decode().partition("\n\n")
    except UnicodeDecodeError:
        raise MalformedRequest("not UTF-8") from None
    old, *lines = head.split("\n")
    word, _, number = old.partition(" ")
    if not separator or word != "old" or not number.isascii() or not number.isdigit():
        raise MalformedRequest("no old size")
    if str(int(number)) != number or len(lines) > MAX_PROOF_LINES:
        raise MalformedRequest("a size with leading zeroes, or a proof that is too long")
    try:
        proof = [base64.b64decode(line, validate=True) for line in lines]
    except binascii.Error:
        raise MalformedRequest("the proof is not base64") from None
    if any(len(each) != 32 for each in proof):
        raise MalformedRequest("a hash has 32 bytes")
    return int(number), proof, note


@dataclass(frozen=True, slots=True)
class Answer:
    """What a witness answers; `seen` is what it must remember before it does."""

    status: int
    body: str = ""
    content_type: str = "text/plain"
    seen: Checkpoint | None = None


class Witness:
    """A witness of some logs. Whoever serves it asks one question at a time."""

    def __init__(
        self, cosigner: Cosigner, logs: Sequence[Verifier], seen: Mapping[str, Checkpoint]
    ) -> None:
        self._cosigner = cosigner
        self._logs = {log.name: log for log in logs}
        self.seen = dict(seen)

    def add_checkpoint(self, body: bytes, now: int) -> Answer:
        """Answer a request; what the answer says it has seen counts as seen once it is in `seen`."""
        try:
            old, proof, note = _from_request(body)
            claim = Checkpoint.claimed_by(note)
        except (MalformedRequest, MalformedCheckpoint, BadSignature) as error:
            return Answer(400, f"{error}\n")
        log = self._logs.get(claim.origin)
        if log is None:
            return Answer(404, "not a log that is witnessed here\n")
        try:
            log.open_note(note)
        except BadSignature as error:
            return Answer(403, f"{error}\n")
        if old > claim.size:
            return Answer(400, "the old size is larger than the checkpoint's\n")
        before = self.seen.get(claim.origin, Checkpoint(claim.origin, 0, EMPTY_ROOT))
        if old != before.size or (old == claim.size and before.root != claim.root):
            return Answer(409, f"{before.size}\n", SIZE_TYPE)
        try:
            verify_consistency(old, before.root, claim.size, claim.root, proof)
        except ProofRefused as error:
            return Answer(422, f"{error}\n")
        return Answer(200, self._cosigner.cosign(claim.to_text(), now), seen=claim)
