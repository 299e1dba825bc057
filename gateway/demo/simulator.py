"""A provider on loopback for `veklom demo`: one key opens it, and it says what else came.

It speaks enough of the OpenAI API for the official SDK to stream a chat completion, usage included,
and answers 401 to any other key, as the provider would.
"""

import hmac
import json
from collections.abc import AsyncIterator

from aiohttp import web

from gateway.identity.slots import CREDENTIAL_SLOTS

WORDS = ("Governed ", "calls ", "leave ", "no ", "key ", "behind.")


class Simulator:
    """A provider that accepts exactly one key and counts who tried."""

    def __init__(self, key: str) -> None:
        self._authorization = f"Bearer {key}".encode()
        self.accepted = 0
        self.refused = 0
        self.foreign: set[str] = set()
        self._runner: web.AppRunner | None = None

    async def start(self) -> str:
        """Listen on a free loopback port; return the base URL."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        return f"http://{host}:{port}/v1"

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        presented = request.headers.get("Authorization", "").encode()
        self.foreign |= _foreign(request)
        if not hmac.compare_digest(presented, self._authorization):
            self.refused += 1
            error = {"message": "Incorrect API key provided.", "code": "invalid_api_key"}
            return web.json_response({"error": error}, status=401)
        self.accepted += 1
        asked = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for event in _events(asked["model"]):
            await response.write(f"data: {event}\n\n".encode())
        return response


def _foreign(request: web.Request) -> set[str]:
    """Return every place, but for the provider's own, where a credential may be and something is."""
    names = [name.lower() for name, _ in request.raw_headers]
    slots = set(names) & (CREDENTIAL_SLOTS - {b"authorization"})
    ours = {name for name in names if name.startswith(b"x-veklom")}
    twice = {b"authorization"} if names.count(b"authorization") > 1 else set()
    return {name.decode() for name in slots | ours | twice} | set(request.query)


async def _events(model: str) -> AsyncIterator[str]:
    shared = {
        "id": "chatcmpl-demo",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": model,
    }
    for word in WORDS:
        yield json.dumps({**shared, "choices": [{"index": 0, "delta": {"content": word}}]})
    done = {"index": 0, "delta": {}, "finish_reason": "stop"}
    yield json.dumps({**shared, "choices": [done]})
    usage = {"prompt_tokens": 9, "completion_tokens": len(WORDS), "total_tokens": 9 + len(WORDS)}
    yield json.dumps({**shared, "choices": [], "usage": usage})
    yield "[DONE]"
