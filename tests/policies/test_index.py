"""An index finds every rule that applies, whatever rules and calls there are."""

from hypothesis import given
from hypothesis import strategies as st

from policies.engine import holds
from policies.index import RuleIndex
from policies.rules import load_policy_set
from tests.policies.asking import PROVIDERS, ask

_some = st.sampled_from
_matches = st.fixed_dictionaries(
    {},
    optional={
        "tenant": _some(["acme", "beta", "[acme, beta]", "'a*'"]),
        "model": _some(["gpt-5", "GPT-5", "[gpt-5, o3]", "'gpt-*'", "'*'"]),
        "provider": _some(["openai", "gemini", "[openai, gemini]"]),
        "operation": _some(["chat", "batches", "[chat, batches]"]),
        "roles": _some(["engineer", "admin"]),
        "not": _some(["{tenant: acme}", "{model: gpt-5}"]),
        "any": _some(["[{tenant: acme}, {provider: openai}]"]),
    },
).filter(bool)


@given(
    st.lists(_matches, max_size=12),
    _some(["acme", "beta", "x"]),
    _some(["gpt-5", "GPT-5", "o3", ""]),
    _some(["openai", "gemini", "anthropic"]),
    _some(["chat", "batches", "files"]),
)
def test_no_rule_that_applies_is_missed(
    matches: list[dict[str, str]], tenant: str, model: str, provider: str, operation: str
) -> None:
    """The candidates, in order of their ids, hold every rule whose conditions hold."""
    text = "rules:\n" + "".join(
        f"  - {{id: r{number:02}, effect: deny, match: {{"
        + ", ".join(f"{key}: {value}" for key, value in match.items())
        + "}}\n"
        for number, match in enumerate(matches)
    )
    rules = load_policy_set([("p", text if matches else "rules: []")], PROVIDERS).rules
    request = ask(tenant=tenant, model=model, provider=provider, operation=operation)
    found = [rule.id for rule in RuleIndex(rules).candidates(request)]
    assert found == sorted(found)
    assert {rule.id for rule in rules if holds(rule.match, request)} <= set(found)


def test_rules_that_cannot_apply_are_not_looked_at() -> None:
    """Of a thousand rules for other tenants and models, a call meets its own few."""
    text = "rules:\n" + "".join(
        f"  - {{id: t{n}, effect: allow, match: {{tenant: t{n}, roles: x}}}}\n"
        f"  - {{id: m{n}, effect: allow, match: {{model: m{n}, roles: x}}}}\n"
        for n in range(500)
    )
    rules = load_policy_set([("p", text)], PROVIDERS).rules
    found = RuleIndex(rules).candidates(ask(tenant="t7", model="M8"))
    assert [rule.id for rule in found] == ["m8", "t7"]
