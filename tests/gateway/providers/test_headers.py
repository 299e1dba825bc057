"""Which fields cross: each official SDK called directly and through the gateway, side by side."""

import asyncio
from typing import Any

import anthropic
import openai
import pytest
from google import genai

from gateway.providers.headers import forwardable
from gateway.providers.provider import DIALECTS
from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider

MESSAGE: Any = [{"role": "user", "content": "hello"}]
LOST = {
    "connection": "hop by hop (RFC 9110 7.6.1); the gateway keeps its own connections",
}
"""Names that only the direct call has. There is none that only the gateway's has."""

MOVED = {
    "authorization": "Anthropic's API takes its key from `x-api-key` in every version",
    "x-api-key": "Anthropic's API takes its key from `x-api-key` in every version",
}
"""The key's slot, where the SDK's and the gateway's are not the same."""


def _call_openai(base_url: str, key: str) -> None:
    options: Any = {"organization": "org", "project": "proj", "max_retries": 0}
    with openai.OpenAI(base_url=base_url, api_key=key, **options) as client:
        client.chat.completions.create(model="m", messages=MESSAGE)
        client.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
        client.models.list()


def _call_anthropic(base_url: str, key: str) -> None:
    named = {"anthropic-workspace-id": "w", "anthropic-user-profile-id": "u"}
    with anthropic.Anthropic(
        base_url=base_url, api_key=key, max_retries=0, default_headers=named
    ) as client:
        client.messages.create(model="m", max_tokens=5, messages=MESSAGE)
        client.beta.messages.create(model="m", max_tokens=5, messages=MESSAGE, betas=["b-1"])
        client.models.list()


def _call_gemini(base_url: str, key: str) -> None:
    options: Any = {"base_url": base_url, "api_version": "v1beta", "timeout": 30_000}
    client = genai.Client(api_key=key, http_options=options)
    client.models.generate_content(model="m", contents="hello")
    list(client.models.list())
    client.close()


ANSWERS = {
    b"/chat/completions": b'{"id":"c","object":"chat.completion","choices":[]}',
    b"/files": b'{"id":"f","object":"file"}',
    b"/messages": b'{"id":"m","type":"message","role":"assistant","content":[]}',
    b"/models": b'{"object":"list","data":[],"has_more":false,"models":[]}',
    b":generateContent": b'{"candidates":[]}',
}


@pytest.mark.parametrize(
    ("name", "base", "call"),
    [
        ("openai", "/v1", _call_openai),
        ("anthropic", "", _call_anthropic),
        ("gemini", "", _call_gemini),
    ],
)
async def test_an_sdks_fields_arrive_as_if_it_had_called_directly(
    gateway: Gateway, provider: Provider, token: str, name: str, base: str, call: Any
) -> None:
    """Between a direct and a governed call the names differ by a short list with reasons, no more."""

    async def answer(it: Exchange) -> None:
        path = it.request.line.split()[1].partition(b"?")[0]
        (reply,) = [body for end, body in ANSWERS.items() if path.endswith(end)]
        await it.reply(reply)

    provider.script = answer
    await asyncio.to_thread(call, f"http://127.0.0.1:{provider.port}{base}", KEY)
    direct = list(provider.received)
    provider.received.clear()
    await asyncio.to_thread(call, gateway.url(name) + base, token)
    governed = list(provider.received)
    assert [each.line for each in governed] == [each.line for each in direct]
    for one, other in zip(direct, governed, strict=True):
        names = {field.decode().lower() for field, _ in one.headers}
        through = {field.decode().lower() for field, _ in other.headers}
        moved = set(MOVED) if name == "anthropic" else set()
        assert names - through - moved == set(LOST)
        assert through - names - moved == set()
        # The host is another, a multipart boundary is drawn anew, and a compressed answer is not
        # asked for: its usage could not be read.
        shared = names & through - {"host", "accept-encoding", *moved}
        for field in shared - {"content-type"}:
            assert other.values(field.encode()) == one.values(field.encode()), field


def test_a_field_of_one_dialect_stays_out_of_the_others() -> None:
    """What means something to one provider only is not told to another."""
    fields = [
        (b"openai-conversation-id", b"c"), (b"openai-organization", b"o"),
        (b"anthropic-workspace-id", b"w"), (b"anthropic-user-profile-id", b"u"),
        (b"anthropic-version", b"v"), (b"x-goog-api-client", b"g"), (b"x-title", b"t"),
    ]  # fmt: skip
    passed = {
        name: {field for field, _ in forwardable(dialect, fields)} - {b"accept-encoding"}
        for name, dialect in DIALECTS.items()
    }
    assert passed == {
        "openai": {b"openai-conversation-id", b"openai-organization", b"x-title"},
        "anthropic": {
            b"anthropic-workspace-id", b"anthropic-user-profile-id", b"anthropic-version"
        },
        "gemini": {b"x-goog-api-client"},
    }  # fmt: skip
