"""P1 in a fleet: no piece of a key or a token is ever in Redis, nor on its way there."""

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.simulators.fleet import start_replica, windows
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider
from tests.simulators.redis import MEMORY_ONLY, RedisServer

KEY = "sk-planted-6b1f0c9e4d7a82f35c10b9e8d7f6a5b4-in-a-fleet"
TOLD = "a label that Redis is told"


async def test_no_piece_of_a_key_or_token_reaches_the_store(
    tmp_path: Path, provider: Provider, start_gateway: Callable[..., Gateway]
) -> None:
    """While a session is opened, used, renewed and closed, neither MONITOR nor a dump shows 16 bytes."""
    settings = {**MEMORY_ONLY, "rdbcompression": "no"}
    with RedisServer(tmp_path / "redis", settings) as redis:
        seen, dump = tmp_path / "monitor.txt", tmp_path / "dump.rdb"
        command = ["redis-cli", "-p", str(redis.port)]
        with seen.open("wb") as file:
            monitor = await asyncio.create_subprocess_exec(*command, "MONITOR", stdout=file)
        try:
            one = await start_replica(start_gateway, provider, redis)
            other = await start_replica(start_gateway, provider, redis)
            token, path = await one.open(KEY, label=TOLD)
            assert await other.status(token) == 200
            status, renewed = await other.ask("POST", f"{path}/renew", {}, session=token)
            assert status == 200
            assert await one.status(renewed["token"]) == 200
            closed, path = await one.open(KEY)
            assert await other.status(closed) == 200
            assert (await other.ask("DELETE", path))[0] == 200
            await asyncio.to_thread(
                subprocess.run, [*command, "--rdb", str(dump)], check=True, capture_output=True
            )
        finally:
            monitor.terminate()
            await monitor.wait()
        shown = seen.read_bytes(), dump.read_bytes()
    for place in shown:
        assert TOLD.encode() in place  # this is where a key would be
        for secret in (KEY, token, closed, renewed["token"]):
            found = [piece for piece in windows(secret) if piece in place]
            assert not found, found[:1]
    assert not list((tmp_path / "redis").glob("*.rdb"))
