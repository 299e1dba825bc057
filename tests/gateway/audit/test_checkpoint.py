"""Checkpoints read back only in the one spelling that C2SP tlog-checkpoint has."""

import base64

import pytest

from gateway.audit.checkpoint import Checkpoint, MalformedCheckpoint
from keys.signing import BadSignature, Signer, Verifier

SIGNER = Signer("gateway.example", bytes(range(32)))
VERIFIER = Verifier.from_vkey(SIGNER.vkey)
ROOT = base64.b64encode(bytes(32)).decode()


def test_there_and_back() -> None:
    """A signed checkpoint opens to what was signed."""
    checkpoint = Checkpoint("gateway.example/log", 20_852_163, bytes(32))
    note = checkpoint.sign(SIGNER)
    assert note.startswith(f"gateway.example/log\n20852163\n{ROOT}\n\n\u2014 gateway.example ")
    assert Checkpoint.from_note(note, VERIFIER) == checkpoint


@pytest.mark.parametrize(
    "text",
    [
        f"log\n{ROOT}\n",
        f"log\n-1\n{ROOT}\n",
        f"log\n007\n{ROOT}\n",
        f"log\n\u0661\n{ROOT}\n",
        f"log\n1\n{ROOT[:-4]}\n",
        f"log\n1\n{ROOT[:-1]}\n",
        f"log\n1\n{base64.b64encode(bytes(31)).decode()}\n",
        f"log\n1\n{ROOT}\nextension\n",
        f"log\n1\n{ROOT[:-2]}B=\n",
    ],
)
def test_signed_texts_that_are_no_checkpoint(text: str) -> None:
    """A signature alone does not make a checkpoint."""
    with pytest.raises(MalformedCheckpoint):
        Checkpoint.from_note(SIGNER.sign_note(text), VERIFIER)


def test_unsigned() -> None:
    """A checkpoint that another key signed is refused before it is read."""
    note = Checkpoint("log", 1, bytes(32)).sign(Signer("gateway.example", bytes(32)))
    with pytest.raises(BadSignature):
        Checkpoint.from_note(note, VERIFIER)
