"""`decide`: one question, one answer, and why.

Laws of this file:
- a deny that matches wins, then a require that is not met, then an allow; else the answer is no;
- the order of rules never changes the verdict;
- a deny or require that fails to evaluate denies, an allow that fails does not match: both as ERROR
  where they settle it, so that a broken rule is never taken for a policy.

No I/O.
"""

from collections.abc import Sequence

from policies.conditions import Condition
from policies.decision import Decision, Verdict
from policies.request import AccessRequest
from policies.rules import PolicySet, Rule

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
    for rule in policy_set.denies:
        try:
            matches = _holds(rule.match, request)
        except Exception as error:  # noqa: BLE001 - whatever broke, the call must not pass
            return _broken(rule, error, digest)
        if matches:
            return _denied(rule, f"deny {rule.id!r} matched", digest)
    for rule in policy_set.requires:
        try:
            unmet = (not rule.match or _holds(rule.match, request)) and not _holds(
                rule.that, request
            )
        except Exception as error:  # noqa: BLE001 - whatever broke, the call must not pass
            return _broken(rule, error, digest)
        if unmet:
            failed = _first_failing(rule.that, request)
            return _denied(rule, f"require {rule.id!r} is not met at {failed}", digest)
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


def _denied(rule: Rule, reason: str, digest: str) -> Decision:
    return Decision(
        verdict=Verdict.DENY,
        rules=(rule.id,),
        message=rule.message or _DENIED,
        reasons=(reason,),
        policy_digest=digest,
    )


def _broken(rule: Rule, error: Exception, digest: str) -> Decision:
    return Decision(
        verdict=Verdict.ERROR,
        rules=(rule.id,),
        message=_DENIED,
        reasons=(f"{rule.effect} {rule.id!r} failed: {type(error).__name__}",),
        policy_digest=digest,
    )


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
