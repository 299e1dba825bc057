"""Questions and policy sets that the tests of this folder put together."""

from typing import Any

from policies.request import AccessRequest, ModelCall, Operation, Principal
from policies.rules import PolicySet, load_policy_set

PROVIDERS = frozenset({"openai", "anthropic", "gemini"})


def ask(
    *, roles: tuple[str, ...] = ("engineer",), address: str = "10.1.2.3", **facts: Any
) -> AccessRequest:
    """Return a question about an ordinary call, but for the facts given."""
    who = {"issuer": "https://idp.test", "subject": "alice", "tenant": "acme"}
    session = facts.pop("session_id", "s1")
    principal = {name: facts.pop(name, value) for name, value in who.items()}
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
        client_address=address,
        session_id=session,
    )


def policy_set_of(text: str) -> PolicySet:
    """Return what one file compiles to."""
    return load_policy_set([("p.yaml", text)], PROVIDERS)
