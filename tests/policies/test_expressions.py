"""CEL over the facts: the same answers as `match:`, and never an error taken for an answer."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import expressions
from policies.document import DocumentError
from policies.engine import decide
from policies.expressions import EvaluationError, ExpressionError, compile_expression
from policies.request import AccessRequest
from policies.rules import load_policy_set
from tests.policies.asking import PROVIDERS, ask, policy_set_of
from tests.policies.test_facts import requests

TWINS: list[tuple[str, str]] = [
    ("{tenant: [a, acme]}", 'tenant in ["a", "acme"]'),
    ("{roles: engineer}", '"engineer" in roles'),
    ("{roles: {only: [a, b]}}", 'roles.all(r, r in ["a", "b"])'),
    ("{max_tokens: {max: 4096}}", "max_tokens <= 4096"),
    ("{max_tokens: {min: 5}}", "max_tokens >= 5"),
    ("{body_bytes: {max: 1MiB}}", "body_bytes <= 1048576"),
    ("{stream: true}", "stream"),
    ("{provider.baa: false}", "!provider.baa"),
    ('{provider.region: "e*"}', 'provider.region.startsWith("e")'),
    ("{auth_age: {max: 15m}}", "auth_age <= 900"),
    ("{operation: chat}", 'operation == "chat"'),
    ("{not: {labels: phi}}", '!("phi" in labels)'),
    ("{any: [{stream: true}, {store: true}], provider: openai}",
     '(stream || store) && provider == "openai"'),
    ('{time: {zone: Europe/Paris, from: "08:00", to: "18:00"}}',
     'now.getHours("Europe/Paris") >= 8 && now.getHours("Europe/Paris") < 18'),
]  # fmt: skip


COMPILED = [
    (
        policy_set_of(f"rules: [{{id: a, effect: deny, match: {match}}}]"),
        policy_set_of(f"rules:\n  - id: a\n    effect: deny\n    when: >-\n      {expression}"),
    )
    for match, expression in TWINS
]
near = st.builds(
    ask,
    tenant=st.sampled_from(["acme", "beta", ""]),
    roles=st.sets(st.sampled_from(["engineer", "a", "b"])).map(tuple),
    max_tokens=st.integers(-1, 5000),
    body_bytes=st.integers(-1, 2**21),
    stream=st.booleans(),
    store=st.booleans(),
    labels=st.sampled_from([frozenset(), frozenset({"phi"})]),
    authenticated_at=st.integers(1_799_998_000, 1_800_000_000),
    now=st.integers(1_800_000_000, 1_800_200_000).map(float),
)


@given(near | requests.filter(lambda asked: asked.now < 2**37))
def test_an_expression_and_its_twin_agree(asked: AccessRequest) -> None:
    """The structured and the CEL form of one condition answer every question alike."""
    for structured, in_cel in COMPILED:
        assert decide(structured, asked).rules == decide(in_cel, asked).rules


def test_when_and_match_both_have_to_hold() -> None:
    """A rule with both applies where both hold."""
    policy = policy_set_of(
        "rules: [{id: a, effect: allow, match: {tenant: acme}, when: 'max_tokens < 500'}]"
    )
    assert not decide(policy, ask()).is_allowed
    assert decide(policy, ask(max_tokens=499)).is_allowed
    assert not decide(policy, ask(max_tokens=499, tenant="x")).is_allowed
    assert decide(policy, ask()).reasons == (
        "no allow matched; nearest is 'a', which failed at when",
    )


@pytest.mark.parametrize("expression", ["5 / (max_tokens - 1000) > 0", 'tenant.matches("(")'])
def test_an_error_is_no_answer(expression: str) -> None:
    """What cannot be evaluated raises: a deny then denies, an allow does not match, both as ERROR."""
    holds, _ = compile_expression(expression, PROVIDERS)
    with pytest.raises(EvaluationError):
        holds(ask())
    for effect in ("deny", "allow"):
        policy = policy_set_of(f"rules:\n  - id: a\n    effect: {effect}\n    when: '{expression}'")
        assert decide(policy, ask()).verdict == "error"


def test_an_expression_reads_the_facts_it_names() -> None:
    """Names in quotes are no facts, and a body fact in an expression makes the set read bodies."""
    _, reads = compile_expression('provider.region == "model" && tenant != "x"', PROVIDERS)
    assert reads == {"provider.region", "tenant"}
    assert policy_set_of(
        "rules: [{id: a, effect: deny, when: 'model == \"x\"'}]"
    ).enforced.reads_body


def test_work_is_bounded() -> None:
    """Loops in loops end in an error, not in a gateway that stands still."""
    numbers = ",".join(map(str, range(200)))
    loops = f"[{numbers}].exists(a, [{numbers}].exists(b, [{numbers}].exists(c, a + b + c < 0)))"
    holds, _ = compile_expression(loops, PROVIDERS)
    with pytest.raises(EvaluationError):
        holds(ask())
    with pytest.raises(ExpressionError, match="longer"):
        compile_expression("true || " * 600 + "true", PROVIDERS)


def test_without_the_extra_a_policy_that_needs_it_does_not_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An expression that could not be evaluated is never ignored."""
    monkeypatch.setattr(expressions, "cel", None)
    with pytest.raises(DocumentError, match=r"veklom-gateway\[cel\]"):
        load_policy_set([("p", "rules: [{id: a, effect: deny, when: stream}]")], PROVIDERS)
    fine: Any = load_policy_set(
        [("p", "rules: [{id: a, effect: deny, match: {stream: true}}]")], PROVIDERS
    )
    assert fine.rules
