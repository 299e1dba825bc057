"""Whoever nobody knows cannot fill the disk with evidence of himself, and is never left out of it."""

import asyncio
import http.client
from collections.abc import Callable

from gateway.audit.refusals import REFUSALS_AT_ONCE
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Provider

Start = Callable[..., Gateway]
REFUSED = 1500


def knock(port: int, path: str, times: int) -> None:
    """Ask for something without a credential; a connection is kept as long as the answer lets it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    for _ in range(times):
        connection.request("POST", path, b"{}", {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 401
    connection.close()


async def test_a_flood_of_refusals_is_counted(provider: Provider, start_gateway: Start) -> None:
    """Beyond the budget refusals become counts, in time and at the end; together they are all of them."""
    upstream = {"base_url": f"http://127.0.0.1:{provider.port}/v1", "plain_http": True}
    gateway = await asyncio.to_thread(start_gateway, {"openai": upstream})
    await asyncio.gather(
        asyncio.to_thread(knock, gateway.proxy, "/openai/v1/chat/completions", REFUSED),
        asyncio.to_thread(knock, gateway.sessions, "/v1/sessions", REFUSED),
    )
    await asyncio.to_thread(gateway.stop)
    counted = gateway.events("refusals.counted")
    for kind, role in (("call.denied", "worker-0"), ("session.refused", "control")):
        alone = gateway.events(kind)
        of_role = [event for event in counted if f"/{role}." in event["origin"]]
        assert len(alone) + sum(event["total"] for event in of_role) == REFUSED
        assert len(alone) >= REFUSALS_AT_ONCE
        assert of_role
