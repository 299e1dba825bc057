"""A real journal on a real disk, and its loop."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.audit.event import CallEnd, CallStart, Event, ProcessStarted, UsageRecord
from gateway.audit.journal import AuditUnavailable, Journal, JournalPlace
from gateway.audit.trust import LogKeys
from gateway.clock import SystemClock
from keys.signing import Signer

SIGNER = Signer("test", bytes(range(32)))


def started(role: str = "test") -> Event:
    """Return some event."""
    return ProcessStarted(role=role, run=1, version="1")


def begun(call: str) -> CallStart:
    """Return the start of a call."""
    return CallStart(
        call=call, tenant="acme", issuer="i", subject="s", session="x", provider="openai",
        operation="chat", dialect="openai", model="m", stream=False, max_tokens=0, request_bytes=1,
        client_address="127.0.0.1", rules=("r",), policy="sha256:0", credential="f", upstream="u",
    )  # fmt: skip


def ended(call: str) -> CallEnd:
    """Return the end of a call."""
    return CallEnd(
        call=call, tenant="acme", outcome="complete", fault="", code="", status=200, upstream_status=200,
        request_bytes=1, response_bytes=1, usage=UsageRecord(), first_byte_us=1, total_us=2,
    )  # fmt: skip


async def appended(journal: Journal, event: Event) -> AuditUnavailable | None:
    """Append and return what the waiter was told."""
    told: asyncio.Future[AuditUnavailable | None] = asyncio.get_running_loop().create_future()
    journal.append(event, told.set_result)
    return await told


def open_log(folder: Path, *, calls: int = 0, drawn: list[LogKeys] | None = None) -> Journal:
    """Open a log at `folder`, named after it; the keys that it draws are added to `drawn`."""
    kept = drawn if drawn is not None else []

    def draw_keys(origin: str) -> LogKeys:
        kept.append(LogKeys.draw(origin, SIGNER))
        return kept[-1]

    place = JournalPlace(
        directory=folder, origin=f"test/{folder.name}", draw_keys=draw_keys, calls=calls
    )
    return Journal.open(place, clock=SystemClock(), loop=asyncio.get_running_loop())


@pytest.fixture
def open_journal(tmp_path: Path) -> Callable[..., Journal]:
    """Open logs below one folder, each under its own name."""

    def open_it(name: str = "log", *, calls: int = 0) -> Journal:
        return open_log(tmp_path / "audit" / name, calls=calls)

    return open_it
