"""The official SDKs against `aimock`, a provider double that somebody else wrote, through the gateway.

aimock refuses a call in which any recognised credential field holds anything but the provider's key, so
every success here proves that the key was injected and that no token of ours went with it.
"""

import asyncio
import base64
import json
import os
import subprocess
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
from tests.simulators.node import NODE
from tests.simulators.provider import Exchange, Provider

ROOT = Path(__file__).resolve().parents[2]
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
ASKS_FOR_A_TOOL: Any = [{"role": "user", "content": "use a tool"}]
TOOL_CALL = {"toolCalls": [{"name": "look_up", "arguments": '{"word":"a"}'}]}
FIXTURES = {
    "fixtures": [
        {"match": {"endpoint": "image"}, "response": {"image": {"b64Json": "eA=="}}},
        {"match": {"endpoint": "speech"}, "response": {"audio": "c291bmQ="}},
        {"match": {"endpoint": "transcription"}, "response": {"transcription": {"text": "hi"}}},
        {"match": {"endpoint": "translation"}, "response": {"transcription": {"text": "ho"}}},
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
        tools: Any = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
        called = client.chat.completions.create(
            model="gpt-5-mini", messages=ASKS_FOR_A_TOOL, tools=tools
        )
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


async def test_openai_async(door: tuple[Gateway, str]) -> None:
    """The asynchronous client does what the other does: tools, embeddings, upload, list."""
    gateway, token = door
    url = gateway.url("openai/v1")
    async with openai.AsyncOpenAI(base_url=url, api_key=token, max_retries=0) as client:
        tools: Any = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
        called = await client.chat.completions.create(
            model="gpt-5-mini", messages=ASKS_FOR_A_TOOL, tools=tools
        )
        assert called.choices[0].message.tool_calls
        answered = await client.responses.create(model="gpt-5-mini", input="hello")
        assert answered.output_text == "Hello from the provider."
        vector = await client.embeddings.create(model="text-embedding-3-small", input="hello")
        assert vector.data[0].embedding
        uploaded = await client.files.create(file=("a.jsonl", b"{}\n"), purpose="batch")
        assert uploaded.id in [each.id async for each in client.files.list()]


# The SDK has begun to warn of translations.
@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")
async def test_openai_media(door: tuple[Gateway, str]) -> None:
    """Images and audio work: made, edited, spoken, transcribed and translated."""
    gateway, token = door
    url = gateway.url("openai/v1")
    async with openai.AsyncOpenAI(base_url=url, api_key=token, max_retries=0) as client:
        made = await client.images.generate(model="gpt-image-1", prompt="a")
        assert made.data
        assert made.data[0].b64_json == "eA=="
        edited = await client.images.edit(model="gpt-image-1", prompt="a", image=("a.png", b"png"))
        assert edited.data
        spoken = await client.audio.speech.create(model="tts-1", input="hi", voice="alloy")
        assert spoken.content == b"sound"
        sound = ("a.wav", b"x" * 300_000)
        heard = await client.audio.transcriptions.create(model="whisper-1", file=sound)
        assert heard.text == "hi"
        translated = await client.audio.translations.create(model="whisper-1", file=sound)
        assert translated.text == "ho"


def test_anthropic(door: tuple[Gateway, str]) -> None:
    """Messages, its stream and a tool's use work with the base URL changed."""
    gateway, token = door
    with anthropic.Anthropic(
        base_url=gateway.url("anthropic"), api_key=token, max_retries=0
    ) as client:
        answer = client.messages.create(model="claude-x", max_tokens=50, messages=MESSAGE)
        assert answer.content[0].text == "Hello from the provider."  # type: ignore[union-attr]
        with client.messages.stream(model="claude-x", max_tokens=50, messages=MESSAGE) as stream:
            assert "".join(stream.text_stream) == "Hello from the provider."
        tools: Any = [{"name": "look_up", "input_schema": {"type": "object"}}]
        called = client.messages.create(
            model="claude-x", max_tokens=50, messages=ASKS_FOR_A_TOOL, tools=tools
        )
        assert any(part.type == "tool_use" for part in called.content)


async def test_anthropic_async(door: tuple[Gateway, str]) -> None:
    """The asynchronous client works, also with its token as Bearer, as Claude Code sends it."""
    gateway, token = door
    url = gateway.url("anthropic")
    async with anthropic.AsyncAnthropic(base_url=url, auth_token=token, max_retries=0) as client:
        answer = await client.messages.create(model="claude-x", max_tokens=50, messages=MESSAGE)
        assert answer.content[0].text == "Hello from the provider."  # type: ignore[union-attr]
        async with client.messages.stream(
            model="claude-x", max_tokens=50, messages=MESSAGE
        ) as stream:
            assert "".join([text async for text in stream.text_stream]).startswith("Hello")
        tools: Any = [{"name": "look_up", "input_schema": {"type": "object"}}]
        called = await client.messages.create(
            model="claude-x", max_tokens=50, messages=ASKS_FOR_A_TOOL, tools=tools
        )
        assert any(part.type == "tool_use" for part in called.content)


# aimock's finishReason for a function call is one that the SDK does not know.
@pytest.mark.filterwarnings("ignore:FUNCTION_CALL is not a valid FinishReason")
def test_gemini(door: tuple[Gateway, str]) -> None:
    """generateContent, its stream and tools work with the base URL changed."""
    gateway, token = door
    options = {"base_url": gateway.url("gemini"), "api_version": "v1beta"}
    client = genai.Client(api_key=token, http_options=options)  # type: ignore[arg-type]
    answer = client.models.generate_content(model="gemini-x", contents="hello")
    assert answer.text == "Hello from the provider."
    parts = client.models.generate_content_stream(model="gemini-x", contents="hello")
    assert "".join(part.text or "" for part in parts) == "Hello from the provider."
    declared: Any = {"tools": [{"function_declarations": [{"name": "look_up"}]}]}
    called = client.models.generate_content(
        model="gemini-x", contents="use a tool", config=declared
    )
    assert called.function_calls
    client.close()


# The SDK's own class, and aimock's finishReason.
@pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession")
@pytest.mark.filterwarnings("ignore:FUNCTION_CALL is not a valid FinishReason")
async def test_gemini_async(door: tuple[Gateway, str]) -> None:
    """The asynchronous client calls and streams."""
    gateway, token = door
    options: Any = {"base_url": gateway.url("gemini"), "api_version": "v1beta"}
    client = genai.Client(api_key=token, http_options=options)
    answer = await client.aio.models.generate_content(model="gemini-x", contents="hello")
    assert answer.text == "Hello from the provider."
    stream = await client.aio.models.generate_content_stream(model="gemini-x", contents="hello")
    assert "".join([part.text or "" async for part in stream]) == "Hello from the provider."
    declared: Any = {"tools": [{"function_declarations": [{"name": "look_up"}]}]}
    called = await client.aio.models.generate_content(
        model="gemini-x", contents="use a tool", config=declared
    )
    assert called.function_calls
    await client.aio.aclose()
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


ANSWERS = {
    b"/audio/transcriptions": b'{"text":"hi"}',
    b"/audio/speech": b"sound",
    b"/images/generations": b'{"created":1,"data":[{"b64_json":"eA=="}]}',
    b"/images/edits": b'{"created":1,"data":[{"b64_json":"eA=="}]}',
    b"/batches": b'{"id":"b","object":"batch"}',
    b"/models": b'{"object":"list","data":[{"id":"m","object":"model"}],"has_more":false,"models":[]}',
    b"/content": b"line\n",
    b"/uploads": b'{"id":"u","object":"upload","status":"pending"}',
    b"/parts": b'{"id":"p","object":"upload.part"}',
    b"/complete": b'{"id":"u","object":"upload","status":"completed"}',
    b"/cancel": b'{"id":"u","object":"upload","status":"cancelled"}',
    b"/voices": b'{"id":"v","object":"audio.voice"}',
    b"/voice_consents": b'{"id":"k","object":"audio.voice_consent"}',
    b"/chat/completions/c": b'{"id":"c","object":"chat.completion","choices":[]}',
    b"/models/mine": b'{"id":"mine","object":"model","deleted":true}',
    b"/count_tokens": b'{"input_tokens":7}',
    b":countTokens": b'{"totalTokens":7}',
    b":batchEmbedContents": b'{"embeddings":[{"values":[0.5]}]}',
}


# google-genai's own class.
@pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession")
async def test_every_other_operation(gateway: Gateway, provider: Provider, token: str) -> None:
    """Audio, images, batches, models, token counts and embeddings, by each SDK's own methods."""

    async def answer(it: Exchange) -> None:
        path = it.request.line.split()[1].partition(b"?")[0]
        (reply,) = [body for end, body in ANSWERS.items() if path.endswith(end)]
        await it.reply(reply)

    provider.script = answer
    await asyncio.to_thread(_call_everything, gateway, token)
    keys = {
        value.removeprefix(b"Bearer ").decode()
        for each in provider.received
        for slot in (b"authorization", b"x-api-key", b"x-goog-api-key")
        for value in each.values(slot)
    }
    assert keys == {KEY}
    fields = [field for each in provider.received for field in each.headers]
    assert not any(token.encode() in value for _, value in fields)
    assert not any(name.lower().startswith(b"x-veklom") for name, _ in fields)
    operations = {event["operation"] for event in gateway.events("call.start")}
    assert operations == {
        "audio", "images", "batches", "models", "files", "count_tokens", "embeddings", "chat"
    }  # fmt: skip
    models = [event["model"] for event in gateway.events("call.start")]
    assert {"whisper-1", "gpt-image-1"} <= set(models)


def _call_everything(gateway: Gateway, token: str) -> None:
    url = gateway.url("openai/v1")
    with openai.OpenAI(base_url=url, api_key=token, max_retries=0) as client:
        audio = client.audio.transcriptions.create(
            model="whisper-1", file=("a.wav", b"x" * 300_000)
        )
        assert audio.text == "hi"
        spoken = client.audio.speech.create(model="tts-1", input="hi", voice="alloy")
        assert spoken.content == b"sound"
        assert client.images.generate(model="gpt-image-1", prompt="a").data
        edited = client.images.edit(model="gpt-image-1", prompt="a", image=("a.png", b"png"))
        assert edited.data
        batch = client.batches.create(
            input_file_id="f", endpoint="/v1/responses", completion_window="24h"
        )
        assert batch.id == "b"
        assert [model.id for model in client.models.list()] == ["m"]
        assert client.files.content("f").text == "line\n"
        upload = client.uploads.create(
            bytes=3, filename="a.jsonl", mime_type="text/jsonl", purpose="batch"
        )
        part = client.uploads.parts.create(upload.id, data=b"{}\n")
        done = client.uploads.complete(upload.id, part_ids=[part.id])
        assert done.status == "completed"
        assert client.uploads.cancel(upload.id).status == "cancelled"
        sound = ("a.wav", b"x" * 1000)
        consent = client.audio.voice_consents.create(name="n", language="en", recording=sound)
        voice = client.audio.voices.create(name="n", consent=consent.id, audio_sample=sound)
        assert voice.id == "v"
        assert client.chat.completions.update("c", metadata={"a": "b"}).id == "c"
        assert client.models.delete("mine").deleted
    with anthropic.Anthropic(
        base_url=gateway.url("anthropic"), api_key=token, max_retries=0
    ) as client_a:
        assert client_a.messages.count_tokens(model="claude-x", messages=MESSAGE).input_tokens == 7
        assert client_a.models.list().data
    options: Any = {"base_url": gateway.url("gemini"), "api_version": "v1beta"}
    google = genai.Client(api_key=token, http_options=options)
    assert google.models.count_tokens(model="gemini-x", contents="hello").total_tokens == 7
    embedded = google.models.embed_content(model="gemini-embedding-x", contents="hello")
    assert embedded.embeddings
    assert embedded.embeddings[0].values == [0.5]
    google.close()
    asyncio.run(_count_and_embed(gateway, token))


async def _count_and_embed(gateway: Gateway, token: str) -> None:
    url = gateway.url("anthropic")
    async with anthropic.AsyncAnthropic(base_url=url, api_key=token, max_retries=0) as client:
        counted = await client.messages.count_tokens(model="claude-x", messages=MESSAGE)
        assert counted.input_tokens == 7
    options: Any = {"base_url": gateway.url("gemini"), "api_version": "v1beta"}
    google = genai.Client(api_key=token, http_options=options)
    total = await google.aio.models.count_tokens(model="gemini-x", contents="hello")
    assert total.total_tokens == 7
    embedded = await google.aio.models.embed_content(model="gemini-embedding-x", contents="hello")
    assert embedded.embeddings
    await google.aio.aclose()
    google.close()


async def test_the_session_rides_beside_an_identity(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """With the identity as API key and the session as a default field, neither reaches a provider."""

    async def answer(it: Exchange) -> None:
        path = it.request.line.split()[1].partition(b"?")[0]
        (reply,) = [body for end, body in WHOLE.items() if path.endswith(end)]
        await it.reply(reply)

    provider.script = answer
    identity = await asyncio.to_thread(gateway.identity)
    beside = {"X-Veklom-Session": token}

    def call() -> None:
        options: Any = {"api_key": identity, "max_retries": 0, "default_headers": beside}
        with openai.OpenAI(base_url=gateway.url("openai/v1"), **options) as client:
            client.chat.completions.create(model="m", messages=MESSAGE)
        with anthropic.Anthropic(base_url=gateway.url("anthropic"), **options) as client_a:
            client_a.messages.create(model="m", max_tokens=5, messages=MESSAGE)
        http: Any = {"base_url": gateway.url("gemini"), "api_version": "v1beta", "headers": beside}
        google = genai.Client(api_key=identity, http_options=http)
        google.models.generate_content(model="m", contents="hello")
        google.close()

    await asyncio.to_thread(call)
    assert len(provider.received) == 3
    for each in provider.received:
        fields = b"\n".join(name.lower() + b":" + value for name, value in each.headers)
        assert fields.count(KEY.encode()) == 1
        assert token.encode() not in fields
        assert identity.encode() not in fields
        assert b"veklom" not in fields


WHOLE = {
    b"/chat/completions": b'{"id":"c","object":"chat.completion","choices":[]}',
    b"/messages": b'{"id":"m","type":"message","role":"assistant","content":[]}',
    b":generateContent": b'{"candidates":[]}',
}


# As the official SDK for Node writes an upload: its fields in the order of the call's arguments.
FILE_FIRST = """
const form = new FormData();
form.append("file", new Blob([new Uint8Array(1 << 20)]), "a.mp3");
form.append("model", "whisper-1");
const headers = {authorization: `Bearer ${process.argv[2]}`};
const answer = await fetch(process.argv[1], {method: "POST", headers, body: form});
process.stdout.write(await answer.text());
"""


async def test_node_sends_the_file_before_the_model(
    gateway: Gateway, provider: Provider, token: str
) -> None:
    """An upload from Node, a large file first and the model behind it, is transcribed."""

    async def answer(it: Exchange) -> None:
        await it.reply(ANSWERS[b"/audio/transcriptions"])

    provider.script = answer
    url = gateway.url("openai/v1/audio/transcriptions")
    node = await asyncio.create_subprocess_exec(
        NODE, "--input-type=module", "-e", FILE_FIRST, url, token, stdout=subprocess.PIPE
    )
    said, _ = await node.communicate()
    assert json.loads(said) == {"text": "hi"}
    assert provider.received[0].body.count(bytes(1 << 20)) == 1


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
