"""P: a key or token is in no file, log, metric, error or environment, whatever goes wrong."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import exchange, request

POLICY = """\
rules:
  - id: acme-may
    effect: allow
    match: {tenant: acme}
  - id: not-this-model
    effect: deny
    match: {model: forbidden}
"""


async def provoke(gateway: Gateway, identity: str, token: str) -> list[bytes]:
    """Do everything that makes a gateway speak of a request; return what it said."""
    sessions_path = b"/v1/sessions"
    stolen = b"x-api-key: %b\r\ncookie: k=%b\r\nx-junk: %b\r\n" % ((KEY.encode(),) * 3)
    said = [
        await exchange(gateway.proxy, raw)
        for raw in (
            request(token),
            request(token, b'{"model":"forbidden"}'),
            request(token, b"not json " + KEY.encode()),
            request(KEY),
            request(identity),
            request(token[:-4] + "AAAA"),
            request(token, headers=stolen),
            request(token, path=b"/openai/v1/models?key=" + KEY.encode(), method=b"GET"),
            request(token, path=b"/openai/v1/" + KEY.encode()),
            request(token, path=b"/nobody/" + token.encode()),
            request(token, headers=b"broken header %b\r\n" % KEY.encode()),
            request(token)[:-3],
        )
    ]
    said += [
        await exchange(gateway.sessions, raw)
        for raw in (
            request(identity, b'{"keys":{"openai":"%b"' % KEY.encode(), path=sessions_path),
            request(identity, b'{"keys":{"%b":"x"}}' % KEY.encode(), path=sessions_path),
            request(identity, b'{"keys":{"openai":"a\\nb%b"}}' % KEY.encode(), path=sessions_path),
            request(identity, b'{"keys":["%b"]}' % KEY.encode(), path=sessions_path),
            request(KEY, b'{"keys":{"openai":"%b"}}' % KEY.encode(), path=sessions_path),
            request(identity, b"", path=sessions_path + b"/" + token.encode(), method=b"GET"),
            request(identity, headers=b"broken header %b\r\n" % KEY.encode(), path=sessions_path),
            request(identity, b'{"ttl_seconds":"%b"}' % KEY.encode(), path=b"/v1/sessions/x/renew"),
        )
    ]
    return said


async def test_planted_secrets_are_nowhere(
    provider: Provider, start_gateway: Callable[..., Gateway]
) -> None:
    """Requests of every kind, good, bad and broken, leave no trace of key, token or identity."""

    async def fail(it: Exchange) -> None:
        await it.reply(b'{"error":{"message":"no"}}', status=b"500 Internal Server Error")

    provider.script = fail
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(
        start_gateway,
        {"openai": upstream},
        policy=POLICY,
        extra={"logs": {"level": "debug"}, "timeouts": {"body": "1s"}},
    )
    identity = await asyncio.to_thread(gateway.identity)
    opened = await asyncio.to_thread(
        gateway.post, "/v1/sessions", {"keys": {"openai": KEY}}, identity
    )
    token = str(opened["token"])
    said = await provoke(gateway, identity, token)
    assert all(said), [len(each) for each in said]
    assert len(provider.received) == 1
    metrics = await asyncio.to_thread(gateway.metrics)
    environments = [
        Path(f"/proc/{pid}/{what}").read_bytes()
        for pid in gateway.children()
        for what in ("environ", "cmdline")
    ]
    await asyncio.to_thread(gateway.stop)
    files = [path.read_bytes() for path in gateway.folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    secrets = (KEY, token, identity, token.rpartition(".")[2], identity.rpartition(".")[2])
    for secret in secrets:
        for place in [*said, *files, *environments, metrics.encode()]:
            assert secret.encode() not in place, place[:300]
