"""What the audit log costs: CPU and latency of a call's two records, and how fast a log is verified.

python bench/audit.py [folder on the disk to measure]
"""

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

from gateway.audit.durability import Durability
from gateway.audit.event import CallEnd, CallStart, UsageRecord
from gateway.audit.journal import AuditUnavailable, Journal, JournalPlace
from gateway.audit.recorder import Recorder
from gateway.audit.trust import LogKeys
from gateway.audit.verify import verify_path
from gateway.clock import SystemClock
from keys.signing import Signer

SIGNER = Signer("bench", bytes(32))
CALLS = 40_000
BARE = 20_000


def start(call: str) -> CallStart:
    return CallStart(
        call=call,
        tenant="acme",
        issuer="https://login.example.com",
        subject="alice@example.com",
        session="0" * 32,
        provider="openai",
        operation="chat.completions",
        dialect="openai",
        model="gpt-5-mini",
        stream=True,
        max_tokens=1024,
        request_bytes=1024,
        client_address="192.0.2.1",
        rules=("small-models",),
        policy="sha256:" + "0" * 64,
        credential="v1:0:" + "0" * 32,
        upstream="https://api.openai.com",
    )


def end(call: str) -> CallEnd:
    return CallEnd(
        call=call,
        tenant="acme",
        outcome="complete",
        fault="",
        code="",
        status=200,
        upstream_status=200,
        request_bytes=1024,
        response_bytes=4096,
        usage=UsageRecord(input=100, output=200, source="provider", model="gpt-5-mini"),
        first_byte_us=1000,
        total_us=2000,
    )


async def bare(clients: int) -> float:
    """The loop's own share: as many futures and turns, and no log."""
    loop = asyncio.get_running_loop()

    async def caller(calls: int) -> None:
        for _ in range(calls * 2):
            told = loop.create_future()
            loop.call_soon(told.set_result, None)
            await told

    before = time.process_time()
    await asyncio.gather(*(caller(BARE // clients) for _ in range(clients)))
    return (time.process_time() - before) / BARE * 1e6


async def measure(folder: Path, clients: int, durability: Durability) -> None:
    loop = asyncio.get_running_loop()
    place = JournalPlace(
        directory=folder / f"{durability}-{clients}",
        origin=f"bench/{durability}-{clients}",
        draw_keys=lambda origin: LogKeys.draw(origin, SIGNER),
        calls=clients,
        durability=durability,
    )
    journal = Journal.open(place, clock=SystemClock(), loop=loop)
    recorder = Recorder(journal, durability, 10.0, SystemClock())
    waits: list[float] = []

    async def record(event: CallStart | CallEnd) -> None:
        told = loop.create_future()
        began = time.perf_counter()
        while True:
            try:
                recorder.append(event, told.set_result)
                break
            except AuditUnavailable:  # the disk does not keep up: a caller would get 503
                await asyncio.sleep(0.001)
        assert await told is None
        waits.append(time.perf_counter() - began)

    async def caller(number: int, calls: int) -> None:
        for turn in range(calls):
            call = f"{number:016x}{turn:016x}"
            await record(start(call))
            await record(end(call))

    calls = CALLS if clients > 1 else CALLS // 10
    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(caller(number, calls // clients) for number in range(clients)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    own = cpu / calls * 1e6 - await bare(clients)
    waits.sort()
    print(
        f"{durability:<8} {clients:>5} clients  {own:6.1f} us CPU a call   {calls / wall:>8.0f} calls/s   wait "
        f"p50 {statistics.median(waits) * 1e3:6.2f} ms  p99 {waits[int(len(waits) * 0.99)] * 1e3:6.2f} ms"
    )
    journal.close()


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        for durability in Durability:
            for clients in (1, 16, 128, 1000):
                asyncio.run(measure(folder, clients, durability))
        began = time.perf_counter()
        report = verify_path(folder, SIGNER.vkey)
        events = sum(log.events for log in report.logs)
        took = time.perf_counter() - began
        print(
            f"verify   {events} events in {len(report.logs)} logs: {report.exit_code.name}, {events / took:.0f} events/s"
        )


if __name__ == "__main__":
    main()
