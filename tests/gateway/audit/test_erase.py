"""What is erased by a signed word leaves a log that verifies; what is erased without one is missed."""

import asyncio
import shutil
from pathlib import Path

import pytest

from gateway.audit import writer as writer_module
from gateway.audit.anchor import Anchor
from gateway.audit.erase import prune, redact
from gateway.audit.event import Event
from gateway.audit.files import Damaged, LogFiles, line_hash, redacted_line
from gateway.audit.keeper import Keeper
from gateway.audit.reading import find_call
from gateway.audit.report import LogReport
from gateway.audit.verify import ExitCode, verify_path
from gateway.clock import SystemClock
from tests.gateway.audit.conftest import SIGNER, appended, open_log, started

NAME = "boot-control.1"
FUTURE = 4_000_000_000.0


async def _record(_event: Event) -> None:
    raise AssertionError("nothing is amiss")


@pytest.fixture
def audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deployment with one sealed log of several segments, which the anchor names."""
    monkeypatch.setattr(writer_module, "MAX_SEGMENT_BYTES", 900)
    folder = tmp_path / "audit"

    async def write() -> None:
        journal = open_log(folder / NAME)
        for number in range(20):
            assert await appended(journal, started(str(number))) is None
        journal.close()
        await Keeper(folder, SIGNER, SystemClock(), record=_record).round()

    asyncio.run(write())
    assert len(LogFiles(folder / NAME).segments()) > 3
    return folder


def verdict(audit: Path) -> tuple[ExitCode, LogReport]:
    """Verify; return the verdict and what was found of the one log."""
    report = verify_path(audit, SIGNER.vkey)
    (log,) = [each for each in report.logs if each.path == NAME]
    return report.exit_code, log


def anchor(audit: Path) -> Anchor:
    """Return the deployment's anchor."""
    return Anchor(audit, SIGNER, SystemClock())


def test_a_beginning_is_pruned_and_the_rest_verifies(audit: Path) -> None:
    """Old segments go; the rest verifies from the roots that are left, and proofs still lead up."""
    assert prune(audit / NAME, FUTURE, anchor(audit)) == 22
    assert not LogFiles(audit / NAME).segments()
    code, log = verdict(audit)
    assert code is ExitCode.VERIFIED
    assert (log.pruned, log.events) == (22, 22)


def test_pruning_stops_at_what_is_young(audit: Path) -> None:
    """Nothing younger than the limit goes."""
    assert prune(audit / NAME, 1_000_000_000.0, anchor(audit)) == 0
    assert verdict(audit)[0] is ExitCode.VERIFIED


@pytest.mark.parametrize("crash_after", [1, 2])
def test_a_crash_while_pruning_leaves_a_log_that_verifies(audit: Path, crash_after: int) -> None:
    """The word is spoken first; however many of the segments are still there, the log verifies."""
    copy = audit.with_name("copy")
    shutil.copytree(audit, copy)
    prune(audit / NAME, FUTURE, anchor(audit))
    for _, path in LogFiles(copy / NAME).segments()[crash_after:]:
        shutil.copy(path, audit / NAME / "seg")
    assert verdict(audit)[0] is ExitCode.VERIFIED
    # The same segments missing without the word for it.
    for _, path in LogFiles(copy / NAME).segments()[:crash_after]:
        path.unlink()
    code, log = verdict(copy)
    assert code is ExitCode.TAMPERED
    assert "UNAUTHORISED REMOVAL" in log.findings[0]


def test_single_events_are_erased_by_word_only(audit: Path) -> None:
    """An erased event's hash holds its place; what is not there cannot be erased."""
    line = dict(LogFiles(audit / NAME).lines())[5]
    redact(audit / NAME, f"test/{NAME}", [5, 7], "asked for", anchor(audit))
    code, log = verdict(audit)
    assert (code, log.erased) == (ExitCode.VERIFIED, 2)
    assert line not in b"".join(path.read_bytes() for path in (audit / NAME).rglob("*.jsonl"))
    with pytest.raises(Damaged):
        redact(audit / NAME, f"test/{NAME}", [22], "asked for", anchor(audit))
    assert find_call(audit, "0" * 32) == []


@pytest.mark.parametrize("line", [b'{"redacted":"AAAA"}', b'{"redacted":"!"}', b'{"redacted":"'])
def test_a_hash_that_is_none(audit: Path, line: bytes) -> None:
    """An erased event whose hash is missing or misspelt is found."""
    redact(audit / NAME, f"test/{NAME}", [0], "asked for", anchor(audit))
    first = LogFiles(audit / NAME).segments()[0][1]
    lines = first.read_bytes().split(b"\n")
    first.write_bytes(b"\n".join([line, *lines[1:]]))
    assert verdict(audit)[0] is ExitCode.TAMPERED


async def test_a_log_that_is_written_is_not_erased_from(audit: Path) -> None:
    """Single events of a process's live log wait until it has ended."""
    journal = open_log(audit / "boot-control.2")
    assert await appended(journal, started()) is None
    with pytest.raises(BlockingIOError):
        redact(audit / "boot-control.2", "test/boot-control.2", [0], "asked for", anchor(audit))
    journal.close()


async def test_the_keeper_prunes_what_is_kept_too_long(audit: Path) -> None:
    """With a time to keep, segments of ended logs go when their last event is older."""

    class Later(SystemClock):
        now = staticmethod(lambda: FUTURE)

    keeper = Keeper(audit, SIGNER, Later(), record=_record, keep_seconds=60.0)
    await keeper.round()
    assert not LogFiles(audit / NAME).segments()
    assert verdict(audit)[0] is ExitCode.VERIFIED
    await keeper.round()
    assert verdict(audit)[0] is ExitCode.VERIFIED


def test_an_event_that_is_erased_without_a_word_is_missed(audit: Path) -> None:
    """The hash alone is no authority, nor is the word for another event."""
    redact(audit / NAME, f"test/{NAME}", [5], "asked for", anchor(audit))
    first, path = LogFiles(audit / NAME).segments()[0]
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([redacted_line(line_hash(lines[0])), *lines[1:]]))
    code, log = verdict(audit)
    assert code is ExitCode.TAMPERED
    assert log.findings == [f"UNAUTHORISED REMOVAL: event {first} was erased"]
