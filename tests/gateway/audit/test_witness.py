"""Witnesses remember: what they saw once cannot be taken back, and nobody is shown another history."""

import base64
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gateway.audit.anchor import Anchor
from gateway.audit.checkpoint import Checkpoint
from gateway.audit.event import Event, LogRedacted
from gateway.audit.files import Damaged
from gateway.audit.keeper import Keeper
from gateway.audit.tree import Frontier, consistency_proof
from gateway.audit.trust import Policy
from gateway.audit.verify import ExitCode, Trust, verify_path
from gateway.audit.witness import Witness, to_request
from gateway.audit.witness_server import WitnessServer
from gateway.clock import SystemClock
from keys.signing import CosignatureVerifier, Cosigner, Signer, Verifier
from tests.gateway.audit.conftest import SIGNER, appended, open_log, started
from tests.gateway.audit.test_tree import naive_root, nodes_of

LOG = Signer("test/log", bytes(range(32)))
COSIGNER = Cosigner("w1.example", b"w" * 32)
WATCHER = CosignatureVerifier.from_vkey(COSIGNER.vkey)


def note_of(leaves: list[bytes], signer: Signer = LOG) -> str:
    """Return the checkpoint of a log with these leaves."""
    return Checkpoint("test/log", len(leaves), naive_root(leaves)).sign(signer)


def witness() -> Witness:
    """Return a witness that has seen nothing yet."""
    return Witness(COSIGNER, [Verifier.from_vkey(LOG.vkey)], {})


def grow(watching: Witness, leaves: list[bytes], old: int, old_leaves: list[bytes]) -> int:
    """Ask to cosign a log of `leaves` with the proof that it grew from `old`; return the status."""
    proof = consistency_proof(old, len(leaves), nodes_of(old_leaves[:old] + leaves[old:]))
    answer = watching.add_checkpoint(to_request(old, proof, note_of(leaves)), 1000)
    if answer.seen is not None:
        watching.seen[answer.seen.origin] = answer.seen
        assert WATCHER.time_of(note_of(leaves) + answer.body) == 1000
    return answer.status


@given(st.lists(st.binary(max_size=3), min_size=2, max_size=24), st.data())
def test_growth_is_cosigned_and_nothing_else(leaves: list[bytes], data: st.DataObject) -> None:
    """A log may grow; cut back, forked or skipped it is refused, and what was seen stays seen."""
    watching = witness()
    first = data.draw(st.integers(1, len(leaves) - 1))
    assert grow(watching, leaves[:first], 0, leaves) == 200
    assert grow(watching, leaves, first, leaves) == 200
    assert grow(watching, leaves, len(leaves), leaves) == 200
    assert grow(watching, leaves[:first], first, leaves) == 409
    assert grow(watching, leaves[:first], 0, leaves) == 409
    forked = [b"other", *leaves[1:]] if leaves[0] != b"other" else [b"", *leaves[1:]]
    assert grow(watching, forked, len(leaves), leaves) == 409
    assert grow(watching, [*forked, b"more"], len(leaves), leaves) == 422
    assert watching.seen["test/log"].size == len(leaves)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"\xff", 400),
        (b"old 0\n" + note_of([b"a"]).encode(), 400),
        (b"old 00\n\n" + note_of([b"a"]).encode(), 400),
        (b"old -1\n\n" + note_of([b"a"]).encode(), 400),
        (b"old 2\n\n" + note_of([b"a"]).encode(), 400),
        (b"old 0\nAAAA\n\n" + note_of([b"a"]).encode(), 400),
        (b"old 0\n!\n\n" + note_of([b"a"]).encode(), 400),
        (
            b"old 0\n"
            + (base64.b64encode(bytes(32)) + b"\n") * 64
            + b"\n"
            + note_of([b"a"]).encode(),
            400,
        ),
        (b"old 0\n\nno note", 400),
        (b"old 0\n\n" + note_of([b"a"], Signer("test/log", bytes(32))).encode(), 403),
        (
            b"old 0\n\n"
            + Checkpoint("else", 1, bytes(32)).sign(Signer("else", bytes(32))).encode(),
            404,
        ),
        (b"old 1\n\n" + note_of([b"a"]).encode(), 409),
        (to_request(0, [bytes(32)], note_of([b"a"])), 422),
        (to_request(0, [], note_of([b"a"])), 200),
    ],
)
def test_answers(body: bytes, status: int) -> None:
    """Each way to ask wrongly has the status that C2SP tlog-witness gives it."""
    answer = witness().add_checkpoint(body, 1000)
    assert answer.status == status
    if status == 409:
        assert (answer.content_type, answer.body) == ("text/x.tlog.size", "0\n")


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[str]:
    """A witness of the test deployment on loopback; its URL."""
    server = WitnessServer(
        COSIGNER, [Verifier.from_vkey(SIGNER.vkey)], tmp_path / "witness/state", SystemClock()
    )
    runner = web.AppRunner(server.app())
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    yield f"http://127.0.0.1:{port}/"
    await runner.cleanup()


def policy_at(url: str) -> Policy:
    """Return a policy by which the one witness must have seen the anchor."""
    return Policy.from_text(f"log {SIGNER.vkey}\nwitness w1 {COSIGNER.vkey} {url}\nquorum w1\n")


def verdict(audit: Path, policy: Policy, *, not_before: int = 0) -> ExitCode:
    """Return what a verifier ends with who trusts this policy."""
    deployment = Verifier.from_vkey(SIGNER.vkey)
    trust = Trust(deployment=deployment, is_given=True, policy=policy, not_before=not_before)
    return verify_path(audit, trust=trust).exit_code


async def _deploy(audit: Path, policy: Policy) -> list[Event]:
    """Run a deployment of one log for a moment; return what its keeper recorded."""
    said: list[Event] = []

    async def record(event: Event) -> None:
        said.append(event)

    number = len(list(audit.glob("boot-*"))) + 1 if audit.exists() else 1
    journal = open_log(audit / f"boot-control.{number}")
    assert await appended(journal, started()) is None
    journal.close()
    keeper = Keeper(audit, SIGNER, SystemClock(), record=record, policy=policy)
    await keeper.round()
    return said


async def test_a_deployment_cut_back_whole_is_seen_by_its_witness(
    tmp_path: Path, served: str
) -> None:
    """Logs and anchor put back to an earlier state verify by themselves, and not with the witness."""
    policy, audit = policy_at(served), tmp_path / "audit"
    assert await _deploy(audit, policy) == []
    assert verdict(audit, policy) is ExitCode.VERIFIED
    shutil.copytree(audit, tmp_path / "before")
    assert await _deploy(audit, policy) == []
    assert verdict(audit, policy) is ExitCode.VERIFIED
    latest = (audit / "anchor/witnessed").read_text()
    # Cut back: what is left is consistent, and even has a cosignature.
    shutil.rmtree(audit)
    shutil.copytree(tmp_path / "before", audit)
    assert verdict(audit, policy) is ExitCode.VERIFIED
    trust = Trust(
        deployment=Verifier.from_vkey(SIGNER.vkey), is_given=True, trusted={"test": latest}
    )
    report = verify_path(audit, trust=trust)
    assert report.exit_code is ExitCode.TAMPERED
    assert sum("\u2014 test " in note for log in report.logs for note in log.evidence) == 2
    # It goes on from there; the witness does not, and the log says so.
    (said,) = await _deploy(audit, policy)
    assert not getattr(said, "is_whole", True)
    assert (
        verdict(audit, policy) is ExitCode.VERIFIED
    )  # of what the witness saw nothing contradicts
    assert verdict(audit, policy, not_before=4_000_000_000) is ExitCode.INCOMPLETE


async def test_without_its_witness_a_deployment_is_incomplete(tmp_path: Path) -> None:
    """Who demands a witness gets none from a deployment that reached none, and is told why."""
    policy, audit = policy_at("http://127.0.0.1:1/"), tmp_path / "audit"
    (said,) = await _deploy(audit, policy)
    assert "out of reach" in getattr(said, "reason", "")
    assert verdict(audit, policy) is ExitCode.INCOMPLETE


async def test_a_forged_cosigned_note_is_found(tmp_path: Path, served: str) -> None:
    """What lies in `witnessed` must be of this very log."""
    policy, audit = policy_at(served), tmp_path / "audit"
    await _deploy(audit, policy)
    other = Checkpoint("test", 1, bytes(32))
    note = other.sign(SIGNER) + COSIGNER.cosign(other.to_text(), 1)
    (audit / "anchor/witnessed").write_text(note)
    assert verdict(audit, policy) is ExitCode.TAMPERED


def test_a_witness_remembers_across_restarts_and_runs_once(tmp_path: Path) -> None:
    """What was seen is on the disk before it is cosigned; a second server with it does not start."""
    state = tmp_path / "w/state"
    server = WitnessServer(COSIGNER, [Verifier.from_vkey(LOG.vkey)], state, SystemClock())
    server._witness.seen["test/log"] = Checkpoint("test/log", 7, bytes(32))
    server._persist()
    with pytest.raises(BlockingIOError):
        WitnessServer(COSIGNER, [Verifier.from_vkey(LOG.vkey)], state, SystemClock())

    os.close(server._folder)
    again = WitnessServer(COSIGNER, [Verifier.from_vkey(LOG.vkey)], state, SystemClock())
    assert again._witness.seen["test/log"].size == 7
    os.close(again._folder)


def test_the_anchor_goes_on_only_from_what_was_signed(tmp_path: Path) -> None:
    """An anchor whose end was changed is not continued: signing over it would hide the change."""
    event = LogRedacted(log="x", events=(1,), reason="r")
    anchor = Anchor(tmp_path, SIGNER, SystemClock())
    for _ in range(300):
        anchor.append([event])
    (segment,) = (tmp_path / "anchor/seg").iterdir()
    tree = Frontier()
    for line in segment.read_bytes().splitlines():
        tree.append(line)
    note = (tmp_path / "anchor/checkpoint").read_text()
    assert Checkpoint.claimed_by(note).root == tree.root()
    assert (tmp_path / "anchor/tile/0/000").stat().st_size == 8192
    # A torn line that nobody was told of is dropped.
    with segment.open("ab") as file:
        file.write(b'{"v":1')
    anchor.append([event])
    assert verify_path(tmp_path, SIGNER.vkey).exit_code is ExitCode.VERIFIED
    changed = segment.read_bytes().replace(b'"r"}', b'"s"}')
    segment.write_bytes(changed)
    with pytest.raises(Damaged):
        Anchor(tmp_path, SIGNER, SystemClock()).append([event])
