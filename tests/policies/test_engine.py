"""Deny over require over allow over no; whatever breaks, and in whatever order rules stand."""

import itertools
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.decision import Decision, Verdict
from policies.engine import decide
from policies.request import AccessRequest
from policies.rules import Effect, PolicySet, Rule, load_policy_set
from tests.policies.asking import PROVIDERS, ask, policy_set_of

YES, NO, BROKEN = "{tenant: acme}", "{tenant: beta}", "{client_address: 0.0.0.0/0}"
STATES = {"yes": YES, "no": NO, "broken": BROKEN, "absent": ""}
REQUEST = ask(address="")


def rule(effect: str, match: str, name: str = "", *, more: str = "") -> str:
    """Return a rule as a line of YAML; of a `require`, `match` is what it requires."""
    key = "that" if effect == "require" else "match"
    if effect == "transform":
        more += ", change: {system: Be kind.}"
    return f"  - {{id: {name or effect}, effect: {effect}, {key}: {match}{more}}}\n"


def judge(*rules: str, request: AccessRequest = REQUEST) -> Decision:
    """Return the decision of a set of rules."""
    return decide(policy_set_of("rules:\n" + "".join(rules)), request)


def expected(
    transform: str, deny: str, require: str, allow: str
) -> tuple[Verdict, tuple[str, ...]]:
    """Return verdict and rules as the documentation has them, for the state of one rule each."""
    if deny == "yes" or (require == "no" and deny != "broken"):
        return Verdict.DENY, ("deny",) if deny == "yes" else ("require",)
    if transform == "broken":
        return Verdict.ERROR, ("transform",)
    if deny == "broken" or require == "broken":
        return Verdict.ERROR, ("deny",) if deny == "broken" else ("require",)
    if allow == "yes":
        return Verdict.ALLOW, ("allow",)
    return Verdict.ERROR if allow == "broken" else Verdict.DENY, ()


@pytest.mark.parametrize(
    ("transform", "deny", "require", "allow"),
    list(itertools.product(STATES, repeat=4)),
    ids=lambda state: state,
)
def test_precedence(transform: str, deny: str, require: str, allow: str) -> None:
    """The truth table of a rule of each effect, each met, unmet, broken or absent: 256 cases."""
    states = {"transform": transform, "deny": deny, "require": require, "allow": allow}
    rules = [rule(name, STATES[state]) for name, state in states.items() if state != "absent"]
    for order in (rules, rules[::-1]):
        decision = judge(*order)
        assert (decision.verdict, decision.rules) == expected(transform, deny, require, allow)
        is_changed = decision.is_allowed and transform == "yes"
        assert (decision.obligations is not None) is is_changed
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
    st.lists(st.tuples(st.sampled_from(list(Effect)), _matches), max_size=8),
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
    request = ask(address=address, stream=stream, generates=True)
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
    same = msgspec.structs.replace(again, policy_digest=decision.policy_digest)
    assert same == decision


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
    assert judge(allow, bound.format(YES)).reasons == (
        "require 'r' is not met at stream: false is not true",
    )
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
        ("no allow matched; nearest is 'b', which failed at model: 'gpt-5-mini' is not claude-*",),
    ),
    "nearest-tie": (
        [rule("allow", NO, "b"), rule("allow", NO, "a")],
        {},
        ("no allow matched; nearest is 'a', which failed at tenant: 'acme' is not beta",),
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
            "no allow matched; nearest is 'a', which failed at client_address: '?' is not in "
            "0.0.0.0/0",
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
        ("require 'r' is not met at max_tokens: 1000 is not at most 5",),
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


@pytest.mark.parametrize("effect", [Effect.ALLOW, Effect.REQUIRE])
def test_nothing_passes_for_want_of_conditions(effect: Effect) -> None:
    """A rule compiled without conditions, which no file can hold, allows and fulfils nothing."""
    hollow = Rule(id="r", effect=effect, match=())
    sound = policy_set_of("rules:\n" + (rule("allow", YES) if effect == "require" else "  []"))
    changed = PolicySet.of([*sound.rules, hollow], (), PROVIDERS, "")
    assert not decide(changed, REQUEST).is_allowed


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


SHADOWS: dict[str, tuple[list[str], Verdict, tuple[str, ...]]] = {
    "deny": ([rule("allow", YES), rule("deny", YES, "d", more=", mode: shadow")], Verdict.DENY, ("d",)),
    "require": (
        [rule("allow", YES), rule("require", NO, "r", more=", mode: shadow")], Verdict.DENY, ("r",),
    ),
    "broken": (
        [rule("allow", YES), rule("deny", BROKEN, "d", more=", mode: shadow")], Verdict.ERROR, ("d",),
    ),
    "allow": ([rule("allow", YES, "a", more=", mode: shadow")], Verdict.ALLOW, ("a",)),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "verdict", "ids"), SHADOWS.values(), ids=SHADOWS)
def test_a_rule_in_shadow_only_says_what_it_would_do(
    rules: list[str], verdict: Verdict, ids: tuple[str, ...]
) -> None:
    """The decision is that of the others; beside it stands what would have been decided."""
    decision = judge(*rules)
    assert decision.verdict == judge(*[each for each in rules if "shadow" not in each]).verdict
    assert decision.would is not None
    assert (decision.would.verdict, decision.would.rules) == (verdict, ids)
    assert decision.would.reasons or verdict is Verdict.ALLOW


def test_a_shadow_that_changes_nothing_says_nothing() -> None:
    """Where enforcing would decide alike there is nothing to tell."""
    quiet = rule("deny", NO, "d", more=", mode: shadow")
    assert judge(rule("allow", YES), quiet).would is None


def test_a_transform_in_shadow_changes_nothing_but_says_what_it_would() -> None:
    """Its changes are told, and not made."""
    shadow = "  - {id: t, effect: transform, match: {tenant: acme}, change: {system: Hi.}, mode: shadow}\n"
    decision = judge(rule("allow", YES), shadow, request=ask(generates=True))
    assert decision.obligations is None
    assert decision.would is not None
    assert decision.would.changes == ("t: system text of 3 characters",)


def test_a_file_in_shadow_is_tried_as_a_whole() -> None:
    """`mode: shadow` at a file's top holds for each of its rules and for no other file's."""
    text = "mode: shadow\nrules:\n" + rule("deny", YES, "d")
    both = load_policy_set([("a", "rules:\n" + rule("allow", YES)), ("b", text)], PROVIDERS)
    decision = decide(both, REQUEST)
    assert decision.is_allowed
    assert decision.would is not None
    assert decision.would.rules == ("d",)


def test_a_whole_bundle_is_tried_beside_another() -> None:
    """A candidate decides nothing: what it would decide is told beside the decision in force."""
    running = policy_set_of("rules:\n" + rule("allow", YES))
    candidate = policy_set_of("rules:\n" + rule("allow", NO, "b"))
    decision = decide(running.trying(candidate), REQUEST)
    assert decision.is_allowed
    assert decision.policy_digest == running.digest
    assert decision.would is not None
    assert decision.would.verdict is Verdict.DENY
    assert decide(running.trying(running), REQUEST).would is None


PHI_RULE = "  - {id: p, effect: allow, match: {tenant: acme, labels: phi, purpose: treatment}}\n"
ELIGIBLE = {"phi": True, "baa": True}
PHI_CASES: dict[str, tuple[list[str], dict[str, Any], bool]] = {
    "authorised": ([PHI_RULE], {}, True),
    "sub-label": ([PHI_RULE.replace("phi,", "[phi, phi.mrn],")], {"labels": frozenset({"phi.mrn"})}, True),
    "no-rule": ([], {}, False),
    "other-purpose": ([PHI_RULE], {"purpose": "marketing"}, False),
    "no-purpose": ([PHI_RULE], {"purpose": ""}, False),
    "other-tenant": ([PHI_RULE], {"tenant": "beta"}, False),
    "provider-not-eligible": ([PHI_RULE], {"vouched": {"baa": True}}, False),
    "denied-all-the-same": ([PHI_RULE, rule("deny", YES)], {}, False),
    "by-a-rule-for-everything": (
        ["  - {id: w, effect: allow, match: {tenant: acme, labels: '*'}}\n"], {}, False,
    ),
    "not-phi": ([], {"labels": frozenset({"contract"}), "vouched": {}}, True),
}  # fmt: skip


@pytest.mark.parametrize(("rules", "facts", "allowed"), PHI_CASES.values(), ids=PHI_CASES)
def test_health_information_needs_an_authority_of_its_own(
    rules: list[str], facts: dict[str, Any], *, allowed: bool
) -> None:
    """PHI passes by an allow that names it, its purpose and its tenant, to an eligible provider only."""
    asked = ask(
        **{"labels": frozenset({"phi"}), "purpose": "treatment", "vouched": ELIGIBLE, **facts}
    )
    decision = judge(rule("allow", '{tenant: "*"}', "everything"), *rules, request=asked)
    assert decision.is_allowed is allowed
    if not allowed and "deny" not in decision.rules:
        assert decision.rules == ("phi",)
        assert decision.reasons
