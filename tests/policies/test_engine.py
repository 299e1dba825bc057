"""Deny over require over allow over no; whatever breaks, and in whatever order rules stand."""

import itertools
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.decision import Decision, Verdict
from policies.engine import decide
from policies.request import AccessRequest
from policies.rules import Effect, Rule, load_policy_set
from tests.policies.asking import PROVIDERS, ask, policy_set_of

YES, NO, BROKEN = "{tenant: acme}", "{tenant: beta}", "{client_address: 0.0.0.0/0}"
STATES = {"yes": YES, "no": NO, "broken": BROKEN, "absent": ""}
REQUEST = ask(address="")


def rule(effect: str, match: str, name: str = "") -> str:
    """Return a rule as a line of YAML; of a `require`, `match` is what it requires."""
    key = "that" if effect == "require" else "match"
    return f"  - {{id: {name or effect}, effect: {effect}, {key}: {match}}}\n"


def judge(*rules: str, request: AccessRequest = REQUEST) -> Decision:
    """Return the decision of a set of rules."""
    return decide(policy_set_of("rules:\n" + "".join(rules)), request)


def expected(deny: str, require: str, allow: str) -> tuple[Verdict, tuple[str, ...]]:
    """Return verdict and rules as the documentation has them, for the state of one rule each."""
    if deny in {"yes", "broken"}:
        return Verdict.DENY if deny == "yes" else Verdict.ERROR, ("deny",)
    if require in {"no", "broken"}:
        return Verdict.DENY if require == "no" else Verdict.ERROR, ("require",)
    if allow == "yes":
        return Verdict.ALLOW, ("allow",)
    return Verdict.ERROR if allow == "broken" else Verdict.DENY, ()


@pytest.mark.parametrize(
    ("deny", "require", "allow"),
    list(itertools.product(STATES, repeat=3)),
    ids=lambda state: state,
)
def test_precedence(deny: str, require: str, allow: str) -> None:
    """The truth table of a deny, a require and an allow, each met, unmet, broken or absent."""
    states = {"deny": deny, "require": require, "allow": allow}
    rules = [rule(name, STATES[state]) for name, state in states.items() if state != "absent"]
    for order in itertools.permutations(rules):
        decision = judge(*order)
        assert (decision.verdict, decision.rules) == expected(deny, require, allow)
        assert decision.is_allowed is (decision.verdict is Verdict.ALLOW)
        assert decision.is_allowed or (decision.message and decision.reasons)


PAIRS: dict[str, tuple[list[tuple[str, str]], Verdict, tuple[str, ...]]] = {
    "two-denies": ([("deny", YES), ("deny", YES)], Verdict.DENY, ("r0", "r1")),
    "one-of-two-denies": ([("deny", NO), ("deny", YES)], Verdict.DENY, ("r1",)),
    "deny-and-broken-deny": ([("deny", BROKEN), ("deny", YES)], Verdict.DENY, ("r1",)),
    "two-broken-denies": ([("deny", BROKEN), ("deny", BROKEN)], Verdict.ERROR, ("r0", "r1")),
    "two-requires": ([("require", NO), ("require", NO)], Verdict.DENY, ("r0", "r1")),
    "unmet-and-broken": ([("require", BROKEN), ("require", NO)], Verdict.DENY, ("r1",)),
    "met-and-broken": ([("require", YES), ("require", BROKEN)], Verdict.ERROR, ("r1",)),
    "two-allows": ([("allow", YES), ("allow", YES)], Verdict.ALLOW, ("r0",)),
    "broken-allow-and-allow": ([("allow", BROKEN), ("allow", YES)], Verdict.ALLOW, ("r1",)),
    "broken-allow-and-no": ([("allow", NO), ("allow", BROKEN)], Verdict.ERROR, ()),
}


@pytest.mark.parametrize(("rules", "verdict", "ids"), PAIRS.values(), ids=PAIRS)
def test_rules_of_one_effect_add_up(
    rules: list[tuple[str, str]], verdict: Verdict, ids: tuple[str, ...]
) -> None:
    """Every rule that refuses is named; a broken one settles nothing where a sound one does."""
    lines = [rule("allow", YES, "z")] * all(effect != "allow" for effect, _ in rules)
    lines += [rule(effect, match, f"r{n}") for n, (effect, match) in enumerate(rules)]
    for order in (lines, lines[::-1]):
        decision = judge(*order)
        assert (decision.verdict, decision.rules) == (verdict, ids)


_matches = st.sampled_from(
    [YES, NO, BROKEN, "{roles: engineer}", "{stream: true}", "{model: 'gpt-5*', provider: gemini}"]
)


@given(
    st.lists(st.tuples(st.sampled_from(["allow", "deny", "require"]), _matches), max_size=8),
    st.booleans(),
    st.sampled_from(["", "10.0.0.1"]),
    st.randoms(use_true_random=False),
)
def test_order_never_matters(
    rules: list[tuple[str, str]],
    stream: bool,  # noqa: FBT001 - drawn by hypothesis
    address: str,
    draw: random.Random,
) -> None:
    """Shuffled within files and over files, the same rules give the very same answer."""
    request = ask(address=address, stream=stream)
    lines = [rule(effect, match, f"r{n}") for n, (effect, match) in enumerate(rules)]
    decision = judge(*lines, request=request)
    shuffled = list(lines)
    draw.shuffle(shuffled)
    cut = draw.randrange(len(shuffled) + 1)
    sources = [
        ("a", "rules:\n" + "".join(shuffled[:cut])),
        ("b", "rules:\n" + "".join(shuffled[cut:])),
    ]
    again = decide(load_policy_set(sources, PROVIDERS), request)
    assert (again.verdict, again.rules, again.message, again.reasons) == (
        decision.verdict,
        decision.rules,
        decision.message,
        decision.reasons,
    )


@given(st.lists(st.tuples(st.sampled_from(["deny", "require"]), _matches), max_size=6), _matches)
def test_more_refusing_rules_never_allow_more(rules: list[tuple[str, str]], match: str) -> None:
    """Adding a deny or a require never turns a refusal into a permission."""
    lines = [rule("allow", "{roles: engineer}", "a")]
    lines += [rule(effect, match, f"r{n}") for n, (effect, match) in enumerate(rules)]
    if not judge(*lines).is_allowed:
        assert not judge(*lines, rule("deny", match, "more")).is_allowed
        assert not judge(*lines, rule("require", match, "more")).is_allowed


def test_a_require_concerns_the_calls_it_matches() -> None:
    """A require binds matching calls, all calls where it has no match, and breaks with its match."""
    allow = rule("allow", YES)
    bound = "  - {{id: r, effect: require, match: {0}, that: {{stream: true}}}}\n"
    assert judge(allow, bound.format(NO)).is_allowed
    assert judge(allow, bound.format(YES)).reasons == ("require 'r' is not met at stream",)
    assert judge(allow, bound.format(YES), request=ask(stream=True)).is_allowed
    assert judge(allow, bound.format(BROKEN)).verdict is Verdict.ERROR
    assert judge(allow, rule("require", "{stream: true}")).verdict is Verdict.DENY


REASONS: dict[str, tuple[list[str], dict[str, Any], tuple[str, ...]]] = {
    "no-rules": ([], {}, ("there is no allow rule",)),
    "only-denies": ([rule("deny", NO)], {}, ("there is no allow rule",)),
    "nearest": (
        [
            rule("allow", "{tenant: beta, provider: openai}", "a"),
            rule("allow", "{tenant: acme, provider: openai, model: 'claude-*'}", "b"),
            rule("allow", "{tenant: acme, provider: gemini, model: 'gpt-*'}", "c"),
        ],
        {},
        ("no allow matched; nearest is 'b', which failed at model",),
    ),
    "nearest-tie": (
        [rule("allow", NO, "b"), rule("allow", NO, "a")],
        {},
        ("no allow matched; nearest is 'a', which failed at tenant",),
    ),
    "nearest-nested": (
        [rule("allow", "{tenant: acme, not: {roles: engineer}}", "a")],
        {},
        ("no allow matched; nearest is 'a', which failed at not",),
    ),
    "broken-allow": (
        [rule("allow", BROKEN, "a"), rule("allow", NO, "b")],
        {"address": "?"},
        (
            "allow 'a' failed: ValueError",
            "no allow matched; nearest is 'a', which failed at client_address",
        ),
    ),
    "deny": ([rule("allow", YES), rule("deny", YES, "d")], {}, ("deny 'd' matched",)),
    "denies": (
        [rule("deny", YES, "e"), rule("deny", BROKEN, "d")],
        {"address": "?"},
        ("deny 'd' failed: ValueError", "deny 'e' matched"),
    ),
    "require": (
        [rule("require", "{tenant: acme, max_tokens: {max: 5}}", "r")],
        {},
        ("require 'r' is not met at max_tokens",),
    ),
}


@pytest.mark.parametrize(("rules", "facts", "reasons"), REASONS.values(), ids=REASONS)
def test_a_refusal_says_why(
    rules: list[str], facts: dict[str, Any], reasons: tuple[str, ...]
) -> None:
    """The reasons name what refused, or the nearest allow and the first condition it failed at."""
    text = "rules:\n" + "".join(rules)
    assert decide(policy_set_of(text), ask(**facts)).reasons == reasons


def test_the_caller_is_told_what_the_rule_says() -> None:
    """A refusal carries the first message of the rules that refused, or a plain sentence."""
    with_message = "  - {id: b, effect: deny, match: {tenant: acme}, message: Not here.}\n"
    broken = "  - {id: c, effect: deny, match: {client_address: ::/0}, message: Secret.}\n"
    plain = "The policy does not allow this call."
    assert judge(rule("deny", YES, "a"), with_message).message == "Not here."
    assert judge(rule("deny", YES, "a")).message == plain
    assert judge(broken).message == plain
    assert judge().message == plain
    assert judge(rule("allow", YES)).message == ""


@pytest.mark.parametrize(
    ("match", "allowed"),
    [("{tenant: acme}", True), ("{tenant: acme, model: '*'}", False)],
    ids=["not-read", "read"],
)
def test_a_body_that_hides_its_facts_is_denied(match: str, *, allowed: bool) -> None:
    """An unparsable body passes only where no rule reads bodies, even if facts happen to match."""
    decision = judge(rule("allow", match), request=ask(is_parsed=False))
    assert decision.is_allowed is allowed
    assert decision.rules == (("allow",) if allowed else ())
    assert allowed or decision.verdict is Verdict.DENY


@pytest.mark.parametrize(
    ("effect", "field"),
    [(Effect.ALLOW, "allows"), (Effect.REQUIRE, "requires")],
    ids=["allow", "require"],
)
def test_nothing_passes_for_want_of_conditions(effect: Effect, field: str) -> None:
    """A rule compiled without conditions, which no file can hold, allows and fulfils nothing."""
    hollow = Rule(id="r", effect=effect, match=(), that=(), message="")
    sound = policy_set_of("rules:\n" + (rule("allow", YES) if field == "requires" else "  []"))
    changed: dict[str, Any] = {field: (hollow,)}
    assert not decide(replace(sound, **changed), REQUEST).is_allowed


def test_a_decision_carries_the_digest_of_its_set() -> None:
    """Whatever the verdict, the decision names the policy set that it was made by."""
    sets = [
        policy_set_of("rules:\n" + rule(effect, match))
        for effect in ("allow", "deny", "require")
        for match in (YES, NO, BROKEN, "{model: x}")
    ]
    for policy_set in sets:
        for request in (REQUEST, ask(), ask(is_parsed=False)):
            assert decide(policy_set, request).policy_digest == policy_set.digest
