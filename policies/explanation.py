"""A decision, rule by rule and condition by condition: what an operator reads to find the one that failed.

No I/O.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from policies.conditions import Condition
from policies.decision import Decision
from policies.engine import decide
from policies.request import AccessRequest
from policies.rule import Effect, Rule
from policies.rules import PolicySet


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One condition of a rule: `answer` is yes, no, or error; `detail` says why not."""

    what: str
    answer: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """One rule: whether it matched, and each of its conditions."""

    rule: Rule
    matched: bool
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A decision, and every rule on the way to it."""

    decision: Decision
    rules: tuple[Traced, ...]

    def to_lines(self, *, every_rule: bool = False) -> Iterator[str]:
        """Yield the explanation in words; without `every_rule`, of the rules that came near."""
        decision = self.decision
        yield f"{decision.verdict} by {', '.join(decision.rules) or 'default'}"
        yield from (f"  because {reason}" for reason in decision.reasons)
        yield from (f"  changed {change}" for change in decision.changes)
        if decision.would is not None:
            by = ", ".join(decision.would.rules) or "default"
            yield f"  with rules in shadow: {decision.would.verdict} by {by}"
        for traced in self.rules:
            if (
                every_rule
                or traced.matched
                or (traced.steps[:1] and traced.steps[0].answer == "yes")
            ):
                yield from _lines_of(traced)

    def to_json(self) -> dict[str, object]:
        """Return the explanation as plain values."""
        decision = self.decision
        return {
            "verdict": decision.verdict.value,
            "rules": list(decision.rules),
            "reasons": list(decision.reasons),
            "message": decision.message,
            "changes": list(decision.changes),
            "would": decision.would.verdict.value if decision.would else "",
            "policy": decision.policy_digest,
            "trace": [
                {
                    "rule": each.rule.id,
                    "effect": each.rule.effect.value,
                    "mode": "shadow" if each.rule.is_shadow else "enforce",
                    "matched": each.matched,
                    "conditions": [
                        {"name": step.what, "answer": step.answer, "detail": step.detail}
                        for step in each.steps
                    ],
                }
                for each in self.rules
            ],
        }


def _lines_of(traced: Traced) -> Iterator[str]:
    rule = traced.rule
    shadow = " (shadow)" if rule.is_shadow else ""
    state = "matches" if traced.matched else "does not match"
    yield f"{rule.effect} {rule.id}{shadow} {state}  [{rule.place.path}:{rule.place.line}]"
    for step in traced.steps:
        yield f"    {step.answer:5} {step.detail or step.what}"


_ORDER = [Effect.TRANSFORM, Effect.DENY, Effect.REQUIRE, Effect.ALLOW]


def explain(policy_set: PolicySet, request: AccessRequest) -> Explanation:
    """Return why a question is answered as it is."""
    decision = decide(policy_set, request)
    rules = sorted(policy_set.rules, key=lambda rule: (_ORDER.index(rule.effect), rule.id))
    return Explanation(
        decision=decision,
        rules=tuple(
            _trace(rule, request if rule.change is not None else decision.judged) for rule in rules
        ),
    )


def _trace(rule: Rule, request: AccessRequest) -> Traced:
    match = tuple(_steps(rule.match, request, ""))
    that = tuple(_steps(rule.that, request, "that "))
    return Traced(
        rule=rule, matched=all(step.answer == "yes" for step in match), steps=match + that
    )


def _steps(conditions: Sequence[Condition], request: AccessRequest, prefix: str) -> Iterator[Step]:
    for condition in conditions:
        try:
            holds = condition.holds(request)
        except Exception as error:  # noqa: BLE001 - it is told, not hidden
            yield Step(
                what=prefix + condition.name,
                answer="error",
                detail=f"{prefix}{condition.name}: {type(error).__name__}",
            )
            continue
        detail = "" if holds else prefix + condition.failing(request)
        yield Step(what=prefix + condition.name, answer="yes" if holds else "no", detail=detail)
