"""Whatever kills a writer, and wherever a disk fails: what was acknowledged is there, and verifies."""

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.audit import writer as writer_module
from gateway.audit.envelope import Envelope
from gateway.audit.event import Event
from gateway.audit.keeper import Keeper
from gateway.audit.trust import LogKeys
from gateway.audit.verify import ExitCode, verify_path
from gateway.audit.writer import LogWriter
from gateway.clock import SystemClock
from tests.gateway.audit.conftest import SIGNER, appended, open_log, started

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(3600)
def test_killed_at_random(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """After SIGKILL under load every acknowledged event is there, and every call ended or is unclosed."""
    runs = 3000 if request.config.getoption("--long") else 200
    program = [sys.executable, "-m", "tests.gateway.audit.crash", str(tmp_path), str(runs)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(list(tmp_path.iterdir())) == runs


class _Disk:
    """Lets so many bytes through, then fails, the last write cut where it falls."""

    def __init__(self, room: int, error: int) -> None:
        self.room = room
        self._error = error
        self._real = os.write

    def write(self, fd: int, data: Any) -> int:
        if not self.room:
            raise OSError(self._error, os.strerror(self._error))
        written = self._real(fd, data[: self.room])
        self.room -= written
        return written


def _lines() -> Iterator[bytes]:
    envelope = Envelope("test/log", SystemClock())
    for seq in range(4):
        yield envelope.line(started(str(seq)), seq)


def _write(log: Path, keys: LogKeys) -> list[bytes]:
    """Write four events with two checkpoints; return what was acknowledged when the disk failed."""
    acknowledged: list[bytes] = []
    try:
        writer = LogWriter.create(
            log, "test/log", keys.log.sign_note, stamp=lambda text: keys.clock.cosign(text, 1),
            delegation=keys.delegation,
        )  # fmt: skip
        for line in _lines():
            writer.write([line])
            acknowledged.append(line)
            writer.extend([line])
    except OSError:
        pass
    return acknowledged


async def _recover(audit: Path) -> None:
    journal = open_log(audit / "boot-control.2")

    async def record(event: Event) -> None:
        assert await appended(journal, event) is None

    keeper = Keeper(audit, SIGNER, SystemClock(), record=record)
    await keeper.round()
    journal.close()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_at_any_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    """At whatever byte a write fails, nothing acknowledged is lost, and what is left verifies."""
    monkeypatch.setattr(writer_module, "CHECKPOINT_EVENTS", 2)
    keys = LogKeys.draw("test/log", SIGNER)
    disk = _Disk(1_000_000, error)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", disk.write)
        assert len(_write(tmp_path / "whole/boot-worker-0.1", keys)) == 4
    total = 1_000_000 - disk.room
    assert total > 1500
    for room in range(0, total, 1 if error == errno.EIO else 7):
        audit = tmp_path / str(room)
        log = audit / "boot-worker-0.1"
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", _Disk(room, error).write)
            acknowledged = _write(log, keys)
        fds = [int(each) for each in os.listdir("/proc/self/fd")]  # noqa: PTH208 - numbers, not paths
        for fd in fds:  # the dead writer's lock goes with its process, which here lives on
            try:
                if str(Path(f"/proc/self/fd/{fd}").readlink()).startswith(str(audit)):
                    os.close(fd)
            except OSError:
                continue
        assert verify_path(audit, SIGNER.vkey).exit_code is not ExitCode.TAMPERED, room
        asyncio.run(_recover(audit))
        report = verify_path(audit, SIGNER.vkey)
        assert report.exit_code is ExitCode.VERIFIED, (room, list(report.to_lines()))
        kept = b"".join(path.read_bytes() for path in log.glob("seg/*")).split(b"\n")[:-1]
        assert kept[: len(acknowledged)] == acknowledged, room
