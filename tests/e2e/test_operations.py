"""What operators read after real traffic: metrics with closed labels, log lines with known keys."""

import asyncio
import json
import urllib.parse
from collections.abc import Callable

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.hardening import Protection
from gateway.problems import STATUS
from gateway.telemetry.logs import ALLOWED
from policies.request import Operation
from tests.conftest import KEY
from tests.simulators.gateway import Gateway
from tests.simulators.provider import Exchange, Provider
from tests.simulators.wire import exchange, parse, request

MARK = "hostile-7f3a"
HOSTILE = [
    MARK,
    f'{MARK}"}} 1\nveklom_fake{{a="b"}} 1',
    f"{MARK}\\n# HELP x",
    f"{MARK}/../{MARK}",
    f"{MARK} 😀 {{}}",
    f"forbidden-{MARK}",
    MARK * 20,
]
POLICY = """\
rules:
  - {id: acme, effect: allow, match: {tenant: acme}}
  - {id: no-forbidden, effect: deny, match: {model: "forbidden*"}}
limits:
  - {name: minute, key: [session], requests: {rate: 600/min}}
  - {name: at-once, key: [session], concurrent: {max: 50}}
"""
OUTCOMES = {
    "complete", "client_abort", "upstream_abort", "upstream_error", "gateway_error", "timeout",
    "session_closed", "shutdown", "audit_unavailable",
}  # fmt: skip


@pytest.fixture
def start(
    provider: Provider, start_gateway: Callable[..., Gateway]
) -> Callable[[], tuple[Gateway, str]]:
    """Start a gateway with limits in front of the double, and open a session."""
    root = f"http://127.0.0.1:{provider.port}"
    providers = {
        "openai": {"base_url": f"{root}/v1", "plain_http": True},
        "gemini": {"base_url": root, "plain_http": True},
    }

    def begin() -> tuple[Gateway, str]:
        gateway = start_gateway(providers, policy=POLICY)
        session = gateway.open_session(dict.fromkeys(providers, KEY))
        return gateway, str(session["token"])

    return begin


async def _hostile_traffic(gateway: Gateway, token: str) -> set[int]:
    calls = []
    for name in HOSTILE:
        quoted = urllib.parse.quote(name, safe="").encode()
        body = json.dumps({"model": name, "messages": [], "tools": [{"name": name}]}).encode()
        calls += [
            request(token, body),
            request(token, b"{}", path=b"/gemini/v1beta/models/%b:generateContent" % quoted),
            request(token, b"{}", path=b"/%b/v1/chat/completions" % quoted),
            request(token, b"{}", path=b"/openai/v1/%b" % quoted),
            request(token, b"", path=b"/openai/v1/models/%b" % quoted, method=b"GET"),
            request(token, body, headers=b"x-stainless-%b: %b\r\n" % (MARK.encode(), quoted)),
            request(token[:-3] + MARK, body),
        ]
    calls.append(request(token, b"{}", method=MARK.upper().encode()))
    return {parse(await exchange(gateway.proxy, call)).status for call in calls}


async def test_no_label_comes_from_a_caller_or_a_provider(
    provider: Provider, start: Callable[[], tuple[Gateway, str]]
) -> None:
    """Whatever models, paths, methods and answers say, labels hold our own words and no others."""

    async def answer(it: Exchange) -> None:
        named = {"model": MARK, "usage": {MARK: 1, "prompt_tokens": 3}, "service_tier": MARK}
        status = b"599 " + MARK.encode() if b"HELP" in it.request.body else b"200 OK"
        await it.reply(json.dumps(named).encode(), status=status)

    provider.script = answer
    gateway, token = await asyncio.to_thread(start)
    statuses = await _hostile_traffic(gateway, token)
    assert statuses >= {200, 400, 401, 403, 404, 599}
    page = await asyncio.to_thread(gateway.metrics)
    assert MARK not in page.lower()
    seen: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        assert family.name.startswith(("veklom_", "gen_ai_"))
        for sample in family.samples:
            for label, value in sample.labels.items():
                seen.setdefault(label, set()).add(value)
    assert seen["gen_ai_provider_name"] == {"openai", "gemini"}
    assert seen["gen_ai_operation_name"] <= set(Operation)
    assert seen["outcome"] <= OUTCOMES
    assert seen["status_class"] <= {"0xx", "2xx", "3xx", "4xx", "5xx"}
    assert seen["code"] <= set(STATUS)
    assert seen["process"] <= {"supervisor", "control", "worker-0"}
    assert seen["role"] <= {"control", "worker", "worker-0"}
    assert seen["protection"] <= set(Protection)
    assert all(float(bound) > 0 for bound in seen["le"])
    assert set(seen) == {
        "gen_ai_provider_name", "gen_ai_operation_name", "outcome", "status_class", "code",
        "process", "protection", "role", "le",
    }  # fmt: skip


async def test_log_lines_of_a_run_lose_nothing(
    start: Callable[[], tuple[Gateway, str]],
) -> None:
    """Every key that the product logs is an allowed one, and no line quotes a call or a credential."""
    gateway, token = await asyncio.to_thread(start)
    await _hostile_traffic(gateway, token)
    await asyncio.to_thread(gateway.stop)
    text = gateway.log.read_text()
    assert MARK not in text
    assert KEY not in text
    assert token not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert {"gateway.started", "gateway.stopping"} <= {line["event"] for line in lines}
    for line in lines:
        assert "dropped" not in line
        assert set(line) <= ALLOWED


async def test_limits_are_told_with_every_answer(
    provider: Provider, start: Callable[[], tuple[Gateway, str]]
) -> None:
    """A call that passes says what is left: `RateLimit` and `RateLimit-Policy`, as an SDK reads them."""

    async def answer(it: Exchange) -> None:
        await it.reply(b'{"id":"c","object":"chat.completion","choices":[]}')

    provider.script = answer
    gateway, token = await asyncio.to_thread(start)

    def call() -> list[tuple[str, str]]:
        url = gateway.url("openai/v1")
        told = []
        with openai.OpenAI(base_url=url, api_key=token, max_retries=0) as client:
            for _ in range(2):
                raw = client.chat.completions.with_raw_response.create(model="m", messages=[])
                told.append((raw.headers["ratelimit-policy"], raw.headers["ratelimit"]))
        return told

    first, second = await asyncio.to_thread(call)
    policy = '"minute";q=600;w=60, "at-once";q=50;qu="concurrent-requests"'
    assert first[0] == second[0] == policy
    assert first[1].startswith('"minute";r=599;t=')
    assert second[1].startswith('"minute";r=598;t=')
    assert second[1].endswith('"at-once";r=49')
