"""Policy tests are read strictly, run with frozen time, and say what is otherwise."""

import pytest

from policies.document import DocumentError
from policies.known import Known
from policies.request import ProviderFacts
from policies.rules import PolicySet, load_policy_set
from policies.testing import Case, Outcome, coverage, read_cases, run_cases, uncovered

POLICY = """\
rules:
  - {id: a, effect: allow, match: {tenant: acme, provider.region: eu}}
  - {id: d, effect: deny, match: {model: bad}, message: Not this one.}
  - {id: t, effect: transform, match: {model: long}, change: {max_tokens: {max: 5}}}
  - {id: s, effect: deny, match: {auth_age: {min: 1h}}, mode: shadow}
"""
FIXTURES = """\
fixtures:
  call: {tenant: acme, provider: openai, auth_age: 5m}
  elsewhere: {provider: gemini}
  bad: {model: bad}
"""
KNOWN = Known.of(
    {
        "openai": ProviderFacts(dialect="openai", region="eu"),
        "gemini": ProviderFacts(dialect="gemini"),
    }
)
POLICIES: PolicySet = load_policy_set([("p.yaml", POLICY)], KNOWN)


def cases_of(tests: str) -> list[Case]:
    """Return the cases of a test file with the usual fixtures."""
    return read_cases([("p_test.yaml", FIXTURES + "tests:\n" + tests)], KNOWN)


def differences(tests: str) -> list[tuple[str, ...]]:
    """Return what is otherwise in each case."""
    return [each.differences for each in run_cases(cases_of(tests), POLICIES)]


def outcomes(tests: str) -> list[Outcome]:
    """Return what became of each case."""
    return run_cases(cases_of(tests), POLICIES)


def test_what_is_as_expected_says_nothing() -> None:
    """Verdict, rules, changes, shadow, reason and message may all be expected."""
    assert (
        differences(
            "  - {name: a, given: call, expect: allow}\n"
            "  - {name: b, given: [call, bad], expect: {verdict: deny, rules: d, message: Not this one.}}\n"
            "  - name: c\n"
            "    given: call\n"
            "    with: {model: long, generates: true}\n"
            "    expect: {verdict: allow, rules: [a], changes: [max_tokens = 5], would: ''}\n"
            "  - {name: d, given: call, with: {auth_age: 2h}, expect: {verdict: allow, would: deny}}\n"
            "  - {name: e, given: [call, elsewhere], expect: {verdict: deny, reason: provider.region}}\n"
        )
        == [()] * 5
    )


WRONG = {
    "verdict": ("expect: deny", "expected deny, got allow"),
    "rules": ("expect: {verdict: allow, rules: b}", "expected rules [b], got [a]"),
    "changes": ("expect: {verdict: allow, changes: [x]}", "expected changes [x], got []"),
    "would": ("expect: {verdict: allow, would: deny}", "expected would deny, got nothing"),
    "reason": ("expect: {verdict: allow, reason: x}", "expected a reason with 'x'"),
    "message": ("expect: {verdict: allow, message: x}", "expected message 'x', got ''"),
}


@pytest.mark.parametrize(("expect", "said"), WRONG.values(), ids=WRONG)
def test_what_is_otherwise_is_told(expect: str, said: str) -> None:
    """Each expectation that is not met is named with what was there instead."""
    assert differences(f"  - {{name: a, given: call, {expect}}}\n") == [(said,)]


def test_a_matrix_says_what_passes_and_everything_else_does_not() -> None:
    """Every combination is a case; those listed are allowed, the others denied."""
    cases = cases_of(
        "  - {name: m, given: call, matrix: [[call, elsewhere], [call, bad]], allow: [[call, call]]}\n"
    )
    assert [each.name for each in cases] == [
        "m [call, call]", "m [call, bad]", "m [elsewhere, call]", "m [elsewhere, bad]",
    ]  # fmt: skip
    assert [each.expected.verdict for each in cases] == ["allow", "deny", "deny", "deny"]
    none = cases_of("  - {name: m, matrix: [[bad]], allow: []}\n")
    assert [each.expected.verdict for each in none] == ["deny"]


def test_time_stands_still() -> None:
    """A test's instant is its own, its file's, or the same for ever; never the machine's."""
    (case,) = cases_of("  - {name: a, now: '2027-01-15T09:00:00+01:00', expect: deny}\n")
    assert case.request.now == 1_800_000_000
    assert cases_of("  - {name: a, expect: deny}\n")[0].request.now == 1_767_225_600


def test_what_is_vouched_for_comes_from_the_configuration_or_the_test() -> None:
    """A provider's facts are the configuration's, unless the file or the test says otherwise."""
    assert outcomes("  - {name: a, given: call, expect: allow}\n")[0].decision.is_allowed
    own = "  - {name: a, given: call, with: {provider.region: us}, expect: deny}\n"
    assert not outcomes(own)[0].decision.is_allowed
    text = (
        FIXTURES
        + "providers: {openai: {region: us}}\ntests: [{name: a, given: call, expect: deny}]"
    )
    (outcome,) = run_cases(read_cases([("p", text)], KNOWN), POLICIES)
    assert not outcome.differences


FAULTS = {
    "fact": ("with: {tennant: x}, expect: deny", "is no fact that a call can be asked with (did you mean 'tenant'?)"),
    "type": ("with: {stream: perhaps}, expect: deny", "holds facts that no call has"),
    "fixture": ("given: cal, expect: deny", "names 'cal', which is no fixture of this file (did you mean 'call'?)"),
    "verdict": ("expect: alow", "must be one of allow, deny, error (did you mean 'allow'?)"),
    "nothing": ("given: call", "is required: one of allow, deny, error"),
    "unknown": ("expects: deny, expect: deny", "unknown key 'expects'"),
    "now": ("now: yesterday, expect: deny", "is no instant; write it as 2027-01-15T09:00:00Z"),
    "zone": ("now: '2027-01-15T09:00:00', expect: deny", "has no zone"),
    "matrix": ("matrix: call, allow: []", "must be a list of lists"),
    "matrix-without-allow": ("matrix: [[call]]", "is required beside a matrix"),
    "matrix-and-expect": ("matrix: [[call]], allow: [], expect: deny", "cannot both be given"),
    "no-combination": ("matrix: [[call]], allow: [[bad]]", "which is no combination of the matrix"),
    "now-as-fact": ("with: {now: 5}, expect: deny", "write now: beside the test"),
}  # fmt: skip


@pytest.mark.parametrize(("test", "said"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_test_is_no_test(test: str, said: str) -> None:
    """A test that could not mean what it says is a fault where it stands, never one that passes."""
    with pytest.raises(DocumentError) as refused:
        cases_of(f"  - {{name: a, {test}}}\n")
    assert any(said in fault.message for fault in refused.value.faults), refused.value.faults
    assert all(fault.line >= 6 for fault in refused.value.faults)


def test_coverage_counts_both_answers_of_rules_and_conditions() -> None:
    """What no test saw true and false is named, with the answer that is missing."""
    missing = [
        *uncovered(coverage(outcomes("  - {name: a, given: call, expect: allow}\n"), POLICIES))
    ]
    assert "rule 'a': rule was never seen false" in missing
    assert "rule 'd': model was never seen true" in missing
    both = "  - {name: a, given: call, expect: allow}\n  - {name: b, given: [call, bad], expect: deny}\n"
    missing = [*uncovered(coverage(outcomes(both), POLICIES))]
    assert not any("rule 'd'" in line for line in missing)
    assert next(uncovered(coverage([], POLICIES))) == "rule 'a': rule was never seen true or false"
