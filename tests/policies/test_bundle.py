"""The policies that are shipped load, and decide as they say."""

from pathlib import Path
from typing import Any

import pytest

import policies
from gateway.providers.catalogue import CATALOGUE
from policies.decision import Verdict
from policies.engine import decide
from policies.quota import Concurrency, Rate
from policies.request import Operation
from policies.rules import PolicySet, load_policy_set
from tests.policies.asking import PROVIDERS, ask

BUNDLE = Path(policies.__file__).parent / "bundle"
SHIPPED = sorted(BUNDLE.rglob("*.yaml"))
DEFAULT = "default.yaml"
TEAMS = "examples/team-models.yaml"


def shipped(name: str) -> PolicySet:
    """Return what one shipped file compiles to, where only three providers are configured."""
    return load_policy_set([(name, (BUNDLE / name).read_text())], PROVIDERS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_policy_loads(path: Path) -> None:
    """Each shipped file is faultless for all built-in providers, and allows somebody something."""
    policy_set = load_policy_set([(path.name, path.read_text())], frozenset(CATALOGUE))
    assert policy_set.allows
    assert policy_set.limits


DECISIONS: dict[str, tuple[str, dict[str, Any], Verdict, tuple[str, ...]]] = {
    "anybody": (DEFAULT, {"tenant": "x", "roles": ()}, Verdict.ALLOW, ("default-allow",)),
    "unparsed": (DEFAULT, {"is_parsed": False}, Verdict.ALLOW, ("default-allow",)),
    "files": (DEFAULT, {"operation": Operation.FILES}, Verdict.ALLOW, ("default-allow",)),
    "batches": (DEFAULT, {"operation": Operation.BATCHES}, Verdict.DENY, ("no-batches",)),
    "engineer": (TEAMS, {}, Verdict.ALLOW, ("engineers",)),
    "engineer-claude": (
        TEAMS,
        {"provider": "anthropic", "operation": Operation.MESSAGES, "model": "claude-opus-5"},
        Verdict.ALLOW,
        ("engineers",),
    ),
    "engineer-gemini": (TEAMS, {"provider": "gemini", "model": "gpt-5"}, Verdict.DENY, ()),
    "small": (
        TEAMS,
        {"roles": (), "model": "claude-haiku-4-5"},
        Verdict.ALLOW,
        ("everyone-small-models",),
    ),
    "large": (TEAMS, {"roles": (), "model": "gpt-5"}, Verdict.DENY, ()),
    "other-tenant": (TEAMS, {"tenant": "beta"}, Verdict.DENY, ()),
    "long-answer": (TEAMS, {"max_tokens": 8193}, Verdict.DENY, ("bounded-answers",)),
    "longest-answer": (TEAMS, {"max_tokens": 8192}, Verdict.ALLOW, ("engineers",)),
    "unbounded-answer": (TEAMS, {"max_tokens": -1}, Verdict.DENY, ("bounded-answers",)),
    "embeddings-have-no-answer": (
        TEAMS,
        {"operation": Operation.EMBEDDINGS, "max_tokens": -1},
        Verdict.ALLOW,
        ("engineers",),
    ),
    "office-v6": (TEAMS, {"address": "::1"}, Verdict.ALLOW, ("engineers",)),
    "elsewhere": (TEAMS, {"address": "192.0.2.1"}, Verdict.DENY, ("office-only",)),
    "nowhere": (TEAMS, {"address": ""}, Verdict.ERROR, ("office-only",)),
    "unreadable": (TEAMS, {"is_parsed": False}, Verdict.DENY, ()),
}


@pytest.mark.parametrize(("name", "facts", "verdict", "rules"), DECISIONS.values(), ids=DECISIONS)
def test_a_shipped_policy_decides_as_it_says(
    name: str, facts: dict[str, Any], verdict: Verdict, rules: tuple[str, ...]
) -> None:
    """Who reads the file's comments and ids knows what it decides."""
    decision = decide(shipped(name), ask(**facts))
    assert (decision.verdict, decision.rules) == (verdict, rules)


@pytest.mark.parametrize(
    ("name", "facts", "message"),
    [
        (DEFAULT, {"operation": Operation.BATCHES}, "Batches are not enabled here."),
        (TEAMS, {"max_tokens": -1}, "Ask for at most 8192 tokens."),
        (TEAMS, {"address": "192.0.2.1"}, "Calls are accepted from the office network only."),
    ],
    ids=["batches", "long-answer", "elsewhere"],
)
def test_a_shipped_denial_tells_the_caller(name: str, facts: dict[str, Any], message: str) -> None:
    """A denial carries the sentence that the file has for it."""
    assert decide(shipped(name), ask(**facts)).message == message


def test_the_default_does_not_read_bodies() -> None:
    """What a new gateway starts with lets bodies stream through unread."""
    assert not shipped(DEFAULT).reads_body


def test_the_default_paces_callers_and_sessions() -> None:
    """A new gateway limits each caller's pace and each session's calls at once."""
    pace, calls = shipped(DEFAULT).limits
    assert pace.measure == Rate(count=600, period_seconds=60.0, burst=200)
    assert pace.key_of(ask()) != pace.key_of(ask(subject="bob"))
    assert calls.measure == Concurrency(maximum=64)
    assert calls.key_of(ask()) != calls.key_of(ask(session_id="s2"))
