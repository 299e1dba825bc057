"""Questions and policy sets that the tests of this folder put together."""

from typing import Any

from policies.known import Known
from policies.request import AccessRequest, ModelCall, Operation, Principal, ProviderFacts
from policies.rules import PolicySet, load_policy_set

PROVIDERS = Known.of(
    {name: ProviderFacts(dialect=name) for name in ("openai", "anthropic", "gemini")}
)


NOW = 1_800_000_000.0
"""Friday, 15 January 2027, 08:00 in UTC, 09:00 in Paris."""


def ask(
    *, roles: tuple[str, ...] = ("engineer",), address: str = "10.1.2.3", **facts: Any
) -> AccessRequest:
    """Return a question about an ordinary call, but for the facts given."""
    who = {
        "issuer": "https://idp.test", "subject": "alice", "tenant": "acme", "client_id": "",
        "scopes": frozenset(), "acr": "", "amr": frozenset(), "authenticated_at": 0,
    }  # fmt: skip
    principal: dict[str, Any] = {name: facts.pop(name, value) for name, value in who.items()}
    about = {
        "session_id": "s1", "user_agent": "", "labels": frozenset(), "purpose": "", "now": NOW,
    }  # fmt: skip
    circumstances: dict[str, Any] = {name: facts.pop(name, value) for name, value in about.items()}
    vouched: dict[str, Any] = facts.pop("vouched", {})
    call: dict[str, Any] = {
        "provider": "openai",
        "operation": Operation.CHAT,
        "model": "gpt-5-mini",
        "max_tokens": 1000,
        "body_bytes": 2048,
    }
    return AccessRequest(
        principal=Principal(roles=frozenset(roles), **principal),
        call=ModelCall(**(call | facts)),
        provider=ProviderFacts(**{"dialect": "openai", **vouched}),
        client_address=address,
        **circumstances,
    )


def policy_set_of(text: str) -> PolicySet:
    """Return what one file compiles to."""
    return load_policy_set([("p.yaml", text)], PROVIDERS)
