"""The policies that are shipped load, pass the tests beside them, and hold no rule without effect."""

from pathlib import Path

import pytest

import policies
from gateway.providers.catalogue import CATALOGUE
from policies.analysis import findings
from policies.document import read_document
from policies.formatting import formatted
from policies.known import Known
from policies.quota import Concurrency, Rate
from policies.request import ProviderFacts
from policies.rules import PolicySet, load_policy_set
from policies.testing import SUFFIX, coverage, read_cases, run_cases
from tests.policies.asking import ask

BUNDLE = Path(policies.__file__).parent / "bundle"
SHIPPED = sorted(path for path in BUNDLE.rglob("*.yaml") if not path.name.endswith(SUFFIX))
KNOWN = Known.of({name: ProviderFacts(dialect=entry.dialect) for name, entry in CATALOGUE.items()})


def shipped(path: Path) -> PolicySet:
    """Return what one shipped file compiles to where every built-in provider is configured."""
    return load_policy_set([(path.name, path.read_text())], KNOWN)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_policy_decides_as_its_tests_say(path: Path) -> None:
    """Every file has tests beside it, and each of them passes."""
    policy_set = shipped(path)
    beside = path.with_name(path.stem + SUFFIX)
    cases = read_cases([(beside.name, beside.read_text())], policy_set.known)
    outcomes = run_cases(cases, policy_set)
    assert len(outcomes) >= 5
    assert [(each.case.name, each.differences) for each in outcomes if each.differences] == []
    untried = {each.rule for each in coverage(outcomes, policy_set) if True not in each.answers}
    assert not untried, "no test sees these rules, or a condition of theirs, hold"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_policy_holds_no_rule_in_vain(path: Path) -> None:
    """No shipped rule is unreachable, redundant or overruled; each allows somebody something."""
    policy_set = shipped(path)
    assert policy_set.enforced.allows.rules
    assert [*map(str, findings(policy_set, is_configured=False))] == []


@pytest.mark.parametrize("path", sorted(BUNDLE.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_files_are_laid_out(path: Path) -> None:
    """Policies are as `veklom policy fmt` lays them out; tests are plain documents."""
    if path in SHIPPED:
        assert formatted(path.read_text(), path.name) == path.read_text()
    read_document(path.read_text(), path.name)


def test_the_default_does_not_read_bodies() -> None:
    """What a new gateway starts with lets bodies stream through unread."""
    assert not shipped(BUNDLE / "default.yaml").enforced.reads_body


def test_the_default_paces_callers_and_sessions() -> None:
    """A new gateway limits each caller's pace and each session's calls at once."""
    pace, calls = shipped(BUNDLE / "default.yaml").limits
    assert pace.measure == Rate(count=600, period_seconds=60.0, burst=200)
    assert pace.key_of(ask()) != pace.key_of(ask(subject="bob"))
    assert calls.measure == Concurrency(maximum=64)
    assert calls.key_of(ask()) != calls.key_of(ask(session_id="s2"))
