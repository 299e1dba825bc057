"""Advice about rules that can do nothing, and silence about rules that can."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.analysis import covers_all, findings
from policies.conditions import Condition, read_conditions
from policies.document import Section, read_document
from policies.engine import holds
from policies.known import Known
from policies.request import ProviderFacts
from policies.rules import load_policy_set
from tests.policies.asking import PROVIDERS, ask

ADVICE: dict[str, tuple[list[str], list[str]]] = {
    "unreachable": (
        ["{id: a, effect: allow, match: {tenant: acme, model: gpt-5}}",
         "{id: d, effect: deny, match: {tenant: [acme, beta]}}"],
        ["allow 'a' can never allow: deny 'd' refuses all that it matches"],
    ),
    "unreachable-all": (
        ["{id: a, effect: allow, match: {model: gpt-5}}", "{id: d, effect: deny, match: {tenant: '*'}}"],
        ["allow 'a' can never allow: deny 'd' refuses all that it matches"],
    ),
    "reachable": (
        ["{id: a, effect: allow, match: {tenant: acme}}",
         "{id: d, effect: deny, match: {tenant: acme, model: gpt-5}}"],
        [],
    ),
    "redundant": (
        ["{id: a, effect: allow, match: {model: 'gpt-*'}}",
         "{id: b, effect: allow, match: {model: gpt-5, roles: x}}"],
        ["allow 'b' adds nothing: allow 'a' matches all that it matches"],
    ),
    "twice": (
        ["{id: a, effect: deny, match: {stream: true}}", "{id: b, effect: deny, match: {stream: true}}"],
        ["deny 'b' adds nothing: deny 'a' matches all that it matches"],
    ),
    "phi-is-its-own": (
        ["{id: a, effect: allow, match: {tenant: '*'}}",
         "{id: p, effect: allow, match: {tenant: clinic, labels: phi, purpose: care}}"],
        [],
    ),
    "shadows-are-left-out": (
        ["{id: a, effect: allow, match: {model: gpt-5}}",
         "{id: d, effect: deny, match: {tenant: '*'}, mode: shadow}"],
        [],
    ),
    "overruled": (
        ["{id: t, effect: transform, match: {tenant: acme}, change: {model: m, set: {n: 1}}}",
         "{id: u, effect: transform, match: {stream: true}, change: {model: o, set: {n: 1}}}"],
        ["transform 'u' is overruled for model where transform 't' applies too; "
         "let their matches exclude each other"],
    ),
    "exclusive": (
        ["{id: t, effect: transform, match: {tenant: acme}, change: {model: m}}",
         "{id: u, effect: transform, match: {tenant: beta}, change: {model: o}}"],
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "said"), ADVICE.values(), ids=ADVICE)
def test_advice(rules: list[str], said: list[str]) -> None:
    """Each kind of mistake is named, with the rule that is in the way."""
    text = "rules:\n" + "".join(f"  - {rule}\n" for rule in rules)
    found = findings(load_policy_set([("p.yaml", text)], PROVIDERS))
    assert [f"{each.rule.effect} {each.rule.id!r} {each.message}" for each in found] == said
    assert all(
        str(each).startswith(f"p.yaml:{each.rule.place.line}:5: warning: ") for each in found
    )


def test_what_no_provider_is() -> None:
    """A rule that asks of providers what none is said to be is named, once something is configured."""
    text = "rules: [{id: r, effect: require, that: {provider.baa: true}}]"
    (advice,) = findings(load_policy_set([("p", text)], PROVIDERS))
    assert "which no configured provider is" in advice.message
    assert findings(load_policy_set([("p", text)], PROVIDERS), is_configured=False) == []
    some = Known.of({"x": ProviderFacts(baa=True)})
    assert findings(load_policy_set([("p", text)], some)) == []


_some = st.sampled_from
_matches = st.fixed_dictionaries(
    {},
    optional={
        "tenant": _some(["acme", "[acme, beta]", "'*'", "'a*'"]),
        "roles": _some(["engineer", "[engineer, admin]", "{only: [engineer]}", "{any: [admin]}"]),
        "max_tokens": _some(["{max: 5}", "{max: 50}", "{min: 5}", "{min: 5, max: 50}"]),
        "stream": _some(["true", "false"]),
        "client_address": _some(["10.0.0.0/8", "10.1.0.0/16", "'::/0'"]),
        "not": _some(["{stream: true}", "{tenant: acme}"]),
    },
).filter(bool)


def _conditions(match: dict[str, str]) -> object:
    text = "match: {" + ", ".join(f"{key}: {value}" for key, value in match.items()) + "}"
    return read_conditions(Section(read_document(text, "p"), "p", []).section("match"), PROVIDERS)


COVERS: list[tuple[str, str, bool]] = [
    ("{max_tokens: {max: 50}}", "{max_tokens: {max: 5}}", True),
    ("{max_tokens: {max: 5}}", "{max_tokens: {max: 50}}", False),
    ("{max_tokens: {min: 5}}", "{max_tokens: {min: 50}}", True),
    ("{max_tokens: {min: 5}}", "{max_tokens: {max: 50}}", False),
    ("{max_tokens: {max: 50}}", "{body_bytes: {max: 5}}", False),
    ("{client_address: 10.0.0.0/8}", "{client_address: [10.1.0.0/16, 10.2.3.4]}", True),
    ("{client_address: 10.1.0.0/16}", "{client_address: 10.0.0.0/8}", False),
    ("{client_address: '::/0'}", "{client_address: 10.0.0.0/8}", False),
    ("{model: 'gpt-*'}", "{model: [gpt-5, gpt-6]}", True),
    ("{model: 'gpt-*'}", "{model: ['gpt-?', o3]}", False),
    ("{roles: [a, b]}", "{roles: a}", True),
    ("{roles: {only: [a, b]}}", "{roles: a}", False),
    ("{stream: true}", "{stream: false}", False),
    ("{tenant: '*'}", "{stream: false}", True),
    ("{purpose: '*'}", "{stream: false}", False),
]


@pytest.mark.parametrize(("wide", "narrow", "expected"), COVERS)
def test_what_covers(wide: str, narrow: str, *, expected: bool) -> None:
    """Ranges, networks, patterns and sets are compared by what they hold."""

    def conditions(match: str) -> list[Condition]:
        document = read_document(f"match: {match}", "p")
        return read_conditions(Section(document, "p", []).section("match"), PROVIDERS)

    assert covers_all(conditions(wide), conditions(narrow)) is expected


@given(
    _matches,
    _matches,
    _some(["acme", "beta", "aa"]),
    st.sets(_some(["engineer", "admin", "x"])).map(tuple),
    _some([-1, 0, 5, 50, 51]),
    st.booleans(),
    st.ip_addresses(network=ipaddress.ip_network("10.0.0.0/14")),
)
def test_what_covers_holds_wherever_the_other_does(
    wide: dict[str, str],
    narrow: dict[str, str],
    tenant: str,
    roles: tuple[str, ...],
    tokens: int,
    stream: bool,  # noqa: FBT001 - drawn by hypothesis
    address: ipaddress.IPv4Address,
) -> None:
    """Whatever is called covered: no call is matched by the narrow rule alone."""
    first, second = _conditions(wide), _conditions(narrow)
    asked = ask(tenant=tenant, roles=roles, max_tokens=tokens, stream=stream, address=str(address))
    if covers_all(first, second) and holds(second, asked):  # type: ignore[arg-type]
        assert holds(first, asked)  # type: ignore[arg-type]
