"""Policy files compile as a whole, or are refused with everything that is wrong in any of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.document import DocumentError
from policies.rules import Effect, load_policy_set
from tests.policies.asking import PROVIDERS, policy_set_of

ALLOW = "rules: [{id: a, effect: allow, match: {tenant: acme}}]"


def faults_of(*texts: str) -> list[str]:
    """Return the lines that the files a.yaml, b.yaml, … are refused with."""
    sources = [(f"{name}.yaml", text) for name, text in zip("abc", texts, strict=False)]
    with pytest.raises(DocumentError) as caught:
        load_policy_set(sources, PROVIDERS)
    return str(caught.value).split("\n")


def test_a_set_keeps_rules_by_effect_and_id() -> None:
    """Rules are kept by id, and found by effect in that order."""
    policy_set = policy_set_of(
        "rules:\n"
        "  - {id: z, effect: allow, match: {tenant: a}}\n"
        "  - {id: b, effect: allow, match: {tenant: b}}\n"
        "  - {id: r, effect: require, that: {stream: true}, message: Stream.}\n"
        "  - {id: y, effect: deny, match: {tenant: c}}\n"
    )
    assert [rule.id for rule in policy_set.rules] == ["b", "r", "y", "z"]
    assert [rule.id for rule in policy_set.enforced.allows] == ["b", "z"]
    assert [rule.effect for rule in policy_set.enforced.denies] == [Effect.DENY]
    assert policy_set.by_id["r"].message == "Stream."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rules: []", False),
        (ALLOW, False),
        ("rules: [{id: a, effect: allow, match: {model: x}}]", True),
        ("rules: [{id: a, effect: deny, match: {not: {tools: x}}}]", True),
        ("rules: [{id: a, effect: require, that: {any: [{max_tokens: {max: 5}}]}}]", True),
        ("rules: [{id: a, effect: require, match: {stream: true}, that: {tenant: x}}]", True),
        ("limits: [{name: a, key: model, requests: {rate: 1/s}}]", True),
        ("limits: [{name: a, key: tenant, match: {model: x}, requests: {rate: 1/s}}]", True),
        ("limits: [{name: a, key: tenant, requests: {rate: 1/s}}]", False),
        ("rules: [{id: a, effect: allow, match: {body_bytes: {max: 5}}}]", False),
    ],
    ids=[
        "empty",
        "tenant",
        "model",
        "under-not",
        "under-any",
        "match-of-require",
        "limit-by-model",
        "limit-matching-model",
        "limit",
        "length-is-no-body-fact",
    ],
)
def test_a_set_knows_whether_it_reads_bodies(text: str, *, expected: bool) -> None:
    """A fact of the body anywhere, in rules or limits, makes the set read bodies."""
    assert policy_set_of(text).enforced.reads_body is expected


def test_a_digest_names_the_files_whatever_their_order() -> None:
    """The digest depends on names and bytes of files, not on the order they are given in."""
    one, two = ("/etc/p/a.yaml", ALLOW), ("/etc/p/b.yaml", "rules: []")
    digest = load_policy_set([one, two], PROVIDERS).digest
    assert digest.startswith("sha256:")
    assert len(digest) == 7 + 64
    assert load_policy_set([two, one], PROVIDERS).digest == digest
    others = [
        [one],
        [one, ("/etc/p/b.yaml", "rules: [] ")],
        [one, ("/etc/p/c.yaml", "rules: []")],
        [("/etc/p/a.yaml", "rules: []"), ("/etc/p/b.yaml", ALLOW)],
    ]
    assert digest not in {load_policy_set(each, PROVIDERS).digest for each in others}


@given(st.permutations(range(6)), st.integers(0, 6))
def test_rules_may_be_spread_over_files_in_any_way(order: list[int], cut: int) -> None:
    """The same rules in other files and another order compile to the same rules."""
    lines = [f"  - {{id: r{n}, effect: allow, match: {{tenant: t{n}}}}}\n" for n in order]
    sources = [("a", "rules:\n" + "".join(lines[:cut])), ("b", "rules:\n" + "".join(lines[cut:]))]
    rules = load_policy_set(sources, PROVIDERS).rules
    assert [rule.id for rule in rules] == [f"r{n}" for n in range(6)]


@pytest.mark.parametrize(
    "rate",
    [
        "0/s",
        "-1/s",
        "1",
        "1/m",
        "1/w",
        "1.5/s",
        "60 / min",
        "9" * 13 + "/d",
        "9" * 5000 + "/s",
        "٦/s",
    ],
    ids=[
        "zero",
        "negative",
        "unit",
        "m",
        "week",
        "fraction",
        "spaces",
        "long",
        "endless",
        "digits",
    ],
)
def test_a_wrong_rate_is_a_fault(rate: str) -> None:
    """A pace that is no whole number of calls a known period is refused, and never a crash."""
    assert faults_of(f"limits: [{{name: a, key: tenant, requests: {{rate: '{rate}'}}}}]") == [
        "a.yaml:1:50: limits[0].requests.rate must be a rate such as 60/min; units are s, min, h, d"
    ]


def test_all_faults_of_all_files_come_at_once() -> None:
    """Unreadable, misshapen and clashing files are reported together, in the order of their names."""
    assert faults_of(
        "rules: [{id: x, effect: allow, match: {tenant: 5}}]\nlimit: []",
        "rules: [",
        "rules: [{id: x, effect: deny, match: {tenant: a}, why: b}]",
    ) == [
        "a.yaml:1:48: rules[0].match.tenant must hold texts, not a whole number",
        "a.yaml:2:8: unknown key 'limit' (did you mean 'limits'?)",
        "b.yaml:1:9: expected the node content, but found '<stream end>'",
        "c.yaml:1:14: rules[0].id 'x' is used twice, also at a.yaml:1",
        "c.yaml:1:56: unknown key 'why' in rules[0]",
    ]
