"""A proof stands by itself: under the deployment's key, for exactly its event."""

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.audit.checkpoint import MalformedCheckpoint
from gateway.audit.files import LogFiles
from gateway.audit.proof import EventProof, MalformedProof
from gateway.audit.reading import Entry, find_call, prove
from gateway.audit.tree import ProofRefused
from gateway.audit.trust import MalformedPolicy
from keys.signing import BadSignature, Signer, Verifier
from tests.gateway.audit.conftest import SIGNER, appended, begun, ended, open_log, started

CALL = "01a213a6462e" + "0" * 20
VERIFIER = Verifier.from_vkey(SIGNER.vkey)


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment with one log, and one call in it."""
    folder = tmp_path_factory.mktemp("audit")

    async def write() -> None:
        journal = open_log(folder / "log")
        for event in (begun(CALL), *(started(str(n)) for n in range(300)), ended(CALL)):
            assert await appended(journal, event) is None
        journal.close()

    asyncio.run(write())
    return folder


@pytest.fixture(scope="module")
def proof(audit: Path) -> str:
    """The proof of the call's end."""
    found = prove(*find_call(audit, CALL)[-1])
    assert found is not None
    return found.to_text()


def test_every_event_is_proved(audit: Path) -> None:
    """Each event of a log has a proof that reads back and verifies, and says which event it is."""
    log = audit / "log"
    for index, line in LogFiles(log).lines():
        found = prove(log, Entry(index, line, {}))
        assert found is not None
        read = EventProof.from_text(found.to_text())
        checkpoint = read.verify(VERIFIER)
        assert (read.index, read.event.encode(), checkpoint.origin) == (index, line, "test/log")


def test_what_is_not_signed_yet_has_no_proof(audit: Path) -> None:
    """An event beyond the last checkpoint is not proved."""
    assert prove(audit / "log", Entry(10_000, b"", {})) is None


def test_a_call_is_found_by_its_field_alone(audit: Path) -> None:
    """Both events of the call are found, in order; another call's are not."""
    assert [entry.fields["type"] for _, entry in find_call(audit, CALL)] == [
        "call.start",
        "call.end",
    ]
    assert find_call(audit, CALL[:-1] + "1") == []


@given(st.data())
def test_no_other_text_is_a_proof(proof: str, data: st.DataObject) -> None:
    """Whatever single character of a proof is changed, dropped or doubled, it is refused."""
    at = data.draw(st.integers(0, len(proof) - 1))
    other = data.draw(st.characters(codec="ascii").filter(lambda char: char != proof[at]))
    for changed in (
        proof[:at] + other + proof[at + 1 :],
        proof[:at] + proof[at + 1 :],
        proof[:at] + proof[at] * 2 + proof[at + 1 :],
    ):
        with pytest.raises(
            (MalformedProof, BadSignature, ProofRefused, MalformedCheckpoint, MalformedPolicy)
        ):
            EventProof.from_text(changed).verify(VERIFIER)


def test_another_deployments_key_proves_nothing(proof: str) -> None:
    """The proof holds under the pinned key only."""
    with pytest.raises(BadSignature):
        EventProof.from_text(proof).verify(Verifier.from_vkey(Signer("test", bytes(32)).vkey))
