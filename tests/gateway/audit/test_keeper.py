"""The keeper names logs in time, finds the dead once, and stumbles over nothing."""

import asyncio
import os
from pathlib import Path

import pytest

from gateway.audit import writer as writer_module
from gateway.audit.checkpoint import Checkpoint
from gateway.audit.event import CallUnclosed, Event, LogRecovered
from gateway.audit.keeper import ANCHOR_SECONDS, Keeper
from gateway.audit.reading import entries
from gateway.audit.verify import ExitCode, verify_path
from gateway.clock import SystemClock
from tests.gateway.audit.conftest import SIGNER, appended, begun, open_log, started


class TurnedClock(SystemClock):
    """A clock whose monotonic count is turned by hand."""

    def __init__(self) -> None:
        self.at = 0.0
        self.monotonic = lambda: self.at


class Deployment:
    """An audit folder and its keeper."""

    def __init__(self, audit: Path) -> None:
        self.audit = audit
        self.said: list[Event] = []
        self.clock = TurnedClock()
        self.keeper = Keeper(audit, SIGNER, self.clock, record=self.record)

    async def record(self, event: Event) -> None:
        """Keep what the keeper says."""
        self.said.append(event)

    def named(self) -> list[int]:
        """Return the sizes that the anchor names, in order."""
        lines = [each.fields for each in entries(self.audit / "anchor")]
        return [line["size"] for line in lines if line["type"] == "log.anchored"]


def _has(checkpoint: Path, size: int) -> bool:
    return checkpoint.exists() and Checkpoint.claimed_by(checkpoint.read_text()).size >= size


async def test_growth_is_named_each_minute_and_an_end_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new log is named at once, what it grew by after a minute, and its seal without waiting."""
    here = Deployment(tmp_path)
    journal = open_log(tmp_path / "boot-worker-0.1")

    async def grow(size: int) -> None:
        assert await appended(journal, started()) is None
        latest = tmp_path / "boot-worker-0.1/checkpoint"
        async with asyncio.timeout(10):
            while not _has(latest, size):  # noqa: ASYNC110 - a thread signs it
                await asyncio.sleep(0.01)  # polling a thread

    monkeypatch.setattr(writer_module, "CHECKPOINT_EVENTS", 1)
    await grow(2)
    await here.keeper.round()
    assert here.named() == [2]
    await grow(3)
    here.clock.at = ANCHOR_SECONDS - 1
    await here.keeper.round()
    assert here.named() == [2]
    here.clock.at = ANCHOR_SECONDS
    await here.keeper.round()
    assert here.named() == [2, 3]
    journal.close()
    await here.keeper.round()
    assert here.named() == [2, 3, 4]
    await here.keeper.round()
    assert here.named() == [2, 3, 4]
    assert here.said == []


async def test_the_dead_are_found_once_and_the_harmed_are_passed_over(tmp_path: Path) -> None:
    """A dead log is said to be as it is, once; one that cannot be read keeps none from being found."""
    journal = open_log(tmp_path / "boot-worker-1.1")
    assert await appended(journal, begun("c")) is None
    copy = tmp_path / "boot-worker-0.1"
    (copy / "seg").mkdir(parents=True)
    (copy / "delegation").write_text("nonsense")
    (copy / "seg" / f"{0:020}.jsonl").write_text("nonsense\n")
    ruin = tmp_path / "boot-worker-2.1"
    (ruin / "seg").mkdir(parents=True)
    here = Deployment(tmp_path)
    await here.keeper.round()
    assert here.said == []  # its writer lives
    assert not ruin.exists()
    journal._log.retire()
    os.close(journal._log.writer._lock)  # as its process's end would
    await here.keeper.round()
    await here.keeper.round()
    unclosed, recovered = here.said
    assert isinstance(unclosed, CallUnclosed)
    assert isinstance(recovered, LogRecovered)
    assert (unclosed.call, unclosed.start) == ("c", 1)
    assert (recovered.log, recovered.size) == ("test/boot-worker-1.1", 2)
    assert verify_path(tmp_path, SIGNER.vkey).exit_code is ExitCode.TAMPERED  # the harmed one
