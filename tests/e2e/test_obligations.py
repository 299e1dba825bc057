"""Obligations as providers and SDKs see them: the body that arrives, and the SDK that is none the wiser."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anthropic
import openai
import pytest
from google import genai

from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import exchange, parse, request

POLICY = """\
rules:
  - {id: everybody, effect: allow, match: {tenant: "*"}}
  - id: short-answers
    effect: transform
    match: {roles: capped, generates: true}
    change: {max_tokens: {max: 64}, tools: {only: [look]}, system: "Be brief."}
  - id: nothing-kept
    effect: transform
    match: {roles: capped, operation: responses}
    change: {set: {store: false}, headers: {set: {openai-project: p1}}}
  - id: elsewhere
    effect: transform
    match: {model: far}
    change: {provider: other}
"""
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look", "delete")
]
ANSWERS = {
    b"/chat/completions": b'{"id":"c","object":"chat.completion","created":1,"model":"m","choices":'
    b'[{"index":0,"finish_reason":"stop","message":{"role":"assistant","content":"hi"}}]}',
    b"/responses": b'{"id":"r","object":"response","created_at":1,"model":"m","output":[],'
    b'"parallel_tool_calls":true,"tool_choice":"auto","tools":[]}',
    b"/messages": b'{"id":"m","type":"message","role":"assistant","model":"m","stop_reason":"end_turn",'
    b'"content":[{"type":"text","text":"hi"}],"usage":{"input_tokens":1,"output_tokens":1}}',
    b":generateContent": b'{"candidates":[{"content":{"role":"model","parts":[{"text":"hi"}]}}]}',
}


async def answer(it: Exchange) -> None:
    """Answer each SDK as its provider would."""
    target = it.request.line.split(b" ")[1]
    await it.reply(next(body for path, body in ANSWERS.items() if path in target))


@pytest.fixture
def gateway(provider: Provider, start_gateway: Callable[..., Gateway]) -> Gateway:
    """A gateway with obligations in front of the double."""
    provider.script = answer
    root = f"http://127.0.0.1:{provider.port}"
    openai_like = {"base_url": f"{root}/v1", "plain_http": True}
    return start_gateway(
        {
            "openai": openai_like,
            "other": {**openai_like, "base_url": f"{root}/other/v1", "dialect": "openai"},
            "anthropic": {"base_url": root, "plain_http": True},
            "gemini": {"base_url": root, "plain_http": True},
        },
        policy=POLICY,
    )


def token(gateway: Gateway, *roles: str) -> str:
    """Return the token of a session with a key for every provider."""
    keys = dict.fromkeys(("openai", "other", "anthropic", "gemini"), KEY)
    return str(gateway.open_session(keys, roles=list(roles))["token"])


def call_openai(gateway: Gateway, session: str) -> None:
    """Chat and Responses through the official SDK."""
    with openai.OpenAI(
        base_url=gateway.url("openai") + "/v1", api_key=session, max_retries=0
    ) as client:
        chat = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], max_tokens=500, tools=TOOLS
        )
        assert chat.choices[0].message.content == "hi"
        client.responses.create(model="m", input="x", store=True)


def call_anthropic(gateway: Gateway, session: str) -> None:
    """Messages through the official SDK."""
    tools: Any = [{"name": name, "input_schema": {"type": "object"}} for name in ("look", "delete")]
    with anthropic.Anthropic(
        base_url=gateway.url("anthropic"), api_key=session, max_retries=0
    ) as client:
        message = client.messages.create(
            model="m", max_tokens=500, messages=[{"role": "user", "content": "x"}], tools=tools,
            system="Speak Danish.",
        )  # fmt: skip
        assert message.content[0].text == "hi"  # type: ignore[union-attr]


def call_gemini(gateway: Gateway, session: str) -> None:
    """GenerateContent through the official SDK."""
    options: Any = {"base_url": gateway.url("gemini"), "api_version": "v1beta"}
    client = genai.Client(api_key=session, http_options=options)
    config: Any = {"max_output_tokens": 500, "tools": [{"google_search": {}}]}
    assert client.models.generate_content(model="g", contents="x", config=config).text == "hi"
    client.close()


async def test_sdks_see_obligations_as_intended(gateway: Gateway, provider: Provider) -> None:
    """Tokens are capped, tools taken out, a text put before: the provider sees it, the SDK nothing."""
    session = await asyncio.to_thread(token, gateway, "capped")
    for call in (call_openai, call_anthropic, call_gemini):
        await asyncio.to_thread(call, gateway, session)
    chat, responses, messages, generate = [json.loads(each.body) for each in provider.received]
    assert chat["max_tokens"] == 64
    assert [tool["function"]["name"] for tool in chat["tools"]] == ["look"]
    assert chat["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (responses["store"], responses["max_output_tokens"]) == (False, 64)
    assert responses["instructions"] == "Be brief."
    assert provider.received[1].values(b"openai-project") == [b"p1"]
    assert (messages["max_tokens"], messages["system"]) == (64, "Be brief.\n\nSpeak Danish.")
    assert [tool["name"] for tool in messages["tools"]] == ["look"]
    assert generate["generationConfig"]["maxOutputTokens"] == 64
    assert "tools" not in generate
    started = gateway.events("call.start")
    assert "short-answers: max_tokens = 64, asked 500" in started[0]["changes"]
    assert "short-answers: tools taken out: delete" in started[0]["changes"]
    assert started[0]["facts"]["tools"] == ["look", "delete"]


async def test_bodies_without_obligations_stay_as_they_are(
    gateway: Gateway, provider: Provider
) -> None:
    """Where no transform applies, not a byte of the body is another."""
    session = await asyncio.to_thread(token, gateway)
    bodies = [
        b'{ "model" : "m",\t"messages":[ ], "max_tokens": 1e3, "x":"\\u00e9" }'.replace(
            b"1e3", b"1000"
        ),
        '{"messages":[{"role":"user","content":"é"}],"model":"m"}'.encode(),
        b'{"model":"m","messages":[],"temperature":1.50}\n',
    ]
    for body in bodies:
        assert parse(await exchange(gateway.proxy, request(session, body))).status == 200
    assert [each.body for each in provider.received] == bodies
    assert [event["changes"] for event in gateway.events("call.start")] == [[]] * 3


async def test_a_call_is_sent_elsewhere_with_the_key_for_there(
    gateway: Gateway, provider: Provider
) -> None:
    """A routed call reaches the other base URL; the record has where it went and was meant to go."""
    session = await asyncio.to_thread(token, gateway)
    body = b'{"model":"far","messages":[]}'
    assert parse(await exchange(gateway.proxy, request(session, body))).status == 200
    (seen,) = provider.received
    assert seen.line.startswith(b"POST /other/v1/chat/completions ")
    assert seen.body == body
    (start,) = gateway.events("call.start")
    assert (start["provider"], start["facts"]["provider"]) == ("other", "openai")
