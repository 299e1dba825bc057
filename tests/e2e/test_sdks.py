"""The official SDKs against `aimock`, a provider double that somebody else wrote, through the gateway.

aimock refuses a call in which any recognised credential field holds anything but the provider's key, so
every success here proves that the key was injected and that no token of ours went with it.
"""

import asyncio
import base64
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from google import genai
from google.genai import errors as genai_errors

from tests.conftest import KEY
from tests.simulators.gateway import Gateway, free_port, wait_for_port

ROOT = Path(__file__).resolve().parents[2]
NODE = Path(sys.executable).with_name("node")
MESSAGE: Any = [{"role": "user", "content": "hello"}]
POLICY = """\
rules:
  - id: all-but-forbidden
    effect: allow
    match: {tenant: acme}
  - id: no-forbidden
    effect: deny
    match: {model: "forbidden*"}
    message: That model is not for you.
limits:
  - name: slow
    key: [subject]
    match: {model: "slow*"}
    requests: {rate: 1/h}
"""
TOOL_CALL = {"toolCalls": [{"name": "look_up", "arguments": '{"word":"a"}'}]}
FIXTURES = {
    "fixtures": [
        {"match": {"userMessage": "use a tool"}, "response": TOOL_CALL},
        {"match": {"userMessage": "hello"}, "response": {"content": "Hello from the provider."}},
    ]
}


@pytest.fixture(scope="module")
def aimock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The double's port; it accepts one key only."""
    fixtures = tmp_path_factory.mktemp("aimock") / "fixtures.json"
    fixtures.write_text(json.dumps(FIXTURES))
    port = free_port()
    cli = ROOT / "tests/npm/node_modules/@copilotkit/aimock/dist/cli.js"
    process = subprocess.Popen(
        [str(NODE), str(cli), "-p", str(port), "-h", "127.0.0.1", "-f", str(fixtures)],
        env={"PATH": os.environ["PATH"], "AIMOCK_API_KEYS": KEY},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_port(port)
    yield port
    process.terminate()
    process.wait(10)


@pytest.fixture
def door(aimock: int, start_gateway: Callable[..., Gateway]) -> tuple[Gateway, str]:
    """A gateway in front of the double, and a session's token."""
    root = f"http://127.0.0.1:{aimock}"
    providers = {
        "openai": {"base_url": f"{root}/v1", "plain_http": True},
        "anthropic": {"base_url": root, "plain_http": True},
        "gemini": {"base_url": root, "plain_http": True},
    }
    gateway = start_gateway(providers, policy=POLICY)
    session = gateway.open_session(dict.fromkeys(providers, KEY))
    return gateway, str(session["token"])


def test_openai_sync(door: tuple[Gateway, str]) -> None:
    """Chat, stream, tools, Responses, embeddings and file upload work with the base URL changed."""
    gateway, token = door
    with openai.OpenAI(base_url=gateway.url("openai/v1"), api_key=token, max_retries=0) as client:
        answer = client.chat.completions.create(model="gpt-5-mini", messages=MESSAGE)
        assert answer.choices[0].message.content == "Hello from the provider."
        stream = client.chat.completions.create(model="gpt-5-mini", messages=MESSAGE, stream=True)
        text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
        assert text == "Hello from the provider."
        asked: Any = [{"role": "user", "content": "use a tool"}]
        tools: Any = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
        called = client.chat.completions.create(model="gpt-5-mini", messages=asked, tools=tools)
        assert called.choices[0].message.tool_calls
        answered = client.responses.create(model="gpt-5-mini", input="hello")
        assert answered.output_text == "Hello from the provider."
        vector = client.embeddings.create(model="text-embedding-3-small", input="hello")
        assert vector.data[0].embedding
        uploaded = client.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
        assert uploaded.id


async def test_openai_async_stream(door: tuple[Gateway, str]) -> None:
    """The asynchronous client streams chat and Responses."""
    gateway, token = door
    url = gateway.url("openai/v1")
    async with openai.AsyncOpenAI(base_url=url, api_key=token, max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="gpt-5-mini", messages=MESSAGE, stream=True
        )
        parts: AsyncIterator[Any] = aiter(stream)
        text = "".join([p.choices[0].delta.content or "" async for p in parts if p.choices])
        assert text == "Hello from the provider."
        events = await client.responses.create(model="gpt-5-mini", input="hello", stream=True)
        kinds = [event.type async for event in events]
        assert kinds[-1] == "response.completed"


def test_anthropic(door: tuple[Gateway, str]) -> None:
    """Messages and its stream work with the base URL changed."""
    gateway, token = door
    with anthropic.Anthropic(
        base_url=gateway.url("anthropic"), api_key=token, max_retries=0
    ) as client:
        answer = client.messages.create(model="claude-x", max_tokens=50, messages=MESSAGE)
        assert answer.content[0].text == "Hello from the provider."  # type: ignore[union-attr]
        with client.messages.stream(model="claude-x", max_tokens=50, messages=MESSAGE) as stream:
            assert "".join(stream.text_stream) == "Hello from the provider."


def test_gemini(door: tuple[Gateway, str]) -> None:
    """generateContent, its stream and embedContent work with the base URL changed."""
    gateway, token = door
    options = {"base_url": gateway.url("gemini"), "api_version": "v1beta"}
    client = genai.Client(api_key=token, http_options=options)  # type: ignore[arg-type]
    answer = client.models.generate_content(model="gemini-x", contents="hello")
    assert answer.text == "Hello from the provider."
    parts = client.models.generate_content_stream(model="gemini-x", contents="hello")
    assert "".join(part.text or "" for part in parts) == "Hello from the provider."
    client.close()


def test_denials_raise_the_sdks_own_errors(door: tuple[Gateway, str]) -> None:
    """A denial, a limit, a bad token and an unknown route raise what each SDK raises for them."""
    gateway, token = door
    url = gateway.url("openai/v1")
    with openai.OpenAI(base_url=url, api_key=token, max_retries=0) as client:
        with pytest.raises(openai.PermissionDeniedError, match="no-forbidden") as denied:
            client.chat.completions.create(model="forbidden-1", messages=MESSAGE)
        assert denied.value.code == "policy_denied"
        client.chat.completions.create(model="slow-1", messages=MESSAGE)
        with pytest.raises(openai.RateLimitError) as limited:
            client.chat.completions.create(model="slow-1", messages=MESSAGE)
        assert int(limited.value.response.headers["retry-after"]) > 3000
        assert '"slow";q=1' in limited.value.response.headers["ratelimit-policy"]
        with pytest.raises(openai.NotFoundError):
            client.fine_tuning.jobs.list()
    with (
        openai.OpenAI(base_url=url, api_key="sk-raw", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()
    with anthropic.Anthropic(
        base_url=gateway.url("anthropic"), api_key=token, max_retries=0
    ) as client_a:
        with pytest.raises(anthropic.PermissionDeniedError):
            client_a.messages.create(model="forbidden-1", max_tokens=5, messages=MESSAGE)
        with pytest.raises(anthropic.RateLimitError):
            client_a.messages.create(model="slow-1", max_tokens=5, messages=MESSAGE)
    options: Any = {"base_url": gateway.url("gemini"), "api_version": "v1beta"}
    google = genai.Client(api_key=token, http_options=options)
    with pytest.raises(genai_errors.ClientError) as refused:
        google.models.generate_content(model="forbidden-1", contents="hello")
    assert refused.value.code == 403
    google.close()


async def test_what_agents_do_first(door: tuple[Gateway, str]) -> None:
    """`HEAD /` is answered, and a WebSocket attempt on Responses gets 426 so that agents fall back."""
    gateway, token = door
    nonce = base64.b64encode(os.urandom(16))
    for raw, status in (
        (b"HEAD / HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n", b"200"),
        (
            b"GET /openai/v1/responses HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %b\r\n"
            b"Authorization: Bearer %b\r\n\r\n" % (nonce, token.encode()),
            b"426",
        ),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.proxy)
        writer.write(raw)
        assert (await reader.readline()).split()[1] == status
        writer.close()
