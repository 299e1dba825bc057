"""`decide`: one question, one answer, and why.

Laws of this file:
- a deny that matches wins, then a require that is not met, then an allow; else the answer is no;
- the order of rules never changes the answer: every rule that refuses is named, and of the allows
  the first by id;
- a deny or require that fails to evaluate denies, an allow that fails does not match: both as ERROR
  where they settle it, so that a broken rule is never taken for a policy.

No I/O.
"""

from collections.abc import Callable, Sequence

from policies.conditions import Condition
from policies.decision import Decision, Verdict
from policies.request import AccessRequest
from policies.rules import PolicySet, Rule

Objection = Callable[[Rule, AccessRequest], str]

_DENIED = "The policy does not allow this call."
_UNREADABLE = "The policy must read this body and cannot."


def decide(policy_set: PolicySet, request: AccessRequest) -> Decision:
    """Return whether `request` may go on, by which rules, and why."""
    digest = policy_set.digest
    if policy_set.reads_body and not request.call.is_parsed:
        return Decision(
            verdict=Verdict.DENY,
            message=_UNREADABLE,
            reasons=("the body could not be read, and rules depend on it",),
            policy_digest=digest,
        )
    refusal = _refusal(policy_set.denies, request, _forbids, digest) or _refusal(
        policy_set.requires, request, _falls_short, digest
    )
    if refusal:
        return refusal
    broken: list[str] = []
    for rule in policy_set.allows:
        try:
            if _holds(rule.match, request):
                return Decision(verdict=Verdict.ALLOW, rules=(rule.id,), policy_digest=digest)
        except Exception as error:  # noqa: BLE001 - an allow that fails does not match
            broken.append(f"allow {rule.id!r} failed: {type(error).__name__}")
    return Decision(
        verdict=Verdict.ERROR if broken else Verdict.DENY,
        message=_DENIED,
        reasons=(*broken, _nearest(policy_set.allows, request)),
        policy_digest=digest,
    )


def _holds(conditions: Sequence[Condition], request: AccessRequest) -> bool:
    for condition in conditions:
        if not condition.holds(request):
            return False
    return bool(conditions)


def _refusal(
    rules: Sequence[Rule], request: AccessRequest, objects: Objection, digest: str
) -> Decision | None:
    """Return the refusal of all rules that object; of those that broke, where none objects."""
    objecting: list[Rule] = []
    broken: list[Rule] = []
    reasons: list[str] = []
    for rule in rules:
        try:
            reason = objects(rule, request)
        except Exception as error:  # noqa: BLE001 - whatever broke, the call must not pass
            broken.append(rule)
            reasons.append(f"{rule.effect} {rule.id!r} failed: {type(error).__name__}")
        else:
            if reason:
                objecting.append(rule)
                reasons.append(reason)
    if not reasons:
        return None
    return Decision(
        verdict=Verdict.DENY if objecting else Verdict.ERROR,
        rules=tuple(rule.id for rule in objecting or broken),
        message=next((rule.message for rule in objecting if rule.message), _DENIED),
        reasons=tuple(reasons),
        policy_digest=digest,
    )


def _forbids(rule: Rule, request: AccessRequest) -> str:
    return f"deny {rule.id!r} matched" if _holds(rule.match, request) else ""


def _falls_short(rule: Rule, request: AccessRequest) -> str:
    if (rule.match and not _holds(rule.match, request)) or _holds(rule.that, request):
        return ""
    return f"require {rule.id!r} is not met at {_first_failing(rule.that, request)}"


def _first_failing(conditions: Sequence[Condition], request: AccessRequest) -> str:
    for condition in conditions:
        try:
            if not condition.holds(request):
                return condition.name
        except Exception:  # noqa: BLE001 - only an explanation is at stake
            return condition.name
    return "nothing"


def _nearest(allows: Sequence[Rule], request: AccessRequest) -> str:
    """Say which allow came closest and where it failed: the operator's next step."""
    if not allows:
        return "there is no allow rule"

    def conditions_met(rule: Rule) -> int:
        failing = _first_failing(rule.match, request)
        return next((n for n, each in enumerate(rule.match) if each.name == failing), 0)

    nearest = max(allows, key=conditions_met)
    return f"no allow matched; nearest is {nearest.id!r}, which failed at " + _first_failing(
        nearest.match, request
    )
