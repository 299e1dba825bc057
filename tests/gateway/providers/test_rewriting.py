"""Obligations in each dialect: the body that goes upstream, byte for byte."""

from typing import Any

import msgspec
import pytest

from gateway.errors import Refused
from gateway.providers.provider import Provider
from gateway.providers.rewriting import rewrite
from gateway.providers.routes import RouteTable
from policies.engine import decide
from policies.known import Known
from policies.request import AccessRequest, Principal, ProviderFacts
from policies.rules import load_policy_set

NAMES = {"openai": "openai", "mine": "openai", "anthropic": "anthropic", "gemini": "gemini"}
HOSTS = {"openai": "api.openai.com", "mine": "models.example.com"}
ROUTES = RouteTable(
    Provider.from_url(
        name, dialect, f"https://{HOSTS.get(name, 'x.example')}", request_stream_usage=True
    )
    for name, dialect in NAMES.items()
)
KNOWN = Known.of({name: ProviderFacts(dialect=dialect) for name, dialect in NAMES.items()})
CHAT, MINE = b"/openai/v1/chat/completions", b"/mine/v1/chat/completions"
RESPONSES, MESSAGES = b"/openai/v1/responses", b"/anthropic/v1/messages"
GENERATE = b"/gemini/v1beta/models/gemini-3:generateContent"


def obliged(target: bytes, body: bytes, change: str) -> bytes:
    """Return what is sent of a call that one transform changes."""
    text = (
        'rules: [{id: a, effect: allow, match: {tenant: "*"}}, '
        f'{{id: t, effect: transform, match: {{tenant: "*"}}, change: {change}}}]'
    )
    route = ROUTES.find(b"POST", target)
    asked = route.provider.dialect.read_call(route, body, len(body))
    request = AccessRequest(
        principal=Principal(issuer="i", subject="s", tenant="t"),
        call=asked,
        provider=route.provider.facts,
    )
    decision = decide(load_policy_set([("p", text)], KNOWN), request)
    if decision.obligations is None:
        raise Refused("policy_denied", decision.message)
    chosen = decision.obligations
    route = ROUTES.changed(route, b"POST", target, provider=chosen.provider, model=chosen.model)
    if not chosen.touch_body:
        return body
    return rewrite(route, body, chosen, decision.judged.call)


CASES: dict[str, tuple[bytes, bytes, str, bytes]] = {
    "cap": (CHAT, b'{"model":"m", "max_tokens": 9000}', "{max_tokens: {max: 4096}}",
            b'{"model":"m", "max_tokens": 4096}'),
    "cap-below": (CHAT, b'{"model":"m", "max_tokens": 90}', "{max_tokens: {max: 4096}}",
                  b'{"model":"m", "max_tokens": 90}'),
    "cap-both": (CHAT, b'{"max_tokens":9,"model":"m","max_completion_tokens":7}', "{max_tokens: {max: 8}}",
                 b'{"max_tokens":8,"model":"m","max_completion_tokens":7}'),
    "cap-absent": (CHAT, b'{"model":"m"}', "{max_tokens: {max: 8}}", b'{"max_completion_tokens":8,"model":"m"}'),
    "cap-null": (CHAT, b'{"max_tokens":null}', "{max_tokens: {max: 8}}",
                 b'{"max_completion_tokens":8,"max_tokens":null}'),
    "default": (CHAT, b'{"model":"m"}', "{max_tokens: {max: 8, default: 2}}",
                b'{"max_completion_tokens":2,"model":"m"}'),
    "default-only": (CHAT, b'{"max_tokens":9}', "{max_tokens: {default: 2}}", b'{"max_tokens":9}'),
    "cap-elsewhere": (MINE, b'{"model":"m"}', "{max_tokens: {max: 8}}", b'{"max_tokens":8,"model":"m"}'),
    "cap-responses": (RESPONSES, b'{"input":"x","store":false}', "{max_tokens: {max: 8}}",
                      b'{"max_output_tokens":8,"input":"x","store":false}'),
    "cap-messages": (MESSAGES, b'{"max_tokens" : 20}', "{max_tokens: {max: 8}}", b'{"max_tokens" : 8}'),
    "cap-gemini": (GENERATE, b'{"generation_config":{"max_output_tokens": 20, "topP":1}}', "{max_tokens: {max: 8}}",
                   b'{"generation_config":{"max_output_tokens": 8, "topP":1}}'),
    "cap-gemini-absent": (GENERATE, b'{"contents":[]}', "{max_tokens: {max: 8}}",
                          b'{"generationConfig":{"maxOutputTokens":8},"contents":[]}'),
    "set": (RESPONSES, b'{"store":true,"input":"x"}', "{set: {store: false}}", b'{"store":false,"input":"x"}'),
    "set-new": (RESPONSES, b'{"input":"x"}', "{set: {store: false, user: u}}",
                b'{"store":false,"user":"u","input":"x"}'),
    "strip": (CHAT, b'{"model":"m", "logprobs":true, "n":2 }', "{strip: [logprobs, n, absent]}",
              b'{"model":"m" }'),
    "model": (CHAT, b'{"model" : "m"}', "{model: m-mini}", b'{"model" : "m-mini"}'),
    "model-gemini": (GENERATE, b'{"contents":[],"model":"models/gemini-3"}', "{model: gemini-3-lite}",
                     b'{"contents":[],"model":"models/gemini-3-lite"}'),
    "tools": (CHAT,
              b'{"tools":[ {"type":"function","function":{"name":"a"}}, {"type":"web_search"} ],"n":1}',
              "{tools: {only: [a]}}", b'{"tools":[ {"type":"function","function":{"name":"a"}} ],"n":1}'),
    "tools-all-gone": (CHAT,
                       b'{"n":1,"tools":[{"type":"web_search"}],"tool_choice":"auto","parallel_tool_calls":true}',
                       "{tools: {none: web_search}}", b'{"n":1}'),
    "tools-choice": (CHAT,
                     b'{"tools":[{"type":"function","function":{"name":"a"}},{"type":"web_search"}],'
                     b'"tool_choice":{"type":"web_search"}}',
                     "{tools: {none: web_search}}", b'{"tools":[{"type":"function","function":{"name":"a"}}]}'),
    "tools-options": (CHAT, b'{"n":1,"web_search_options":{}}', "{tools: {only: []}}", b'{"n":1}'),
    "functions": (CHAT, b'{"functions":[{"name":"a"},{"name":"b"}]}', "{tools: {only: [b]}}",
                  b'{"functions":[{"name":"b"}]}'),
    "mcp": (RESPONSES, b'{"input":"x","tools":[{"type":"mcp","server_label":"git"}],"store":false}',
            '{tools: {none: ["mcp:*"]}}', b'{"input":"x","store":false}'),
    "mcp-messages": (MESSAGES,
                     b'{"max_tokens":1,"mcp_servers":[{"name":"git"},{"name":"wiki"}],"tools":['
                     b'{"type":"mcp_toolset","mcp_server_name":"git"},{"name":"run"}]}',
                     '{tools: {none: ["mcp:git"]}}',
                     b'{"max_tokens":1,"mcp_servers":[{"name":"wiki"}],"tools":[{"name":"run"}]}'),
    "tools-gemini": (GENERATE,
                     b'{"tools":[{"functionDeclarations":[{"name":"a"},{"name":"b"}],"googleSearch":{}},'
                     b'{"codeExecution":{}}],"contents":[]}',
                     "{tools: {only: [b]}}",
                     b'{"tools":[{"functionDeclarations":[{"name":"b"}]}],"contents":[]}'),
    "tools-gemini-gone": (GENERATE, b'{"tools":[{"google_search":{}}],"toolConfig":{},"contents":[]}',
                          "{tools: {only: [b]}}", b'{"contents":[]}'),
    "system": (CHAT, b'{"messages": [{"role":"user"}]}', "{system: Be kind.}",
               b'{"messages": [{"role":"system","content":"Be kind."},{"role":"user"}]}'),
    "system-responses": (RESPONSES, b'{"instructions":"Be \\u00e9.","store":false}', "{system: Be kind.}",
                         '{"instructions":"Be kind.\\n\\nBe é.","store":false}'.encode()),
    "system-messages": (MESSAGES, b'{"system":"Be short."}', "{system: Be kind.}",
                        b'{"system":"Be kind.\\n\\nBe short."}'),
    "system-messages-absent": (MESSAGES, b'{"messages":[]}', "{system: Be kind.}",
                               b'{"system":"Be kind.","messages":[]}'),
    "system-messages-list": (MESSAGES, b'{"system":[{"type":"text","text":"x"}]}', "{system: Be kind.}",
                             b'{"system":[{"type":"text","text":"Be kind."},{"type":"text","text":"x"}]}'),
    "system-gemini": (GENERATE, b'{"system_instruction":{"parts":[{"text":"x"}]}}', "{system: Be kind.}",
                      b'{"system_instruction":{"parts":[{"text":"Be kind."},{"text":"x"}]}}'),
    "system-gemini-absent": (GENERATE, b'{"contents":[]}', "{system: Be kind.}",
                             b'{"systemInstruction":{"parts":[{"text":"Be kind."}]},"contents":[]}'),
    "headers": (CHAT, b'{"model":"m"}', "{headers: {remove: [openai-beta]}}", b'{"model":"m"}'),
    "embeddings-have-no-cap": (b"/openai/v1/embeddings", b'{"input":"x"}', "{max_tokens: {max: 8}}",
                               b'{"input":"x"}'),
    "stored-chat-has-no-cap": (CHAT + b"/chatcmpl-1", b'{"metadata":{}}', "{max_tokens: {max: 8}, system: x}",
                               b'{"metadata":{}}'),
    "provider": (CHAT, b'{"model":"m"}', "{provider: mine, max_tokens: {max: 8}}", b'{"max_tokens":8,"model":"m"}'),
}  # fmt: skip


@pytest.mark.parametrize(("target", "body", "change", "sent"), CASES.values(), ids=CASES)
def test_what_a_rule_obliges_to_is_sent(
    target: bytes, body: bytes, change: str, sent: bytes
) -> None:
    """The change is where the dialect has its place, and every other byte is the caller's."""
    assert obliged(target, body, change) == sent
    msgspec.json.decode(sent)


IMPOSSIBLE: dict[str, tuple[bytes, bytes, str]] = {
    "no-messages": (CHAT, b'{"model":"m"}', "{system: x}"),
    "odd-system": (MESSAGES, b'{"system":5}', "{system: x}"),
    "odd-instruction": (GENERATE, b'{"systemInstruction":{"parts":5}}', "{system: x}"),
    "stored-prompt": (RESPONSES, b'{"prompt":{"id":"p"},"store":false}', "{tools: {only: [a]}}"),
    "cached-content": (GENERATE, b'{"cachedContent":"c"}', "{tools: {only: [a]}}"),
    "batch": (b"/anthropic/v1/messages/batches", b'{"requests":[{"params":{"model":"m"}}]}', "{model: n}"),
    "inner-model": (
        b"/gemini/v1beta/models/gemini-3:batchEmbedContents",
        b'{"requests":[{"model":"models/gemini-3"}]}', "{model: gemini-2}",
    ),
    "other-dialect": (MESSAGES, b'{"model":"m"}', "{provider: mine}"),
}  # fmt: skip


@pytest.mark.parametrize(("target", "body", "change"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_cannot_be_changed_does_not_pass(target: bytes, body: bytes, change: str) -> None:
    """A call that has no place for a change, or would not be the call that was judged, is refused."""
    with pytest.raises(Refused) as refused:
        obliged(target, body, change)
    assert refused.value.code in {"policy_denied", "invalid_body"}


def test_a_model_in_the_path_is_renamed_there() -> None:
    """Gemini's model stands in the path: there it is another, and its verb and query stay."""
    target = GENERATE + b"?alt=sse"
    route = ROUTES.find(b"POST", target)
    renamed: Any = ROUTES.changed(route, b"POST", target, provider="", model="gemini-3 lite")
    assert renamed.upstream_target == b"/v1beta/models/gemini-3%20lite:generateContent?alt=sse"
    assert renamed.model == "gemini-3 lite"
