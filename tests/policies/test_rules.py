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
    """Rules are grouped by effect, denies first, and ordered by id within each."""
    policy_set = policy_set_of(
        "rules:\n"
        "  - {id: z, effect: allow, match: {tenant: a}}\n"
        "  - {id: b, effect: allow, match: {tenant: b}}\n"
        "  - {id: r, effect: require, that: {stream: true}, message: Stream.}\n"
        "  - {id: y, effect: deny, match: {tenant: c}}\n"
    )
    assert [rule.id for rule in policy_set.rules] == ["y", "r", "b", "z"]
    assert [rule.effect for rule in policy_set.rules] == [
        Effect.DENY,
        Effect.REQUIRE,
        Effect.ALLOW,
        Effect.ALLOW,
    ]
    assert policy_set.requires[0].message == "Stream."


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
    assert policy_set_of(text).reads_body is expected


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


WRONG: dict[str, tuple[str, list[str]]] = {
    "rule-without-anything": (
        "rules:\n  - {}",
        [
            "2:5: rules[0].effect is required",
            '2:5: rules[0].match is required; to match every call write {tenant: "*"}',
            "2:5: rules[0].id is required",
        ],
    ),
    "rules-no-list": ("rules: {id: a}", ["1:8: rules must be a list, not a mapping"]),
    "rule-no-mapping": (
        "rules: [allow]",
        [
            "1:9: rules[0] must be a mapping, not text",
            "1:9: rules[0].effect is required",
            '1:9: rules[0].match is required; to match every call write {tenant: "*"}',
            "1:9: rules[0].id is required",
        ],
    ),
    "unknown-top": ("rule: []", ["1:7: unknown key 'rule' (did you mean 'rules'?)"]),
    "unknown-in-rule": (
        "rules:\n  - id: a\n    effect: allow\n    match: {tenant: a}\n    massage: no",
        ["5:14: unknown key 'massage' in rules[0] (did you mean 'message'?)"],
    ),
    "misspelt-match": (
        "rules: [{id: a, effect: allow, mach: {tenant: a}}]",
        [
            "1:38: unknown key 'mach' in rules[0] (did you mean 'match'?)",
            '1:9: rules[0].match is required; to match every call write {tenant: "*"}',
        ],
    ),
    "effect": (
        "rules:\n  - id: a\n    effect: alow\n    match: {tenant: a}",
        [
            "3:13: rules[0].effect must be one of allow, deny, require (did you mean 'allow'?)",
        ],
    ),
    "id-shape": (
        "rules: [{id: No Way, effect: allow, match: {tenant: a}}]",
        ["1:14: rules[0].id must be 1 to 64 of a-z, 0-9, '.', '_' and '-'"],
    ),
    "id-long": (
        "rules: [{id: " + "a" * 65 + ", effect: allow, match: {tenant: a}}]",
        ["1:14: rules[0].id must be 1 to 64 of a-z, 0-9, '.', '_' and '-'"],
    ),
    "id-twice": (
        ALLOW[:-1] + ", {id: a, effect: deny, match: {tenant: b}}]",
        ["1:61: rules[1].id 'a' is used twice"],
    ),
    "empty-match": (
        "rules: [{id: a, effect: allow, match: {}}]",
        ["1:39: rules[0].match must hold at least one condition"],
    ),
    "blank-match": (
        "rules:\n  - id: a\n    effect: deny\n    match:",
        ["2:5: rules[0].match must hold at least one condition"],
    ),
    "require-without-that": (
        "rules: [{id: a, effect: require, match: {tenant: a}}]",
        ["1:9: rules[0].that is required: what must a matching call satisfy?"],
    ),
    "empty-that": (
        "rules: [{id: a, effect: require, that: {}}]",
        ["1:40: rules[0].that must hold at least one condition"],
    ),
    "empty-match-of-require": (
        "rules: [{id: a, effect: require, match: {}, that: {tenant: a}}]",
        ["1:41: rules[0].match must hold at least one condition"],
    ),
    "that-of-allow": (
        "rules: [{id: a, effect: allow, match: {tenant: a}, that: {tenant: b}}]",
        ["1:58: rules[0].that belongs to rules with effect: require"],
    ),
    "provider": (
        "rules:\n  - id: a\n    effect: allow\n    match:\n      any:\n        - provider: [openai, azure]",
        [
            "6:21: rules[0].match.any[0].provider names 'azure', which is no configured provider",
        ],
    ),
    "message": (
        "rules: [{id: a, effect: allow, match: {tenant: a}, message: [no]}]",
        ["1:61: rules[0].message must be text, not a list"],
    ),
    "limit-without-anything": (
        "limits:\n  - {}",
        [
            "2:5: limits[0].key is required: one or more of tenant, subject, role, session, provider, "
            "model, operation",
            "2:5: limits[0].name is required",
            "2:5: limits[0] one kind is needed: requests, tokens, bytes, concurrent, budget",
        ],
    ),
    "limit-blank-key": (
        "limits:\n  - name: a\n    key:\n    requests: {rate: 1/s}",
        [
            "3:5: limits[0].key is required: one or more of tenant, subject, role, session, provider, "
            "model, operation",
        ],
    ),
    "limit-empty-key": (
        "limits: [{name: a, key: [], requests: {rate: 1/s}}]",
        ["1:25: limits[0].key must not be empty"],
    ),
    "limit-key": (
        "limits: [{name: a, key: [tenant, team], requests: {rate: 1/s}}]",
        [
            "1:25: limits[0].key holds 'team'; parts are tenant, subject, role, session, provider, "
            "model, operation",
        ],
    ),
    "limit-both": (
        "limits: [{name: a, key: tenant, requests: {rate: 1/s}, concurrent: {max: 1}}]",
        [
            "1:68: limits[0].concurrent one kind is needed: requests, tokens, bytes, concurrent, "
            "budget"
        ],
    ),
    "limit-name": (
        "limits: [{name: 'a\"b', key: tenant, requests: {rate: 1/s}}]",
        ["1:17: limits[0].name must be 1 to 64 of a-z, 0-9, '.', '_' and '-'"],
    ),
    "limit-twice": (
        "limits:\n"
        "  - {name: a, key: tenant, requests: {rate: 1/s}}\n"
        "  - {name: a, key: tenant, requests: {rate: 1/s}}",
        ["3:12: limits[1].name 'a' is used twice"],
    ),
    "limit-match": (
        "limits: [{name: a, key: tenant, match: {}, requests: {rate: 1/s}}]",
        ["1:40: limits[0].match must hold at least one condition"],
    ),
    "burst": (
        "limits: [{name: a, key: tenant, requests: {rate: 1/s, burst: 0}}]",
        ["1:62: limits[0].requests.burst must be between 1 and 1000000000000"],
    ),
    "concurrent": (
        "limits: [{name: a, key: tenant, concurrent: {max: 0}}]",
        ["1:51: limits[0].concurrent.max must be between 1 and 1000000000000"],
    ),
    "concurrent-endless": (
        "limits: [{name: a, key: tenant, concurrent: {max: 1000000000000001}}]",
        ["1:51: limits[0].concurrent.max must be between 1 and 1000000000000"],
    ),
    "too-fast": (
        "limits: [{name: a, key: tenant, requests: {rate: 60000001/min}}]",
        ["1:50: limits[0].requests.rate must be at most 1000000/s"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_line_by_line(text: str, expected: list[str]) -> None:
    """Every fault is a `path:line:column: message` that an editor can follow."""
    assert sorted(faults_of(text)) == sorted(f"a.yaml:{each}" for each in expected)


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
        "c.yaml:1:14: rules[0].id 'x' is used twice",
        "c.yaml:1:56: unknown key 'why' in rules[0]",
    ]
