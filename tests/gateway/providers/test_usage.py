"""Usage is read from every shape of answer, however it was cut, and nothing else is touched."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.providers.catalogue import CATALOGUE
from gateway.providers.dialect import Usage
from gateway.providers.provider import Provider
from gateway.providers.routes import RouteTable
from gateway.providers.stream_usage import MAX_HELD_BYTES, UsageEventFilter, request_usage
from policies.request import ModelCall, Operation

CASES: dict[str, tuple[bytes, bytes, Usage]] = {}


def _case(name: str, target: str, body: str | bytes, **counts: Any) -> None:
    usage = Usage(source="provider" if len(counts) > 1 else "none", **counts)
    CASES[name] = (target.encode(), body.encode() if isinstance(body, str) else body, usage)


def _events(*payloads: object, named: bool = False, end: str = "\n") -> str:
    text = ""
    for payload in payloads:
        if isinstance(payload, str):
            text += f"data: {payload}{end}{end}"
            continue
        if named and isinstance(payload, dict):
            text += f"event: {payload['type']}{end}"
        text += f"data: {json.dumps(payload)}{end}{end}"
    return text


_CHAT_USAGE = {
    "prompt_tokens": 30, "completion_tokens": 12, "total_tokens": 42,
    "prompt_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 5},
    "completion_tokens_details": {"reasoning_tokens": 7},
}  # fmt: skip
_CHAT = {"model": "gpt-x-2026", "input": 30, "output": 12, "cache_read": 20, "cache_write": 5}
_CHOICE = {"index": 0, "delta": {"content": 'a "usage" of {words}: ünïcode 😀'}}
_case(
    "chat", "/openai/v1/chat/completions",
    json.dumps({
        "id": "c", "model": "gpt-x-2026", "choices": [{"message": {"content": '"usage": {"x": 1}'}}],
        "usage": _CHAT_USAGE, "service_tier": "default",
    }),
    **_CHAT, reasoning=7,
)  # fmt: skip
_case(
    "chat, streamed", "/openai/v1/chat/completions",
    _events(
        {"model": "gpt-x-2026", "choices": [_CHOICE], "usage": None},
        {"model": "gpt-x-2026", "choices": [_CHOICE], "usage": None},
        {"model": "gpt-x-2026", "choices": [], "usage": _CHAT_USAGE},
        "[DONE]",
    ),
    **_CHAT, reasoning=7,
)  # fmt: skip
_case(
    "chat, streamed, cut off before its usage", "/openai/v1/chat/completions",
    _events({"model": "gpt-x-2026", "choices": [_CHOICE], "usage": None}), model="gpt-x-2026",
)  # fmt: skip
_RESPONSE = {
    "id": "r", "model": "gpt-x-2026", "output": [],
    "usage": {
        "input_tokens": 30, "input_tokens_details": {"cached_tokens": 20, "cache_write_tokens": 5},
        "output_tokens": 12, "output_tokens_details": {"reasoning_tokens": 7}, "total_tokens": 42,
    },
}  # fmt: skip
_case(
    "responses", "/openai/v1/responses", json.dumps({**_RESPONSE, "user": None}), **_CHAT, reasoning=7
)  # fmt: skip
_case(
    "responses, streamed", "/openai/v1/responses",
    _events(
        {"type": "response.created", "response": {"model": "gpt-x-2026", "usage": None}},
        {"type": "response.output_text.delta", "delta": '"usage":'},
        {"type": "response.completed", "response": _RESPONSE},
        named=True,
    ),
    **_CHAT, reasoning=7,
)  # fmt: skip
_case(
    "embeddings", "/openai/v1/embeddings",
    json.dumps({
        "object": "list", "data": [{"embedding": [0.25] * 5000}], "model": "emb-1",
        "usage": {"prompt_tokens": 8, "total_tokens": 8},
    }),
    model="", input=8,
)  # fmt: skip
_STARTED = {
    "type": "message_start",
    "message": {
        "model": "claude-x-1",
        "usage": {
            "input_tokens": 3, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 20,
            "cache_creation": {"ephemeral_5m_input_tokens": 5}, "output_tokens": 1,
        },
    },
}  # fmt: skip
_CLAUDE = {"model": "claude-x-1", "input": 28, "cache_read": 20, "cache_write": 5}
_case(
    "messages", "/anthropic/v1/messages",
    json.dumps({
        "model": "claude-x-1", "content": [{"type": "text", "text": "x" * 100}],
        "usage": {
            "input_tokens": 3, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 20,
            "output_tokens": 12,
        },
    }),
    **_CLAUDE, output=12,
)  # fmt: skip
_case(
    "messages, streamed", "/anthropic/v1/messages",
    _events(
        _STARTED,
        {"type": "ping"},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": '"usage":{}'}},
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 4}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 12}},
        {"type": "message_stop"},
        named=True,
    ),
    **_CLAUDE, output=12,
)  # fmt: skip
_case(
    "messages, streamed, all repeated at the end", "/anthropic/v1/messages",
    _events(
        _STARTED,
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "x" * 90_000}},
        {
            "type": "message_delta", "delta": {},
            "usage": {
                "input_tokens": 103, "cache_creation_input_tokens": 5,
                "cache_read_input_tokens": 20, "output_tokens": 12,
                "server_tool_use": {"web_search_requests": 1},
            },
        },
        {"type": "message_stop"},
        named=True,
    ),
    **{**_CLAUDE, "input": 128}, output=12,
)  # fmt: skip
_case(
    "messages, streamed, cut off", "/anthropic/v1/messages",
    _events(_STARTED, {"type": "ping"}, named=True), **_CLAUDE, output=1,
)  # fmt: skip
_GEMINI_USAGE = {
    "promptTokenCount": 30, "cachedContentTokenCount": 20, "candidatesTokenCount": 5,
    "thoughtsTokenCount": 7, "toolUsePromptTokenCount": 2, "totalTokenCount": 44,
}  # fmt: skip
_GEMINI = {"model": "", "input": 32, "output": 12, "cache_read": 20, "reasoning": 7}
_PART = {"content": {"parts": [{"text": 'says "usageMetadata": {"x'}]}}
_case(
    "generateContent", "/gemini/v1beta/models/g:generateContent",
    json.dumps(
        {"candidates": [_PART], "usageMetadata": _GEMINI_USAGE, "modelVersion": "g-002"}, indent=2
    ),
    **{**_GEMINI, "model": "g-002"},
)  # fmt: skip
_GEMINI_CHUNKS = [
    {"candidates": [_PART], "usageMetadata": {"promptTokenCount": 30}, "modelVersion": "g-002"},
    {"candidates": [_PART], "usageMetadata": _GEMINI_USAGE, "modelVersion": "g-002"},
]
_case(
    "streamGenerateContent, as events", "/gemini/v1beta/models/g:streamGenerateContent?alt=sse",
    _events(*_GEMINI_CHUNKS, end="\r\n"), **{**_GEMINI, "model": "g-002"},
)  # fmt: skip
_case(
    "streamGenerateContent, as one array", "/gemini/v1beta/models/g:streamGenerateContent",
    json.dumps(_GEMINI_CHUNKS, indent=1), **{**_GEMINI, "model": "g-002"},
)  # fmt: skip
_case("an answer without usage", "/openai/v1/images/generations", '{"data":[]}', model="")
_case("no JSON at all", "/openai/v1/audio/speech", b'\xff\x00"usage":{"model":\x80' * 50, model="")

ROUTES = RouteTable(
    Provider.from_url(
        name, CATALOGUE[name].dialect, CATALOGUE[name].base_url, request_stream_usage=True
    )
    for name in ("openai", "anthropic", "gemini")
)


def _pieces(body: bytes, cuts: list[float]) -> list[bytes]:
    places = sorted({int(cut * len(body)) for cut in cuts} | {0, len(body)})
    return [body[a:b] for a, b in pairwise(places)]


_cuts = st.lists(st.floats(0, 1), max_size=40)


@pytest.mark.parametrize("name", CASES)
@given(cuts=_cuts)
def test_usage_is_read_under_any_chunking(name: str, cuts: list[float]) -> None:
    """What a provider counted is found in every shape of its answers, wherever the wire cut them."""
    target, body, expected = CASES[name]
    route = ROUTES.find(b"POST", target)
    asked = ModelCall(provider=route.provider.name, operation=route.operation)
    reader = route.provider.dialect.usage_reader(route, asked, b"")
    for piece in _pieces(body, cuts):
        reader.feed(piece)
    assert reader.usage() == expected


@pytest.mark.parametrize("name", [name for name in CASES if len(CASES[name][1]) < 2000])
def test_usage_is_read_byte_by_byte(name: str) -> None:
    """The finest chunking of all gives the same."""
    target, body, expected = CASES[name]
    route = ROUTES.find(b"POST", target)
    asked = ModelCall(provider=route.provider.name, operation=route.operation)
    reader = route.provider.dialect.usage_reader(route, asked, b"")
    for position in range(len(body)):
        reader.feed(body[position : position + 1])
    assert reader.usage() == expected


# --- the extra usage event ------------------------------------------------------------------------

_line_end = st.sampled_from(["\n", "\r\n", "\r"])
_text = st.text(max_size=30)
_kept_event = st.one_of(
    st.builds(
        lambda text: json.dumps({"choices": [{"delta": {"content": text}}], "usage": None}), _text
    ),
    st.builds(
        lambda text: json.dumps(
            {"choices": [{"delta": {"content": text}}], "usage": {"prompt_tokens": 1}}
        ),
        _text,
    ),
    st.just('{"choices":[],"prompt_filter_results":[],"usage":null}'),
    st.just('{"error":{"message":"usage"}}'),
    st.just("[DONE]"),
)
_usage_event = st.builds(
    lambda n: json.dumps({"id": "c", "choices": [], "usage": {"prompt_tokens": n}}),
    st.integers(0, 10**9),
)


@given(
    before=st.lists(_kept_event, max_size=6),
    extra=_usage_event,
    after=st.lists(_kept_event, max_size=2),
    comment=st.sampled_from(["", ": keep-alive"]),
    end=_line_end,
    cuts=_cuts,
)
def test_the_usage_event_is_taken_out_and_nothing_else(
    before: list[str], extra: str, after: list[str], comment: str, end: str, cuts: list[float]
) -> None:
    """Every other byte passes, in order, under any chunking and any spelling of line ends."""

    def written(payloads: list[str]) -> bytes:
        return "".join(f"data: {each}{end}{end}" for each in payloads).encode()

    keep_alive = f"{comment}{end}{end}".encode() if comment else b""
    stream = written(before) + keep_alive + written([extra]) + keep_alive + written(after)
    passing = UsageEventFilter()
    passed = b"".join(passing.feed(piece) for piece in _pieces(stream, cuts)) + passing.end()
    assert passed == written(before) + keep_alive + keep_alive + written(after)


@given(data=st.binary(max_size=2000), cuts=_cuts)
def test_what_is_no_event_stream_passes_as_it_is(data: bytes, cuts: list[float]) -> None:
    """Bytes that only claim to be events come out as they went in."""
    passing = UsageEventFilter()
    assert b"".join(passing.feed(piece) for piece in _pieces(data, cuts)) + passing.end() == data


def test_an_endless_event_is_not_held() -> None:
    """An event beyond the limit is passed on: it is no usage event, and memory has an end."""
    passing = UsageEventFilter()
    big = b"data: " + b"x" * (MAX_HELD_BYTES + 1)
    passed = passing.feed(big)
    assert len(big) - len(passed) < 8
    assert passed + passing.feed(b"more") + passing.end() == big + b"more"


def test_usage_is_not_asked_for_where_the_caller_decided() -> None:
    """A caller that says itself whether it wants usage keeps what it said."""
    body = b'{"model":"m","stream":true,"stream_options":{"include_usage":false}}'
    assert request_usage(ROUTES.find(b"POST", b"/openai/v1/chat/completions"), body) is None


@pytest.mark.parametrize("body", [b'{"model":"m","stream":true}', b'  {\n "stream" : true }'])
def test_usage_is_asked_for_where_the_caller_left_it_open(body: bytes) -> None:
    """The question is put behind the opening brace; not one other byte of the body changes."""
    changed = request_usage(ROUTES.find(b"POST", b"/openai/v1/chat/completions"), body)
    assert changed is not None
    question = b'"stream_options":{"include_usage":true},'
    assert changed.replace(question, b"", 1) == body
    assert json.loads(changed)["stream_options"] == {"include_usage": True}
    responses = ROUTES.find(b"POST", b"/openai/v1/responses")
    assert responses.operation is Operation.RESPONSES
    assert request_usage(responses, body) is None
