"""The facts of a call, as each dialect reads them: what a rule is asked about is what is done."""

import json
from typing import Any

import pytest

from gateway.errors import Refused
from gateway.providers.provider import Provider
from gateway.providers.routes import Route, RouteTable
from gateway.providers.stream_usage import request_usage
from policies.request import ModelCall

ROUTES = RouteTable(
    Provider.from_url(name, name, "https://api.example.com", request_stream_usage=True)
    for name in ("openai", "anthropic", "gemini")
)
CHAT = b"/openai/v1/chat/completions"
RESPONSES = b"/openai/v1/responses"
BATCHES = b"/anthropic/v1/messages/batches"
MESSAGES = b"/anthropic/v1/messages"
COUNT = b"/gemini/v1beta/models/gemini-3:countTokens"
EMBED = b"/gemini/v1beta/models/gemini-3:batchEmbedContents"
GENERATE = b"/gemini/v1beta/models/gemini-3:generateContent"


def route(target: bytes) -> Route:
    """Return the route of a POST."""
    return ROUTES.find(b"POST", target)


def read(target: bytes, body: object) -> ModelCall:
    """Return the facts of a call with this body."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = route(target)
    return found.provider.dialect.read_call(found, raw, len(raw))


def batch(*params: dict[str, Any]) -> dict[str, Any]:
    """Return a batch of requests."""
    return {"requests": [{"custom_id": str(n), "params": each} for n, each in enumerate(params)]}


FUNCTION = {"name": "run", "description": "d", "parameters": {}}
TOOLS: list[tuple[bytes, dict[str, Any], tuple[str, ...]]] = [
    (CHAT, {"tools": [{"type": "function", "function": FUNCTION}]}, ("run",)),
    (CHAT, {"functions": [FUNCTION], "function_call": "auto"}, ("run",)),
    (CHAT, {"tools": [{"type": "custom", "custom": {"name": "run"}}]}, ("run",)),
    (
        CHAT,
        {
            "functions": [{"name": "b"}],
            "tools": [{"type": "function", "function": {"name": "a"}}],
        },
        ("a", "b"),
    ),
    (RESPONSES, {"tools": [{"type": "function", "name": "run"}]}, ("run",)),
    (RESPONSES, {"tools": [{"type": "web_search"}]}, ("web_search",)),
    (
        RESPONSES,
        {"tools": [{"type": "function", "name": "a", "function": {"name": "b"}}]},
        ("a", "b"),
    ),
    (RESPONSES, {"tools": [{"type": "web_search", "name": "a"}]}, ("a", "web_search")),
    (MESSAGES, {"tools": [{"name": "run", "input_schema": {}}]}, ("run",)),
    (GENERATE, {"tools": [{"functionDeclarations": [{"name": "run"}]}]}, ("run",)),
    (GENERATE, {"tools": [{"function_declarations": [{"name": "run"}]}]}, ("run",)),
    (GENERATE, {"tools": [{"googleSearch": {}}, {"url_context": {}}]}, ("googleSearch", "urlContext")),
    (CHAT, {"tools": None, "functions": None}, ()),
    (CHAT, {"web_search_options": {}}, ("web_search",)),
    (CHAT, {"web_search_options": None}, ()),
    (RESPONSES, {"tools": [{"type": "mcp", "server_label": "git"}]}, ("mcp:git",)),
    (RESPONSES, {"prompt": {"id": "pmpt_1"}}, ("prompt",)),
    (MESSAGES, {"mcp_servers": [{"type": "url", "name": "git"}]}, ("mcp:git",)),
    (MESSAGES, {"tools": [{"type": "mcp_toolset", "mcp_server_name": "git"}]}, ("mcp:git",)),
    (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, ("web_search",)),
    (MESSAGES, {"tools": [{"type": "code_execution_20250825"}]}, ("code_execution_20250825",)),
    (GENERATE, {"cachedContent": "cachedContents/1"}, ("cachedContent",)),
    (GENERATE, {"cached_content": "cachedContents/1"}, ("cachedContent",)),
    (COUNT, {"generateContentRequest": {"tools": [{"googleSearch": {}}]}}, ("googleSearch",)),
]  # fmt: skip


@pytest.mark.parametrize(("target", "body", "tools"), TOOLS)
def test_tools(target: bytes, body: dict[str, Any], tools: tuple[str, ...]) -> None:
    """Every tool that a call may use is counted, in whatever form its dialect gives."""
    assert (
        read(target, body if target.startswith(b"/gemini") else {"model": "m", **body}).tools
        == tools
    )


SERVER_TOOLS: list[tuple[bytes, dict[str, Any], tuple[str, ...]]] = [
    (RESPONSES, {"tools": [{"type": "function", "name": "run"}, {"type": "local_shell"}]}, ()),
    (
        RESPONSES,
        {"tools": [{"type": "web_search"}, {"type": "mcp", "server_label": "g"}]},
        ("web_search", "mcp:g"),
    ),
    (MESSAGES, {"tools": [{"name": "run"}, {"type": "bash_20250124", "name": "bash"}]}, ()),
    (
        MESSAGES,
        {"tools": [{"type": "web_fetch_1", "name": "web_fetch"}], "mcp_servers": [{"name": "g"}]},
        ("web_fetch", "mcp:g"),
    ),
    (
        GENERATE,
        {"tools": [{"functionDeclarations": [{"name": "run"}], "codeExecution": {}}]},
        ("codeExecution",),
    ),
]


@pytest.mark.parametrize(("target", "body", "tools"), SERVER_TOOLS)
def test_tools_that_the_provider_runs(
    target: bytes, body: dict[str, Any], tools: tuple[str, ...]
) -> None:
    """What runs at the provider, out of the caller's sight, is told apart from what the caller runs."""
    assert read(target, body).server_tools == tools


KEPT: list[tuple[bytes, dict[str, Any], bool]] = [
    (RESPONSES, {}, True),
    (RESPONSES, {"store": None}, True),
    (RESPONSES, {"store": False}, False),
    (CHAT, {}, False),
    (CHAT, {"store": True}, True),
    (MESSAGES, {}, False),
]


@pytest.mark.parametrize(("target", "body", "kept"), KEPT)
def test_what_the_provider_keeps(target: bytes, body: dict[str, Any], *, kept: bool) -> None:
    """Whether an answer is kept is what the API does with what the body says, or does not say."""
    assert read(target, body).store is kept


GENERATES: list[tuple[bytes, bool]] = [
    (CHAT, True), (RESPONSES, True), (MESSAGES, True), (GENERATE, True), (COUNT, False),
    (b"/openai/v1/chat/completions/chatcmpl-1", False), (b"/openai/v1/responses/compact", False),
    (b"/anthropic/v1/messages/count_tokens", False),
]  # fmt: skip


@pytest.mark.parametrize(("target", "generates"), GENERATES)
def test_what_a_model_answers(target: bytes, *, generates: bool) -> None:
    """Only calls that a model writes an answer to are such calls."""
    assert read(target, {}).generates is generates


LIMITS: list[tuple[bytes, dict[str, Any], int]] = [
    (CHAT, {"max_tokens": 5, "max_completion_tokens": 9}, 9),
    (MESSAGES, {"max_tokens": 5}, 5),
    (GENERATE, {"generationConfig": {"maxOutputTokens": 5}}, 5),
    (GENERATE, {"generation_config": {"max_output_tokens": 5}}, 5),
    (GENERATE, {"generationConfig": None}, -1),
]


@pytest.mark.parametrize(("target", "body", "limit"), LIMITS)
def test_token_caps(target: bytes, body: dict[str, Any], limit: int) -> None:
    """The largest cap that a body gives is the one that is judged."""
    assert read(target, body).max_tokens == limit


REFUSED: list[tuple[bytes, bytes]] = [
    (CHAT, b'{"model":"a","model":"b"}'),
    (CHAT, b'{"model":"a", "\\u006dodel":"b"}'),
    (CHAT, b'{"model":"a","temperature":1,"temperature":2}'),
    (CHAT, b'{"model":"a","tool\xc5\xbf":[]}'),
    (CHAT, b'{"model":"a","models":["b"]}'),
    (CHAT, b'{"model":"a","tools":[{"function":{"name":"a","name":"b"}}]}'),
    (CHAT, b'{"model":"a","tools":[{"function":{"name":"a","Name":"b"}}]}'),
    (CHAT, b'{"model":"a","tools":[{"function":{"name":"a"},"Function":{"name":"b"}}]}'),
    (CHAT, b'{"model":"a","functions":[{"name":"a","name":"b"}]}'),
    (CHAT, b'{"model":"a","tools":[{"function":"x"}]}'),
    (CHAT, b'{"model":"a","tools":[1]}'),
    (CHAT, b'{"model":"a","tools":{}}'),
    (CHAT, b'{"model":["a"]}'),
    (GENERATE, b'{"generationConfig":{"maxOutputTokens":1,"maxOutputTokens":2}}'),
    (GENERATE, b'{"generationConfig":{"maxOutputTokens":1,"max_output_tokens":2}}'),
    (GENERATE, b'{"generationConfig":{},"generation_config":{}}'),
    (GENERATE, b'{"generationConfig":{"maxOutputToken\xc5\xbf":2}}'),
    (GENERATE, b'{"generationConfig":{"maxOutputTokens":true}}'),
    (GENERATE, b'{"tools":[{"functionDeclarations":[{"name":"a","name":"b"}]}]}'),
    (GENERATE, b'{"tools":[{"functionDeclarations":[],"function_declarations":[]}]}'),
    (CHAT, b'{"model":" gpt-5"}'),
    (CHAT, b'{"model":"gpt-5\\u0000"}'),
    (CHAT, b'{"model":"a","Store":true}'),
    (MESSAGES, b'{"model":"a","mcp_servers":[{"name":"a","name":"b"}]}'),
    (GENERATE, b'{"model":"models/gemini-2"}'),
    (GENERATE, b'{"cachedContent":"a","cached_content":"b"}'),
    (COUNT, b'{"generateContentRequest":{"model":"models/gemini-2"}}'),
    (EMBED, b'{"requests":[{"model":"models/gemini-3"},{"model":"models/gemini-2"}]}'),
    (BATCHES, b'{"requests":[{"params":{"model":"a","model":"b"}}]}'),
    (BATCHES, b'{"requests":[{"params":{"model":"a"},"params":{"model":"b"}}]}'),
    (BATCHES, b'{"requests":[{"params":{"model":"a"},"Params":{"model":"b"}}]}'),
    (BATCHES, b'{"requests":[{"params":{"model":"a"}},{"params":{"model":"b"}}]}'),
    (BATCHES, b'{"requests":[{"params":{"model":"a"}},{"params":{}}]}'),
    (BATCHES, b'{"requests":[{"custom_id":"1"}]}'),
    (BATCHES, b'{"requests":[]}'),
    (BATCHES, b'{"model":"a"}'),
]


@pytest.mark.parametrize(("target", "body"), REFUSED)
def test_what_can_be_read_in_two_ways_is_refused(target: bytes, body: bytes) -> None:
    """On every level that rules read from, a doubt is a refusal of the body."""
    with pytest.raises(Refused) as refused:
        read(target, body)
    assert refused.value.code == "invalid_body"


def test_a_batch_is_judged_by_all_its_requests() -> None:
    """One model, the largest token cap and every tool: no request hides behind another."""
    tools = [{"name": "a"}, {"name": "b"}]
    asked = read(
        BATCHES,
        batch(
            {"model": "m", "max_tokens": 5, "tools": tools[:1]},
            {"model": "m", "max_tokens": 50, "tools": tools},
            {"model": "m", "max_tokens": 7},
        ),
    )
    assert (asked.model, asked.max_tokens, asked.tools) == ("m", 50, ("a", "b"))


def test_a_batch_of_several_models_says_what_to_do() -> None:
    """The refusal of a mixed batch names the way out."""
    with pytest.raises(Refused, match="one batch for each"):
        read(BATCHES, batch({"model": "a"}, {"model": "b"}))


ASKED = [
    (b'{"stream":true}', b'{"stream_options":{"include_usage":true},"stream":true}'),
    (
        b'{"stream_options":{"include_obfuscation":false},"stream":true}',
        b'{"stream_options":{"include_usage":true,"include_obfuscation":false},"stream":true}',
    ),
    (
        b'{"stream": true, "stream_options" : { } }',
        b'{"stream": true, "stream_options" : {"include_usage":true } }',
    ),
    (b'{"stream_options":{"":1}}', b'{"stream_options":{"include_usage":true,"":1}}'),
    (b'{"a":1,"stream_options": null}', b'{"a":1,"stream_options": {"include_usage":true}}'),
    (b'{"stream_options":{"include_usage":true}}', None),
    (b'{"stream_options":{"include_usage":false}}', None),
    (b'{"stream_options":[]}', None),
    (b'{"stream_options":1}', None),
]


@pytest.mark.parametrize(("body", "sent"), ASKED)
def test_usage_is_asked_for_where_the_caller_left_it_open(body: bytes, sent: bytes | None) -> None:
    """The question is put in beside what the caller set; what it said of usage itself stays."""
    assert request_usage(route(CHAT), body) == sent
    assert request_usage(route(RESPONSES), body) is None
