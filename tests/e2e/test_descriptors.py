"""Who opens more connections than there are descriptors ends nothing but those connections."""

import asyncio
import os
import resource
from collections.abc import Callable
from pathlib import Path

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider
from tests.simulators.wire import exchange, parse, request

Start = Callable[..., Gateway]

LOW = """
import resource, runpy
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
runpy.run_module("gateway", run_name="__main__", alter_sys=True)
"""


def worker_of(gateway: Gateway) -> int:
    """Return the process id of the one worker."""
    (pid,) = (
        pid
        for pid in gateway.children()
        if b"gateway.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    return pid


def cpu_seconds(pid: int) -> float:
    """Return how long a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_a_low_soft_limit_is_raised(provider: Provider, start_gateway: Start) -> None:
    """Started with 1024 descriptors, as shells do, every process may have as many as are allowed."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(start_gateway, {"openai": upstream}, program=("-c", LOW))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for pid in gateway.children():
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard)


async def test_a_flood_of_connections_passes(provider: Provider, start_gateway: Start) -> None:
    """While no descriptor is left the worker does not spin, and after it calls are recorded and pass."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(start_gateway, {"openai": upstream})
    session = await asyncio.to_thread(gateway.open_session, {"openai": KEY})
    worker = worker_of(gateway)
    _, hard = resource.prlimit(worker, resource.RLIMIT_NOFILE)
    resource.prlimit(worker, resource.RLIMIT_NOFILE, (64, hard))
    refused = request("nobody", closes=False)
    flood = []
    try:
        for _ in range(200):
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
            flood.append(writer)
        # What is recorded now is signed now: the log needs a checkpoint in the middle of the flood.
        flood[0].write(refused)
        before = cpu_seconds(worker)
        await asyncio.sleep(2)  # what is tested is time itself
        assert cpu_seconds(worker) - before < 1
    finally:
        for writer in flood:
            writer.close()
    async with asyncio.timeout(10):
        while "veklom_connections 0.0" not in await asyncio.to_thread(gateway.metrics):  # noqa: ASYNC110 - another process counts
            await asyncio.sleep(0.05)  # polling until the worker has seen them go
    assert parse(await exchange(gateway.proxy, request(session["token"]))).status == 200
    assert "audit.failed" not in gateway.log.read_text()
