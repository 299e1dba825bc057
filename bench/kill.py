"""How long one kill takes to cut 200 live streams over four workers.

    .venv/bin/python -m bench.kill

From the moment at which the operator's request is sent: until it is answered (everything is cut
then, and on record), and until the last caller has seen its stream break off.
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

from tests.e2e.test_kills import STREAMS, ask, begin, open_stream, operator
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider

ROUNDS = 5
KEY = "sk-bench-0123456789abcdef0123456789abcdef"


async def one_round(gateway: Gateway, tenant: str) -> tuple[float, float]:
    """Return the two times, in milliseconds."""
    sessions = [
        await asyncio.to_thread(
            gateway.open_session, {"openai": KEY}, subject=f"s{number}", tenant=tenant
        )
        for number in range(20)
    ]
    streams = [await open_stream(gateway, str(sessions[n % 20]["token"])) for n in range(STREAMS)]
    identity = await operator(gateway)
    asked = {"scope": "tenant", "value": tenant, "reason": "bench"}
    began = time.perf_counter()

    async def until_cut(reader: asyncio.StreamReader) -> float:
        await reader.read()
        return time.perf_counter() - began

    async def until_answered() -> float:
        status, placed = await ask(gateway.admin, "POST", "/admin/v1/kill", identity, asked)
        assert (status, placed["cut_calls"]) == (201, STREAMS)
        return time.perf_counter() - began

    answered, *cut = await asyncio.gather(
        until_answered(), *(until_cut(reader) for reader, _ in streams)
    )
    for _, writer in streams:
        writer.close()
    return answered * 1000, max(cut) * 1000


async def main() -> None:
    """Print the median and the spread of both."""
    started: list[Gateway] = []

    def start(providers: dict[str, dict[str, object]], **options: object) -> Gateway:
        gateway = Gateway(folder=folder / "gateway", providers=providers, **options)  # type: ignore[arg-type] # the test's own options
        started.append(gateway.__enter__())
        return gateway

    with tempfile.TemporaryDirectory(prefix="veklom-bench-") as name:
        folder = Path(name)
        async with Provider() as provider:
            gateway = await begin(
                start, provider, workers=4, extra={"sessions": {"per_subject": 1000}}
            )
            try:
                rounds = [await one_round(gateway, f"tenant-{n}") for n in range(ROUNDS)]
            finally:
                await asyncio.to_thread(gateway.stop)
    for what, values in zip(("answered", "last cut"), zip(*rounds, strict=True), strict=True):
        print(
            f"{what:9} after {statistics.median(values):5.0f} ms"
            f"  [{min(values):.0f} .. {max(values):.0f}], {ROUNDS} rounds of {STREAMS} streams"
        )


if __name__ == "__main__":
    asyncio.run(main())
