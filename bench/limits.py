"""What five limits cost a call: in memory, and in a Redis beside a bare PING. `make` builds the venv.

.venv/bin/python -m bench.limits        # CPU in memory, round trips and CPU with redis-server
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvloop

from gateway.clock import SystemClock
from gateway.limits.memory_store import MemoryLimiter
from gateway.limits.redis_store import SCRIPTS, RedisLimiter
from gateway.limits.wire import Endpoint, Wire
from policies.limits import Demand, demands
from policies.quota import Usage
from policies.request import AccessRequest, ModelCall, Operation, Principal
from policies.rules import load_policy_set
from tests.simulators.redis import RedisServer

FIVE = """\
limits:
  - {name: a, key: [tenant, subject], requests: {rate: 1000000/s}}
  - {name: b, key: [tenant, model], tokens: {rate: 400000000/min, cache_read: 0}}
  - {name: c, key: tenant, budget: {max: 1000000 USD, per: month, zone: Europe/Paris, warn_at: [80]}}
  - {name: d, key: tenant, bytes: {rate: 900GiB/min}}
  - {name: e, key: [tenant, session], concurrent: {max: 1000000}}
prices: [{provider: openai, model: "gpt-5*", input: "1.25", output: "10"}]
"""
CALLS = 20_000
ROUNDS = 3

POLICY = load_policy_set([("five.yaml", FIVE)], frozenset({"openai"}))
REQUEST = AccessRequest(
    principal=Principal(issuer="https://idp.test", subject="alice", tenant="acme"),
    call=ModelCall(provider="openai", operation=Operation.CHAT, model="gpt-5-mini"),
    session_id="s1",
)
PRICE = POLICY.prices.find("openai", "gpt-5-mini")
assert PRICE is not None
USED = PRICE.of(Usage(input=100, output=500, request_bytes=1))
CLOCK = SystemClock()


def asked() -> list[Demand]:
    wanted = demands(POLICY.limits, REQUEST, USED, CLOCK.now())
    assert isinstance(wanted, list)
    return wanted


def in_memory() -> None:
    limiter = MemoryLimiter(CLOCK)
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(CALLS):
            limiter.settle(limiter.admit(asked()), USED)  # type: ignore[arg-type]  # never refused
        spent = (time.process_time() - began) / CALLS * 1e6
        print(f"memory: {spent:.1f} us of CPU for admit + settle of 5 limits")


async def in_redis(folder: Path) -> None:
    with RedisServer(folder) as server:
        wire = Wire(
            Endpoint(host="127.0.0.1", port=server.port), scripts=SCRIPTS, timeout_seconds=5.0,
            clock=CLOCK, on_state=lambda _is_there, _reason: None,
        )  # fmt: skip
        limiter = RedisLimiter(wire, namespace="bench", sharers=1, clock=CLOCK)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        numbers = iter(range(10**9))

        async def ping() -> None:
            writer.write(b"PING\r\n")
            await reader.readline()

        async def admit_and_settle() -> None:
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            limiter.begin(asked(), f"call-{next(numbers)}", answer.set_result)
            limiter.settle(await answer, USED)

        async def many() -> None:
            for _ in range(CALLS // 100):
                await admit_and_settle()

        for _ in range(ROUNDS):
            print(f"redis: PING {await _median(ping):.0f} us, ", end="")
            print(f"admit of 5 limits {await _median(admit_and_settle):.0f} us, ", end="")
            began = time.process_time()
            await asyncio.gather(*(many() for _ in range(50)))
            spent = (time.process_time() - began) / (CALLS // 2) * 1e6
            print(f"{spent:.0f} us of CPU for admit + settle, 50 calls at once")
        writer.close()
        await wire.close()


async def _median(ask: Callable[[], Awaitable[None]]) -> float:
    taken = []
    for _ in range(2000):
        began = time.perf_counter()
        await ask()
        taken.append((time.perf_counter() - began) * 1e6)
    return statistics.median(taken)


if __name__ == "__main__":
    in_memory()
    uvloop.run(in_redis(Path(tempfile.mkdtemp())))
