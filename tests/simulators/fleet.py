"""Replicas of one deployment that share a Redis: gateways with one deployment key between them."""

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider
from tests.simulators.redis import RedisServer
from tests.simulators.wire import Response, exchange, parse, request

DEPLOYMENT_KEY = bytes(range(32))


def shares(
    redis: RedisServer, key: bytes = DEPLOYMENT_KEY, **fields: Any
) -> Callable[[Gateway], Mapping[str, Any]]:
    """Return what makes a gateway a replica: its store, and the deployment key in its own folder."""

    def configuration(gateway: Gateway) -> Mapping[str, Any]:
        state = gateway.folder / "state"
        state.mkdir(mode=0o700, exist_ok=True)
        path = state / "fingerprint.key"
        path.write_bytes(key)
        path.chmod(0o600)
        return {"store": {"backend": "redis", "url": redis.url, "staleness": "3s", **fields}}

    return configuration


class Replica:
    """One gateway of a fleet, and a caller's way in."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    async def ask(
        self,
        method: str,
        path: str = "/v1/sessions",
        body: object = None,
        *,
        who: str = "alice",
        session: str = "",
    ) -> tuple[int, Any]:
        """Ask the sessions listener as a development identity; return status and JSON."""
        identity = await asyncio.to_thread(self.gateway.identity, who)
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {identity}\r\n"
        head += f"X-Veklom-Session: {session}\r\n" if session else ""
        head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        seen = parse(await exchange(self.gateway.sessions, head.encode() + content))
        return seen.status, json.loads(seen.body) if seen.body else None

    async def open(self, key: str, *, who: str = "alice", **asked: Any) -> tuple[str, str]:
        """Open a session; return its token and its path."""
        body = {"keys": {"openai": key}, **asked}
        status, opened = await self.ask("POST", body=body, who=who)
        assert status == 201, opened
        return opened["token"], f"/v1/sessions/{opened['session_id']}"

    async def operate(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Ask the admin listener as an operator with a second factor; return status and JSON."""
        claims = {"roles": ["operator"], "amr": ["mfa"]}
        identity = await asyncio.to_thread(self.gateway.identity, "olga", "operations", **claims)
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {identity}\r\n"
        head += f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        seen = parse(await exchange(self.gateway.admin, head.encode() + content))
        return seen.status, json.loads(seen.body)

    async def call(self, token: str) -> Response:
        """Make one call on a connection of its own."""
        return parse(await exchange(self.gateway.proxy, request(token)))

    async def status(self, token: str) -> int:
        """Return the status of one call."""
        return (await self.call(token)).status

    async def checks(self) -> dict[str, bool]:
        """Return what the gateway says of its health."""
        asking = b"GET /readyz HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n"
        found: dict[str, bool] = json.loads(parse(await exchange(self.gateway.admin, asking)).body)[
            "checks"
        ]
        return found


async def start_replica(
    start: Callable[..., Gateway], provider: Provider, redis: RedisServer, **options: Any
) -> Replica:
    """Start one replica in front of the double."""
    fields = options.pop("store", {})
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(
        start, {"openai": upstream}, extra_from=shares(redis, **fields), **options
    )
    return Replica(gateway)


def windows(secret: str, size: int = 16) -> set[bytes]:
    """Return every piece of a secret of so many bytes."""
    data = secret.encode()
    return {data[begin : begin + size] for begin in range(len(data) - size + 1)}


def files_below(folder: Path) -> list[bytes]:
    """Return the content of every file."""
    return [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
