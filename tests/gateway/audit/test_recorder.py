"""A call waits for its record as the operator chose, and never too long; nothing is lost unsaid."""

import asyncio
import ctypes
import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.audit import room as room_module
from gateway.audit.durability import Durability
from gateway.audit.event import Event
from gateway.audit.journal import AuditUnavailable, Journal
from gateway.audit.reading import entries
from gateway.audit.recorder import Recorder
from gateway.audit.verify import ExitCode, verify_path
from tests.gateway.audit.conftest import SIGNER, appended, begun, ended, open_log, started

Open = Callable[..., Journal]


class FakeClock:
    """A clock that goes when it is told."""

    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        """Return some instant."""
        return 1_700_000_000 + self.at

    def monotonic(self) -> float:
        """Return how far it went."""
        return self.at


class Disk:
    """A disk whose syncs wait until they may end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_sync = threading.Event()
        self.may_sync.set()
        real = os.fdatasync

        def slow(fd: int) -> None:
            self.may_sync.wait(20)
            real(fd)

        monkeypatch.setattr(os, "fdatasync", slow)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A disk that can be made to hang; it does not when the test ends."""
    made = Disk(monkeypatch)
    yield made
    made.may_sync.set()


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return what was recorded of one type."""
    return [each.fields for each in entries(folder) if each.fields["type"] == kind]


def ask(recorder: Recorder, event: Any) -> "asyncio.Future[AuditUnavailable | None]":
    """Record an event; return a future of what its waiter is told."""
    told: asyncio.Future[AuditUnavailable | None] = asyncio.get_running_loop().create_future()
    recorder.append(event, told.set_result)
    return told


async def test_strict_waits_for_the_disk_but_not_for_ever(
    open_journal: Open, tmp_path: Path, disk: Disk
) -> None:
    """While the disk hangs nobody is told that a record is safe; at the bound the call is refused.

    The start that reaches the disk later has an end behind it that says so.
    """
    journal, clock = open_journal(), FakeClock()
    recorder = Recorder(journal, Durability.STRICT, 2.0, clock)
    assert await ask(recorder, begun("c0")) is None
    assert await ask(recorder, ended("c0")) is None
    disk.may_sync.clear()
    told = ask(recorder, begun("c1"))
    clock.at = 1.9
    recorder.tick()
    await asyncio.sleep(0)  # whoever would be told wrongly, would be by now
    assert not told.done()
    clock.at = 2.0
    recorder.tick()
    assert isinstance(await told, AuditUnavailable)
    disk.may_sync.set()
    journal.close()
    (late,) = [each for each in events(tmp_path, "call.end") if each["call"] == "c1"]
    assert (late["code"], late["status"]) == ("audit_unavailable", 503)
    assert verify_path(tmp_path / "audit", SIGNER.vkey).exit_code is ExitCode.VERIFIED


async def test_bounded_waits_for_the_queue_only(open_journal: Open, disk: Disk) -> None:
    """A hanging disk does not hold a call up while there is room to queue; a failed log refuses."""
    journal = open_journal()
    recorder = Recorder(journal, Durability.BOUNDED, 2.0, FakeClock())
    disk.may_sync.clear()
    assert await ask(recorder, begun("c1")) is None
    disk.may_sync.set()
    journal._log.writer._segment.unlink()
    assert await appended(journal, started()) is not None
    with pytest.raises(AuditUnavailable):
        recorder.append(ended("c1"), lambda _: None)
    journal.close()


async def test_async_goes_on_and_owns_up(open_journal: Open, tmp_path: Path) -> None:
    """Calls pass a log that failed; the next log says how many events were lost, and verifies.

    An end whose start was lost is lost with it.
    """
    journal = open_journal()
    recorder = Recorder(journal, Durability.ASYNC, 2.0, FakeClock())
    assert await ask(recorder, begun("c0")) is None
    assert await appended(journal, started()) is None
    journal._log.writer._segment.unlink()
    assert await appended(journal, started()) is not None
    for call in ("c1", "c2"):
        assert await ask(recorder, begun(call)) is None
    assert await ask(recorder, ended("c1")) is None
    assert recorder.lost == 3
    recorder.tick()
    assert not journal.has_failed
    assert await ask(recorder, ended("c2")) is None
    assert await ask(recorder, ended("c0")) is None
    recorder.tick()
    journal.close()
    gaps = [(each["durable"], each["lost"]) for each in events(tmp_path, "log.gap")]
    assert gaps == [(3, 1), (0, 3), (0, 1)]
    assert {each["call"] for each in events(tmp_path, "call.end")} == {"c0"}


async def test_ends_fit_where_starts_no_longer_do(
    open_journal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk calls that began are recorded to their end, new ones refused until there is room."""
    journal = open_journal(calls=8)
    assert await appended(journal, begun("c1")) is None
    full = [True]
    real = room_module._libc.fallocate

    def allocate(*asked: Any) -> int:
        if not full[0]:
            return int(real(*asked))
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(
        room_module, "_libc", type("Libc", (), {"fallocate": staticmethod(allocate)})
    )
    while not journal._log.writer.is_short:  # until what was taken beforehand is used up
        assert await appended(journal, padded()) is None
    with pytest.raises(AuditUnavailable, match="no room"):
        journal.append(begun("c2"))
    assert await appended(journal, ended("c1")) is None
    full[0] = False
    async with asyncio.timeout(10):
        while await appended_or_refused(journal, begun("c2")):  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(0.05)  # polling a thread that looks for room once a second
    assert await appended(journal, ended("c2")) is None
    journal.close()
    assert verify_path(tmp_path / "audit", SIGNER.vkey).exit_code is ExitCode.VERIFIED


async def appended_or_refused(journal: Journal, event: Event) -> AuditUnavailable | None:
    """Append; return why not, at once or later."""
    try:
        return await appended(journal, event)
    except AuditUnavailable as error:
        return error


def padded() -> Event:
    """Return an event that takes a good part of what is reserved."""
    return started("x" * 60_000)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 20 MiB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    yield place
    subprocess.run(["umount", str(place)], check=True)


async def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """On a file system without a free byte every call that began ends on record, and the log seals."""
    journal = open_log(small_disk / "log", calls=64)
    for call in range(64):
        assert await appended(journal, begun(f"c{call}")) is None
    with pytest.raises(OSError, match="No space"):
        (small_disk / "filler").write_bytes(bytes(20 * 1024 * 1024))
    with pytest.raises(AuditUnavailable):  # noqa: PT012 - it may take a few to use up the step
        while True:
            await appended(journal, padded())
    for call in range(64):
        assert await appended(journal, ended(f"c{call}")) is None
    (small_disk / "filler").unlink()
    journal.close()
    assert verify_path(small_disk, SIGNER.vkey).exit_code is ExitCode.VERIFIED


async def test_whoever_waits_is_told_before_the_log_closes(
    open_journal: Open, tmp_path: Path, disk: Disk
) -> None:
    """Settling lasts until the last record, and what its waiter records in turn, is on the disk."""
    journal = open_journal()
    recorder = Recorder(journal, Durability.STRICT, 20.0, FakeClock())
    disk.may_sync.clear()

    def end(_: AuditUnavailable | None) -> None:
        recorder.append(ended("c1"), lambda _: None)

    recorder.append(begun("c1"), end)
    settling = asyncio.get_running_loop().create_task(recorder.settle())
    await asyncio.sleep(0)
    assert not settling.done()
    disk.may_sync.set()
    await settling
    journal.close()
    assert len(events(tmp_path, "call.end")) == 1
    assert verify_path(tmp_path / "audit", SIGNER.vkey).exit_code is ExitCode.VERIFIED
