"""Every refusal of the gateway raises the SDK's own class, and says truly whether to try again.

One table: code x SDK x synchronous and asynchronous. Then streams that are cut off in the middle.
"""

import asyncio
import json
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import anthropic
import httpx2
import openai
import pytest
from google import genai
from google.genai import errors as genai_errors

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange
from tests.simulators.threaded import threaded_provider

# google-genai's aiohttp session is a subclass of its own making.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Inheritance class AiohttpClientSession"),
    pytest.mark.timeout(180),
]

POLICY = """\
rules:
  - {id: acme, effect: allow, match: {tenant: acme}}
  - {id: no-forbidden, effect: deny, match: {model: "forbidden*"}, message: Not that one.}
limits:
  - {name: slow, key: [session], match: {model: "slow*"}, requests: {rate: 1/min}}
  - {name: far, key: [session], match: {model: "far*"}, requests: {rate: 1/h}}
  - {name: tiny, key: [session], match: {model: "tiny*"}, tokens: {rate: 1/d}}
  - {name: one-at-a-time, key: [session], match: {model: "narrow*"}, concurrent: {max: 1}}
"""
SMALL = {
    "limits": {"buffered_body": "64KiB", "buffered_total": "32KiB"},
    "timeouts": {"first_byte": "1s"},
}
"""A gateway that holds little and waits briefly, so that 413, 503 and 504 come at once."""


@dataclass(frozen=True)
class Refusal:
    """One way to be refused: how to call, and what the answer says."""

    status: int
    code: str
    model: str = "m"
    text: str = "hello"
    bad_path: bool = False
    bad_token: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    retried: str = ""  # what the answer says: "" (nothing), "never", "after", "later"


REFUSALS = [
    Refusal(400, "ambiguous_credentials", headers={"X-Veklom-Session": "<another>"}),
    Refusal(401, "credential_not_accepted", bad_token=True),
    Refusal(403, "policy_denied", model="forbidden-1"),
    Refusal(404, "unknown_route", bad_path=True),
    Refusal(413, "body_too_large", text="x" * 80_000),
    Refusal(429, "rate_limit_exceeded", model="slow-1", retried="after"),
    Refusal(429, "rate_limit_exceeded", model="far-1", retried="later"),
    Refusal(429, "call_exceeds_limit", model="tiny-1", retried="never"),
    Refusal(429, "concurrency_limit_exceeded", model="narrow-1", retried="after"),
    Refusal(502, "upstream_unreachable", model="dead-1"),
    Refusal(503, "overloaded", text="x" * 48_000, retried="after"),
    Refusal(504, "upstream_timeout", model="silent-1"),
]
UNRECORDED = Refusal(503, "audit_unavailable", retried="never")

CLASSES: dict[str, dict[int, type[Exception]]] = {
    "openai": {
        400: openai.BadRequestError, 401: openai.AuthenticationError,
        403: openai.PermissionDeniedError, 404: openai.NotFoundError, 413: openai.APIStatusError,
        429: openai.RateLimitError, 502: openai.InternalServerError,
        503: openai.InternalServerError, 504: openai.InternalServerError,
    },
    "anthropic": {
        400: anthropic.BadRequestError, 401: anthropic.AuthenticationError,
        403: anthropic.PermissionDeniedError, 404: anthropic.NotFoundError,
        413: anthropic.ContentTooLargeError, 429: anthropic.RateLimitError,
        502: anthropic.InternalServerError, 503: anthropic.ServiceUnavailableError,
        504: anthropic.GatewayTimeoutError,
    },
    "gemini": {
        400: genai_errors.ClientError, 401: genai_errors.ClientError,
        403: genai_errors.ClientError, 404: genai_errors.ClientError,
        413: genai_errors.ClientError, 429: genai_errors.ClientError,
        502: genai_errors.ServerError, 503: genai_errors.ServerError,
        504: genai_errors.ServerError,
    },
}  # fmt: skip


# --- one call by each SDK ------------------------------------------------------------------------


@dataclass(frozen=True)
class Caller:
    """What a call needs: where, with which token."""

    gateway: Gateway
    token: str
    other_token: str = ""

    def options(self, refusal: Refusal) -> tuple[str, dict[str, str]]:
        """Return the API key and the extra fields of a call."""
        headers = {
            name: value.replace("<another>", self.other_token)
            for name, value in refusal.headers.items()
        }
        return ("sk-raw" if refusal.bad_token else self.token), headers


def _message(refusal: Refusal) -> Any:
    return [{"role": "user", "content": refusal.text}]


def _openai(caller: Caller, refusal: Refusal) -> None:
    key, headers = caller.options(refusal)
    url = caller.gateway.url("openai/v9" if refusal.bad_path else "openai/v1")
    options: Any = {"api_key": key, "max_retries": 0, "default_headers": headers}
    with openai.OpenAI(base_url=url, **options) as client:
        client.chat.completions.create(model=refusal.model, messages=_message(refusal))


async def _openai_async(caller: Caller, refusal: Refusal) -> None:
    key, headers = caller.options(refusal)
    url = caller.gateway.url("openai/v9" if refusal.bad_path else "openai/v1")
    options: Any = {"api_key": key, "max_retries": 0, "default_headers": headers}
    async with openai.AsyncOpenAI(base_url=url, **options) as client:
        await client.chat.completions.create(model=refusal.model, messages=_message(refusal))


def _anthropic(caller: Caller, refusal: Refusal) -> None:
    key, headers = caller.options(refusal)
    url = caller.gateway.url("anthropic/v9" if refusal.bad_path else "anthropic")
    options: Any = {"api_key": key, "max_retries": 0, "default_headers": headers}
    with anthropic.Anthropic(base_url=url, **options) as client:
        client.messages.create(model=refusal.model, max_tokens=5, messages=_message(refusal))


async def _anthropic_async(caller: Caller, refusal: Refusal) -> None:
    key, headers = caller.options(refusal)
    url = caller.gateway.url("anthropic/v9" if refusal.bad_path else "anthropic")
    options: Any = {"api_key": key, "max_retries": 0, "default_headers": headers}
    async with anthropic.AsyncAnthropic(base_url=url, **options) as client:
        await client.messages.create(model=refusal.model, max_tokens=5, messages=_message(refusal))


def _google(caller: Caller, refusal: Refusal) -> genai.Client:
    key, headers = caller.options(refusal)
    options: Any = {
        "base_url": caller.gateway.url("gemini"),
        "api_version": "v9" if refusal.bad_path else "v1beta",
        "headers": headers,
    }
    return genai.Client(api_key=key, http_options=options)


def _gemini(caller: Caller, refusal: Refusal) -> None:
    client = _google(caller, refusal)
    try:
        client.models.generate_content(model=refusal.model, contents=refusal.text)
    finally:
        client.close()


async def _gemini_async(caller: Caller, refusal: Refusal) -> None:
    client = _google(caller, refusal)
    try:
        await client.aio.models.generate_content(model=refusal.model, contents=refusal.text)
    finally:
        await client.aio.aclose()
        client.close()


def _sync(call: Callable[[Caller, Refusal], Any]) -> Callable[[Caller, Refusal], None]:
    return lambda caller, refusal: asyncio.run(call(caller, refusal))


CALLS: dict[str, tuple[str, Callable[[Caller, Refusal], None]]] = {
    "openai, sync": ("openai", _openai),
    "openai, async": ("openai", _sync(_openai_async)),
    "anthropic, sync": ("anthropic", _anthropic),
    "anthropic, async": ("anthropic", _sync(_anthropic_async)),
    "gemini, sync": ("gemini", _gemini),
    "gemini, async": ("gemini", _sync(_gemini_async)),
}


# --- the house -----------------------------------------------------------------------------------

WHOLE = {
    b"/chat/completions": b'{"id":"c","object":"chat.completion","choices":[]}',
    b"/messages": b'{"id":"m","type":"message","role":"assistant","content":[]}',
    b":generateContent": b'{"candidates":[]}',
}


async def _misbehave(it: Exchange) -> None:
    """Answer as the model's name says, wherever the dialect puts it."""
    path = it.request.line.split()[1]
    asked = path + it.request.body
    if b"dead-1" in asked:
        it.writer.close()
    elif b"silent-1" in asked:
        await it.wait_until_left()
    elif b"broken-1" in asked or b"halved-1" in asked or b"narrow-1" in asked:
        await _stream(it, path, is_halved=b"halved-1" in asked)
    else:
        (reply,) = [body for end, body in WHOLE.items() if path.endswith(end)]
        await it.reply(reply)


FIRST_EVENTS = {
    b"/chat/completions": (
        b'data: {"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":'
        b'{"content":"a"}}]}\n\n'
    ),
    b"/responses": (
        b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a",'
        b'"item_id":"i","output_index":0,"content_index":0,"sequence_number":1,"logprobs":[]}\n\n'
    ),
    b"/messages": (
        b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","type":"message",'
        b'"role":"assistant","model":"m","content":[],"stop_reason":null,"stop_sequence":null,'
        b'"usage":{"input_tokens":1,"output_tokens":1}}}\n\n'
    ),
    b":streamGenerateContent": (
        b'data: {"candidates":[{"content":{"role":"model","parts":[{"text":"a"}]}}]}\r\n\r\n'
    ),
}


async def _stream(it: Exchange, path: bytes, *, is_halved: bool) -> None:
    (event,) = [each for end, each in FIRST_EVENTS.items() if end in path]
    await it.begin_stream()
    # One write, so that whoever has read the first event has been sent the half one as well.
    await it.chunk(event + event[: len(event) // 2] if is_halved else event)
    await it.wait_until_left()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A small gateway in front of a provider that misbehaves on request."""
    with threaded_provider(_misbehave) as provider:
        root = f"http://127.0.0.1:{provider.port}"
        providers = {
            "openai": {"base_url": f"{root}/v1", "plain_http": True},
            "anthropic": {"base_url": root, "plain_http": True},
            "gemini": {"base_url": root, "plain_http": True},
        }
        folder = tmp_path_factory.mktemp("errors")
        with Gateway(folder / "gateway", providers, policy=POLICY, extra=SMALL) as gateway:
            yield gateway


def _open(gateway: Gateway) -> tuple[str, Callable[[], None]]:
    """Return a session's token, and how to close it."""
    identity = gateway.identity()
    keys = dict.fromkeys(("openai", "anthropic", "gemini"), KEY)
    session = gateway.post("/v1/sessions", {"keys": keys}, identity)

    def close() -> None:
        url = f"http://127.0.0.1:{gateway.sessions}/v1/sessions/{session['session_id']}"
        fields = {"authorization": f"Bearer {identity}"}
        urllib.request.urlopen(
            urllib.request.Request(url, headers=fields, method="DELETE"), timeout=30
        ).close()

    return str(session["token"]), close


def _answer_of(error: Any) -> tuple[int, Mapping[str, str], dict[str, Any]]:
    """Return status, fields and body of what an SDK raised for."""
    if isinstance(error, genai_errors.APIError):
        assert error.response is not None
        return error.code, error.response.headers, error.details["error"]
    return error.status_code, error.response.headers, error.response.json()["error"]


def _code_in(body: dict[str, Any]) -> str:
    """Return the gateway's code, wherever the dialect's error shape keeps it."""
    details = body.get("details")
    if isinstance(details, dict):
        return str(details["error_code"])
    if isinstance(details, list):
        return str(details[0]["reason"]).lower()
    return str(body["code"])


def _check(name: str, caller: Caller, refusal: Refusal) -> None:
    dialect, call = CALLS[name]
    expected = CLASSES[dialect][refusal.status]
    with pytest.raises(expected) as raised:
        call(caller, refusal)
    assert type(raised.value) is expected
    status, fields, body = _answer_of(raised.value)
    assert (status, _code_in(body)) == (refusal.status, refusal.code)
    assert "[" + refusal.code in body["message"]
    if refusal.retried == "after":
        assert int(fields["retry-after"]) >= 1
        assert int(fields["retry-after-ms"]) >= 1
        assert "x-should-retry" not in fields
    elif refusal.retried == "later":
        assert int(fields["retry-after"]) > 60
        assert fields["x-should-retry"] == "false"
    elif refusal.retried == "never":
        assert fields["x-should-retry"] == "false"
        assert "retry-after" not in fields
    else:
        assert "retry-after" not in fields
        assert "x-should-retry" not in fields
    assert fields["x-veklom-call"]


# --- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal", REFUSALS, ids=lambda each: f"{each.status}-{each.code}-{each.model}"
)
@pytest.mark.parametrize("name", CALLS)
def test_every_refusal_raises_the_sdks_own_class(
    house: Gateway, name: str, refusal: Refusal
) -> None:
    """Class, status, code and what the answer says about trying again, for each SDK."""
    token, close = _open(house)
    other_token, close_other = _open(house)
    caller = Caller(house, token, other_token)
    held: Any = None
    if refusal.code == "rate_limit_exceeded":
        CALLS[name][1](caller, refusal)  # the one that is free
    elif refusal.code == "concurrency_limit_exceeded":
        held = _hold_a_stream(house, token)
    try:
        _check(name, caller, refusal)
    finally:
        if held is not None:
            held.close()
        close()
        close_other()


def _hold_a_stream(gateway: Gateway, token: str) -> Any:
    """Return an open stream of the model that may be called once at a time."""
    body = json.dumps({"model": "narrow-1", "messages": [], "stream": True}).encode()
    fields = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    url = gateway.url("openai/v1/chat/completions")
    return urllib.request.urlopen(urllib.request.Request(url, body, fields), timeout=30)


def test_an_unrecorded_call_is_not_to_be_tried_again(tmp_path: Path) -> None:
    """Where the audit log is lost every SDK raises its 503, and is told not to retry."""
    with threaded_provider(_misbehave) as provider:
        root = f"http://127.0.0.1:{provider.port}"
        providers = {
            "openai": {"base_url": f"{root}/v1", "plain_http": True},
            "anthropic": {"base_url": root, "plain_http": True},
            "gemini": {"base_url": root, "plain_http": True},
        }
        with Gateway(tmp_path / "gateway", providers, verifies_log=False) as gateway:
            token, _ = _open(gateway)
            _openai(Caller(gateway, token), Refusal(200, "", model="m"))
            (segment,) = (gateway.folder / "audit").glob("*-worker-0.*/seg/*.jsonl")
            segment.unlink()
            for name in CALLS:
                _check(name, Caller(gateway, token), UNRECORDED)


# --- streams that are cut off ----------------------------------------------------------------------


def _openai_chat(url: str, key: str, model: str) -> Iterator[object]:
    with openai.OpenAI(base_url=f"{url}/openai/v1", api_key=key, max_retries=0) as client:
        yield from client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "x"}], stream=True
        )


def _openai_responses(url: str, key: str, model: str) -> Iterator[object]:
    with openai.OpenAI(base_url=f"{url}/openai/v1", api_key=key, max_retries=0) as client:
        yield from client.responses.create(model=model, input="x", stream=True)


def _anthropic_messages(url: str, key: str, model: str) -> Iterator[object]:
    with anthropic.Anthropic(base_url=f"{url}/anthropic", api_key=key, max_retries=0) as client:
        yield from client.messages.create(
            model=model, max_tokens=5, messages=[{"role": "user", "content": "x"}], stream=True
        )


def _gemini_content(url: str, key: str, model: str) -> Iterator[object]:
    options: Any = {"base_url": f"{url}/gemini", "api_version": "v1beta"}
    client = genai.Client(api_key=key, http_options=options)
    try:
        yield from client.models.generate_content_stream(model=model, contents="x")
    finally:
        client.close()


async def _openai_responses_async(url: str, key: str, model: str) -> AsyncIterator[object]:
    async with openai.AsyncOpenAI(
        base_url=f"{url}/openai/v1", api_key=key, max_retries=0
    ) as client:
        async for event in await client.responses.create(model=model, input="x", stream=True):
            yield event


async def _anthropic_messages_async(url: str, key: str, model: str) -> AsyncIterator[object]:
    async with anthropic.AsyncAnthropic(
        base_url=f"{url}/anthropic", api_key=key, max_retries=0
    ) as client:
        async for event in await client.messages.create(
            model=model, max_tokens=5, messages=[{"role": "user", "content": "x"}], stream=True
        ):
            yield event


async def _gemini_content_async(url: str, key: str, model: str) -> AsyncIterator[object]:
    options: Any = {"base_url": f"{url}/gemini", "api_version": "v1beta"}
    client = genai.Client(api_key=key, http_options=options)
    try:
        async for part in await client.aio.models.generate_content_stream(
            model=model, contents="x"
        ):
            yield part
    finally:
        await client.aio.aclose()
        client.close()


# Of a transfer that breaks off only openai makes an error of its own; the other SDKs hand on what
# their HTTP client raises. Of a chat stream the half event is held here, so it still ends in words.
STREAMS: dict[str, tuple[Any, type[Exception], type[Exception]]] = {
    "openai chat": (_openai_chat, openai.APIError, openai.APIError),
    "openai responses": (_openai_responses, openai.APIError, openai.APIConnectionError),
    "openai responses, async": (
        _openai_responses_async,
        openai.APIError,
        openai.APIConnectionError,
    ),
    "anthropic": (_anthropic_messages, anthropic.APIStatusError, httpx2.TransportError),
    "anthropic, async": (
        _anthropic_messages_async,
        anthropic.APIStatusError,
        httpx2.TransportError,
    ),
    "gemini": (_gemini_content, genai_errors.ServerError, httpx2.TransportError),
    "gemini, async": (_gemini_content_async, genai_errors.ServerError, aiohttp.ClientError),
}


def _cut(gateway: Gateway, stream: Any, model: str) -> list[object]:
    """Read the first event, close the session, and read on; return what came after."""
    token, close = _open(gateway)
    url = f"http://127.0.0.1:{gateway.proxy}"
    made = stream(url, token, model)
    if hasattr(made, "__next__"):
        next(made)
        close()
        return list(made)

    async def read() -> list[object]:
        await anext(made)
        await asyncio.to_thread(close)
        return [event async for event in made]

    return asyncio.run(read())


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_cut_between_events_raises_the_sdks_own_class(house: Gateway, name: str) -> None:
    """Closing the session in the middle of an answer says so, in words that the SDK raises."""
    stream, expected, _ = STREAMS[name]
    with pytest.raises(expected, match="The session was closed"):
        _cut(house, stream, "broken-1")


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_cut_within_an_event_is_a_broken_transfer(house: Gateway, name: str) -> None:
    """Half an event is never completed by words of ours, which no SDK could read."""
    stream, _, expected = STREAMS[name]
    with pytest.raises(expected):
        _cut(house, stream, "halved-1")
