"""Durable before acknowledged, and failed once means closed for good."""

import asyncio
import contextlib
import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.audit import journal as journal_module
from gateway.audit import writer as writer_module
from gateway.audit.checkpoint import Checkpoint
from gateway.audit.event import SessionRefused
from gateway.audit.journal import AuditUnavailable, Journal
from gateway.audit.verify import ExitCode, verify_path
from gateway.telemetry.logs import configure_logs, get_log
from tests.gateway.audit.conftest import SIGNER, appended, open_log, started

Open = Callable[..., Journal]
ROOT = Path(__file__).parents[3]


def events(folder: Path) -> list[dict[str, Any]]:
    """Return what is on the disk."""
    segments = sorted(folder.rglob("seg/*.jsonl"))
    return [json.loads(line) for path in segments for line in path.read_text().splitlines()]


async def test_what_is_acknowledged_is_on_the_disk(open_journal: Open, tmp_path: Path) -> None:
    """When the waiter hears of it the line is in the file; indices count up from the first event."""
    journal = open_journal()
    for number in range(1, 6):
        assert await appended(journal, started(str(number))) is None
        assert events(tmp_path)[number]["role"] == str(number)
    journal.close()
    written = events(tmp_path)
    assert [event["seq"] for event in written] == list(range(7))
    assert [written[0]["type"], written[-1]["type"]] == ["log.opened", "log.sealed"]
    assert len({event["salt"] for event in written}) == 7
    assert {len(event["salt"]) for event in written} == {32}


async def test_a_burst_is_one_commit(
    open_journal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits together is synced together: far fewer syncs than events, in the order appended."""
    syncs = itertools.count()
    real = os.fdatasync

    def counting(fd: int) -> None:
        next(syncs)
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counting)
    journal = open_journal()
    waits = [appended(journal, started(str(number))) for number in range(500)]
    assert set(await asyncio.gather(*waits)) == {None}
    journal.close()
    assert next(syncs) < 100
    assert [event["role"] for event in events(tmp_path)[1:-1]] == [str(n) for n in range(500)]
    assert verify_path(tmp_path / "audit", SIGNER.vkey).exit_code is ExitCode.VERIFIED


async def test_segments_are_cut_and_go_on(
    open_journal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full segment is followed by another that is named after its first event."""
    monkeypatch.setattr(writer_module, "MAX_SEGMENT_BYTES", 500)
    journal = open_journal()
    for number in range(20):
        assert await appended(journal, started(str(number))) is None
    journal.close()
    segments = sorted(tmp_path.rglob("seg/*.jsonl"))
    assert len(segments) > 3
    for segment in segments:
        first, *_ = segment.read_text().splitlines()
        assert json.loads(first)["seq"] == int(segment.stem)
    assert verify_path(tmp_path / "audit", SIGNER.vkey).exit_code is ExitCode.VERIFIED


async def test_a_quiet_log_is_signed_in_time(
    open_journal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last events do not wait for the next ones to be signed."""
    monkeypatch.setattr(writer_module, "CHECKPOINT_SECONDS", 0.01)
    signed = asyncio.Event()
    loop = asyncio.get_running_loop()
    real = Checkpoint.to_text

    def telling(checkpoint: Checkpoint) -> str:
        if checkpoint.size == 2:
            loop.call_soon_threadsafe(signed.set)
        return real(checkpoint)

    monkeypatch.setattr(Checkpoint, "to_text", telling)
    journal = open_journal()
    await appended(journal, started())
    async with asyncio.timeout(5):
        await signed.wait()
    journal.close()


async def _fill(folder: Path) -> None:
    """Write until the log takes no more; print how many events were acknowledged."""
    journal = open_log(folder)
    acknowledged = 0
    while await appended(journal, started(str(acknowledged))) is None:
        acknowledged += 1
    assert journal.has_failed
    with pytest.raises(AuditUnavailable):
        journal.append(started())
    journal.close()
    sys.stdout.write(str(acknowledged))


def test_a_full_disk_closes_the_log(tmp_path: Path) -> None:
    """The event that does not fit is refused, so is every later one, and all acknowledged are kept.

    The operator reads once which log failed, and of what.
    """
    # A limit on the size of files makes writes fall short as a full disk does. It holds for a whole
    # process, so it is set for one that writes no other file.
    program = f"import asyncio; from {_fill.__module__} import _fill; from pathlib import Path; "
    program += f"asyncio.run(_fill(Path({str(tmp_path / 'audit')!r})))"
    told = subprocess.run(
        ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", sys.executable, "-B", "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert verify_path(tmp_path / "audit", SIGNER.vkey).exit_code is ExitCode.INCOMPLETE
    (segment,) = tmp_path.rglob("seg/*.jsonl")
    whole = segment.read_text().split("\n")[:-1]
    *logged, acknowledged = told.stdout.splitlines()
    assert sum('"process.started"' in line for line in whole) >= int(acknowledged) > 0
    (line,) = logged
    for said in ("error", "audit.failed", "File too large", str(tmp_path / "audit")):
        assert said in line


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Leave this process without a free descriptor, as a flood of connections does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_no_descriptor_left(
    open_journal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a free descriptor events are recorded and signed as ever; what waits is made up for."""
    monkeypatch.setattr(writer_module, "MAX_SEGMENT_BYTES", 500)
    monkeypatch.setattr(writer_module, "CHECKPOINT_EVENTS", 1)
    journal = open_journal()
    assert await appended(journal, started()) is None
    with no_descriptors():
        for number in range(20):
            assert await appended(journal, started(str(number))) is None
    assert not journal.has_failed
    assert len((tmp_path / "audit/log/checkpoints.jsonl").read_bytes().splitlines()) > 19
    for number in range(20):
        assert await appended(journal, started(str(number))) is None
    journal.close()
    assert len(list(tmp_path.rglob("seg/*.jsonl"))) > 3
    assert verify_path(tmp_path / "audit", SIGNER.vkey).exit_code is ExitCode.VERIFIED


async def test_a_log_closes_without_descriptors(open_journal: Open, tmp_path: Path) -> None:
    """Sealing needs no descriptor either, but for the copy of the last note: it takes one of its own."""
    journal = open_journal()
    assert await appended(journal, started()) is None
    with no_descriptors():
        journal.close()
    assert verify_path(tmp_path / "audit", SIGNER.vkey).exit_code is ExitCode.VERIFIED


async def test_the_copy_is_made_up_for_in_a_quiet_log(
    open_journal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note that found no descriptor is published when there is one, without waiting for events."""
    monkeypatch.setattr(writer_module, "CHECKPOINT_SECONDS", 0.01)
    published = asyncio.Event()
    loop = asyncio.get_running_loop()
    real = Checkpoint.to_text

    def telling(checkpoint: Checkpoint) -> str:
        if checkpoint.size == 2:
            loop.call_soon_threadsafe(published.set)
        return real(checkpoint)

    monkeypatch.setattr(Checkpoint, "to_text", telling)
    journal = open_journal()
    latest = tmp_path / "audit/log/checkpoint"
    with no_descriptors():
        await appended(journal, started())
        async with asyncio.timeout(5):
            await published.wait()
    async with asyncio.timeout(5):
        while not latest.exists() or "\n2\n" not in latest.read_text():  # noqa: ASYNC110 - a thread writes it
            await asyncio.sleep(0.01)  # polling another thread
    journal.close()


def _break_writes(journal: Journal) -> None:
    read_only = os.open("/dev/null", os.O_RDONLY)
    os.dup2(read_only, journal._log.writer._fd)
    os.close(read_only)


def _break_syncs(journal: Journal) -> None:
    reader, writer = os.pipe()  # takes bytes, but cannot be synced
    os.dup2(writer, journal._log.writer._fd)
    os.close(writer)
    os.set_inheritable(reader, False)


def _remove(journal: Journal) -> None:
    journal._log.writer._segment.unlink()


def _replace(journal: Journal) -> None:
    path = journal._log.writer._segment
    path.with_suffix(".new").touch()
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("harm", [_break_writes, _break_syncs, _remove, _replace])
async def test_one_error_is_the_end(
    open_journal: Open,
    harm: Callable[[Journal], None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A failed write or sync, a removed or replaced file: every waiter hears of it, none succeeds.

    The operational log says so once, in the name of the process whose log it is.
    """
    configure_logs("json", "info", "worker-7")
    monkeypatch.setattr(journal_module, "log", get_log())
    journal = open_journal()
    assert await appended(journal, started()) is None
    harm(journal)
    told = await asyncio.gather(*(appended(journal, started(str(n))) for n in range(20)))
    assert all(isinstance(error, AuditUnavailable) for error in told)
    assert journal.pending_events == 0
    with pytest.raises(AuditUnavailable):
        journal.append(started())
    journal.close()
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["event"], line["level"], line["role"]) == ("audit.failed", "error", "worker-7")
    assert (line["error"], line["path"]) != ("", "")
    assert "dropped" not in line


async def test_the_queue_is_bounded(open_journal: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that does not keep up makes `append` refuse, and the log goes on when it does again."""
    monkeypatch.setattr(journal_module, "MAX_PENDING_EVENTS", 8)
    journal = open_journal()
    # This thread does not let the loop run, so nothing is acknowledged in between.
    waits = [asyncio.get_running_loop().create_future() for _ in range(7)]
    for wait in waits:
        journal.append(started(), wait.set_result)
    with pytest.raises(AuditUnavailable, match="keep up"):
        journal.append(started())
    await asyncio.gather(*waits)
    assert await appended(journal, started()) is None
    journal.close()


async def test_room_is_kept_for_known_callers(
    open_journal: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refusals of unidentified callers fill a part of the queue only; the rest takes other events."""
    monkeypatch.setattr(journal_module, "MAX_PENDING_EVENTS", 8)
    journal = open_journal()
    nobody = SessionRefused(tenant="", issuer="", subject="", code="c", client_address="")
    for _ in range(3):  # this thread does not let the loop run: nothing is acknowledged in between
        journal.append(nobody)
    with pytest.raises(AuditUnavailable, match="keep up"):
        journal.append(nobody)
    for _ in range(4):
        journal.append(started())
    with pytest.raises(AuditUnavailable, match="keep up"):
        journal.append(started())
    journal.close()


async def test_an_event_too_large_is_refused_alone(open_journal: Open) -> None:
    """An event beyond a tlog entry's size is refused, and the log goes on without a hole."""
    journal = open_journal()
    huge = SessionRefused(tenant="a" * 65_536, issuer="", subject="", code="", client_address="")
    with pytest.raises(AuditUnavailable, match="larger"):
        journal.append(huge)
    index = journal.append(started())
    assert index == 1
    journal.close()


async def test_a_log_has_one_writer(open_journal: Open) -> None:
    """A log's folder is never opened twice."""
    journal = open_journal()
    with pytest.raises(FileExistsError):
        open_journal()
    journal.close()
