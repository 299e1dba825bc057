"""What the product knows by name, written out a second time: a changed URL is a changed promise."""

import json
from typing import Any

import pytest

from gateway.errors import Refused
from gateway.providers.catalogue import CATALOGUE
from gateway.providers.provider import DIALECTS, Provider
from gateway.providers.routes import RouteTable

KNOWN = {
    ("openai", "openai", "https://api.openai.com/v1"),
    ("anthropic", "anthropic", "https://api.anthropic.com"),
    ("gemini", "gemini", "https://generativelanguage.googleapis.com"),
    ("mistral", "openai", "https://api.mistral.ai/v1"),
    ("groq", "openai", "https://api.groq.com/openai/v1"),
    ("deepseek", "openai", "https://api.deepseek.com/v1"),
    ("xai", "openai", "https://api.x.ai/v1"),
    ("openrouter", "openai", "https://openrouter.ai/api/v1"),
    ("together", "openai", "https://api.together.ai/v1"),
    ("fireworks", "openai", "https://api.fireworks.ai/inference/v1"),
    ("cohere", "openai", "https://api.cohere.com/compatibility/v1"),
    ("ollama", "openai", ""),  # on a host of the operator's
    ("vllm", "openai", ""),
}


def test_the_catalogue_is_what_the_providers_document() -> None:
    """Name, dialect and base URL of every built-in provider stand here as well, letter for letter."""
    found = {(name, entry.dialect, entry.base_url) for name, entry in CATALOGUE.items()}
    assert found == KNOWN


@pytest.mark.parametrize(("name", "dialect", "base_url"), sorted(KNOWN))
def test_every_entry_makes_a_provider(name: str, dialect: str, base_url: str) -> None:
    """A built-in provider is dialled over TLS at the documented host, with its dialect's header."""
    if not base_url:
        base_url = "https://models.internal:8443/v1"
    provider = Provider.from_url(name, dialect, base_url, request_stream_usage=True)
    assert provider.is_tls
    assert provider.origin + provider.base_path.decode() == base_url
    assert provider.auth_header == DIALECTS[dialect].default_auth[0]


def _read(fields: dict[str, Any]) -> None:
    entry = CATALOGUE["openrouter"]
    made = Provider.from_url("openrouter", entry.dialect, entry.base_url, request_stream_usage=True)
    route = RouteTable([made]).find(b"POST", b"/openrouter/v1/chat/completions")
    body = json.dumps({"model": "m", "messages": [], **fields}).encode()
    made.dialect.read_call(route, body, len(body))


@pytest.mark.parametrize(
    "fields",
    [
        {"models": ["m", "other"]},
        {"models": []},
        {"preset": "mine"},
        {"provider": {"order": ["elsewhere"]}},
        {"provider": {"only": ["elsewhere"]}},
        {"provider": {"ignore": ["here"]}},
        {"provider": {"allow_fallbacks": True}},
        {"provider": {"sort": "price"}},
        {"provider": {"quantizations": ["int4"]}},
        {"provider": {"data_collection": "deny", "order": ["elsewhere"]}},
        {"provider": "elsewhere"},
        {"Provider": {"order": ["elsewhere"]}},
        {"MODELS": ["other"]},
    ],
)
def test_a_call_that_a_router_would_move_is_refused(fields: dict[str, Any]) -> None:
    """OpenRouter's fallback lists, presets and choices of a host would leave what was judged."""
    with pytest.raises(Refused) as refused:
        _read(fields)
    assert refused.value.code == "invalid_body"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"provider": None},
        {"provider": {}},
        {"provider": {"data_collection": "deny", "zdr": True, "require_parameters": True}},
    ],
)
def test_a_call_that_only_narrows_a_router_passes(fields: dict[str, Any]) -> None:
    """Asking OpenRouter for hosts that keep nothing is nobody's loss."""
    _read(fields)
