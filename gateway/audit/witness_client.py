"""Asking witnesses to cosign the anchor. Blocks: whoever calls it has a thread to spare."""

import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Final

from gateway.audit.checkpoint import Checkpoint
from gateway.audit.tree import consistency_proof
from gateway.audit.trust import WitnessKey
from gateway.audit.witness import to_request
from keys.signing import BadSignature, Note

TIMEOUT_SECONDS: Final = 5.0
"""How long one witness may take (Tessera: 1 s; ours may be far away)."""

MAX_ANSWER_BYTES: Final = 64 * 1024

Proof = Callable[[int, int], list[bytes]]


class WitnessRefused(Exception):
    """A witness does not cosign: it is out of reach, or has seen another log than this."""

    code = "witness_refused"


class WitnessClient:
    """The witnesses of a policy, and how much each of them has seen."""

    def __init__(
        self, witnesses: Mapping[str, WitnessKey], node: Callable[[int, int], bytes]
    ) -> None:
        self._witnesses = {name: key for name, key in witnesses.items() if key.url}
        self._node = node
        self._seen = dict.fromkeys(self._witnesses, 0)

    def cosign(self, note: str) -> tuple[str, dict[str, str]]:
        """Return the note with the lines of those who cosigned it, and why each other did not."""
        lines = ""
        refusals: dict[str, str] = {}
        for name in self._witnesses:
            try:
                lines += self._ask(name, note)
            except WitnessRefused as error:
                refusals[name] = str(error)
        return note + lines, refusals

    def _ask(self, name: str, note: str) -> str:
        size = Checkpoint.claimed_by(note).size
        status, body = self._post(name, self._seen[name], size, note)
        if status == 409 and body.strip().isascii() and body.strip().isdigit():
            self._seen[name] = int(body)
            if int(body) > size:
                raise WitnessRefused(f"it has seen {int(body)} events, there are {size}")
            status, body = self._post(name, self._seen[name], size, note)
        if status != 200:
            raise WitnessRefused(f"it answered {status}: {body.strip()[:100]}")
        verifier = self._witnesses[name].verifier
        try:
            verifier.time_of(note + body)
            own = [
                line for line in Note.from_text(note + body).lines
                if line.split(" ")[1] == verifier.name and line not in note
            ]  # fmt: skip
        except BadSignature as error:
            raise WitnessRefused(f"its cosignature is not its own: {error}") from None
        self._seen[name] = size
        return "".join(f"{line}\n" for line in own)

    def _post(self, name: str, old: int, size: int, note: str) -> tuple[int, str]:
        proof = consistency_proof(old, size, self._node)
        url = self._witnesses[name].url.rstrip("/") + "/add-checkpoint"
        request = urllib.request.Request(  # noqa: S310 - the operator's own policy names it
            url, to_request(old, proof, note), {"content-type": "text/plain"}
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310 - as above
                return answer.status, answer.read(MAX_ANSWER_BYTES).decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read(MAX_ANSWER_BYTES).decode(errors="replace")
        except (OSError, ValueError) as error:
            raise WitnessRefused(f"it is out of reach: {type(error).__name__}") from None
