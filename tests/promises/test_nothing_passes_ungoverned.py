"""P: no call reaches a provider but through the governed path, on any route of any dialect."""

import ast
import asyncio
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from gateway.providers import anthropic, gemini, openai
from gateway.providers.dialect import BodyKind
from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider
from tests.simulators.wire import exchange, parse, request

ROOT = Path(__file__).resolve().parents[2]
POLICY = """\
rules:
  - id: acme-may
    effect: allow
    match: {tenant: acme}
"""
FORM = b"content-type: multipart/form-data; boundary=b\r\n"
BODIES = {
    BodyKind.NONE: (b"", b""),
    BodyKind.ACTION: (b"", b""),
    BodyKind.JSON: (
        b"content-type: application/json\r\n",
        b'{"model":"m","max_tokens":1,"requests":[{"params":{"model":"m"}}]}',
    ),
    BodyKind.MULTIPART: (
        FORM,
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n',
    ),
    BodyKind.UPLOAD: (
        FORM,
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n',
    ),
}


def an_example_of(pattern: bytes) -> bytes:
    """Return a path that a route's pattern matches."""
    path = pattern.replace(b"(?:/[^/]{1,256}){0,3}", b"").replace(b"[^/]{1,256}", b"some-id")
    assert re.fullmatch(pattern, path), pattern
    return path


def every_route() -> Iterator[tuple[bytes, bytes, BodyKind]]:
    """Return method, target and body kind of every route, under every provider of the test."""
    tables = (
        (b"/openai/v1", openai.ROUTES),
        (b"/mine", openai.ROUTES),
        (b"/anthropic/v1", anthropic.ROUTES),
        (b"/anthropic", anthropic.ROUTES),
    )
    for prefix, routes in tables:
        for method, pattern, _, body in routes:
            yield method, prefix + an_example_of(pattern.pattern), body
            if method == b"GET":
                yield b"HEAD", prefix + an_example_of(pattern.pattern), body
    for version in (b"", b"/v1beta", b"/v1"):
        yield b"GET", b"/gemini" + version + b"/models", BodyKind.NONE
        yield b"GET", b"/gemini" + version + b"/models/m", BodyKind.NONE
        for verb in gemini.METHODS:
            yield b"POST", b"/gemini" + version + b"/models/m:" + verb, BodyKind.JSON


async def status_of(port: int, token: str, route: tuple[bytes, bytes, BodyKind]) -> int:
    """Return the status that a call on this route gets."""
    method, target, kind = route
    headers, body = BODIES[kind]
    raw = request(token, body, path=target, method=method, headers=headers)
    if not body:
        raw = raw.replace(b"Content-Length: 0\r\n", b"")
    return parse(await exchange(port, raw)).status


async def test_every_route_is_governed(
    provider: Provider, start_gateway: Callable[..., Gateway]
) -> None:
    """Without an identity, a policy's word or a key no route forwards; with them each is on record."""
    root = f"http://127.0.0.1:{provider.port}"
    providers = {
        "openai": {"base_url": f"{root}/v1", "plain_http": True},
        "mine": {"dialect": "openai", "base_url": f"{root}/v1", "plain_http": True},
        "anthropic": {"base_url": root, "plain_http": True},
        "gemini": {"base_url": root, "plain_http": True},
        "unused": {"dialect": "openai", "base_url": f"{root}/v1", "plain_http": True},
    }
    gateway = await asyncio.to_thread(start_gateway, providers, policy=POLICY)
    keys = dict.fromkeys(list(providers)[:4], KEY)
    identity = await asyncio.to_thread(gateway.identity)

    async def token_of(keys: dict[str, str], tenant: str) -> str:
        opened = await asyncio.to_thread(gateway.open_session, keys, tenant=tenant)
        return str(opened["token"])

    denied = await token_of(keys, "other")
    keyless = await token_of({"unused": KEY}, "acme")
    allowed = await token_of(keys, "acme")
    closed = await token_of(keys, "acme")
    for session in gateway.events("session.opened")[-1:]:
        path = b"/v1/sessions/%b" % session["session"].encode()
        await exchange(gateway.sessions, request(identity, b"", path=path, method=b"DELETE"))

    routes = list(every_route())
    assert len(routes) > 100
    for route in routes:
        assert await status_of(gateway.proxy, "no-token", route) == 401, route
        assert await status_of(gateway.proxy, closed, route) == 401, route
        assert await status_of(gateway.proxy, identity, route) == 401, route
        assert await status_of(gateway.proxy, denied, route) == 403, route
        assert await status_of(gateway.proxy, keyless, route) == 403, route
    assert provider.received == []

    for count, route in enumerate(routes, 1):
        assert await status_of(gateway.proxy, allowed, route) == 200, route
        assert len(provider.received) == count, route
        assert len(gateway.events("call.start")) == count, route
    await asyncio.to_thread(gateway.stop)
    assert len(gateway.events("call.end")) == len(routes)
    alone = gateway.events("call.denied")
    assert sum(event["subject"] != "" for event in alone) == 3 * len(routes)
    counted = sum(event["total"] for event in gateway.events("refusals.counted"))
    assert len(alone) + counted == 5 * len(routes)


def _calls(name: str) -> set[str]:
    """Return the product's files in which something of this name is called."""
    found = set()
    for folder in ("gateway", "policies", "keys"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    called = node.func
                    last = called.attr if isinstance(called, ast.Attribute) else None
                    if name == (last or getattr(called, "id", None)):
                        found.add(str(path.relative_to(ROOT)))
    return found


def test_there_is_one_way_out() -> None:
    """Provider connections are dialled in one place, taken in one, and ordered in one: the story."""
    # The other one is to the store of limits, which the operator names and which hears no call.
    assert _calls("create_connection") == {"gateway/proxy/dialling.py", "gateway/limits/wire.py"}
    assert _calls("dial") == {"gateway/proxy/pool.py"}
    assert _calls("acquire") == {"gateway/proxy/driver.py"}
    assert _calls("Forward") == {"gateway/execution.py"}
    assert _calls("open_connection") == set()
