"""`decide`: one question, one answer, and why.

Laws of this file:
- transforms come first, and the call is judged as they leave it: what is judged is what is sent;
- a deny that matches wins, then a require that is not met, then an allow; else the answer is no;
- the order of rules never changes the answer: every rule that refuses is named (of very many the
  first by id), and of the allows the first by id;
- a deny, require or transform that fails to evaluate denies, an allow that fails does not match: both
  as ERROR where they settle it, so that a broken rule is never taken for a policy;
- protected health information passes only by an allow that names it, its purpose and its tenant, to a
  provider that the operator calls eligible;
- rules in shadow decide nothing: what they would have changed is told beside the decision.

No I/O.
"""

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from policies.conditions import Condition
from policies.decision import Decision, Verdict, Would
from policies.index import RuleIndex
from policies.known import Known
from policies.obligations import Change, Obligations, Unchangeable, oblige
from policies.request import AccessRequest
from policies.rule import PHI, Rule, is_phi
from policies.rules import PolicySet, RuleBook

Objection = Callable[[Rule, AccessRequest], str]

MAX_EXPLAINED: Final = 64
"""How many allows are compared to say which was nearest; a denial must not cost more than a call."""

MAX_TOLD: Final = 32
"""How many rules that refuse one call are named, with a reason each; an audit event holds 64 KiB."""

_DENIED = "The policy does not allow this call."
_UNREADABLE = "The policy must read this body and cannot."
_NOT_ELIGIBLE = "Protected health information may not be sent to this provider."
_CANNOT_CHANGE = "The policy must change this call and cannot."


def decide(policy_set: PolicySet, request: AccessRequest) -> Decision:
    """Return whether `request` may go on, by which rules, and why."""
    decision = _judge(policy_set.enforced, policy_set, request)
    if policy_set.trial is None:
        return decision
    tried = _judge(policy_set.trial, policy_set, request)
    if tried.verdict == decision.verdict and tried.changes == decision.changes:
        return decision
    would = Would(
        verdict=tried.verdict, rules=tried.rules, reasons=tried.reasons, changes=tried.changes
    )
    return msgspec.structs.replace(decision, would=would)


def _judge(book: RuleBook, policy_set: PolicySet, request: AccessRequest) -> Decision:
    digest = policy_set.digest
    if book.reads_body and not request.call.is_parsed:
        return Decision(
            verdict=Verdict.DENY,
            judged=request,
            message=_UNREADABLE,
            reasons=("the body could not be read, and rules depend on it",),
            policy_digest=digest,
        )
    obligations, changed, failure = None, request, None
    transforms = book.transforms.candidates(request)
    if transforms:
        obligations, changed, failure = _transform(transforms, request, policy_set.known, digest)
    refusal = _refusal(book.denies, changed, _forbids, digest) or _refusal(
        book.requires, changed, _falls_short, digest
    )
    if failure is not None and (refusal is None or refusal.verdict is Verdict.ERROR):
        return failure
    return refusal or _allow(book.allows, changed, obligations, digest)


def holds(conditions: Sequence[Condition], request: AccessRequest) -> bool:
    """Return whether every condition holds, and there is one."""
    for condition in conditions:
        if not condition.holds(request):
            return False
    return bool(conditions)


# --- transforms ----------------------------------------------------------------------------------


def _transform(
    rules: Sequence[Rule], request: AccessRequest, known: Known, digest: str
) -> tuple[Obligations | None, AccessRequest, Decision | None]:
    """Return what is to change and the call then; or the refusal of a transform that failed."""
    applying: list[tuple[str, Change]] = []
    broken: list[str] = []
    reasons: list[str] = []
    for rule in rules:
        try:
            if rule.change is not None and holds(rule.match, request):
                applying.append((rule.id, rule.change))
        except Exception as error:  # noqa: BLE001 - whatever broke, the call must not pass
            broken.append(rule.id)
            reasons.append(f"transform {rule.id!r} failed: {type(error).__name__}")
    if not applying and not broken:
        return None, request, None
    verdict = Verdict.ERROR
    if not broken:
        try:
            return *oblige(applying, request, known), None
        except Unchangeable as error:
            verdict = Verdict.DENY
            broken, reasons = [rule for rule, _ in applying], [str(error)]
    return (
        None,
        request,
        Decision(
            verdict=verdict,
            judged=request,
            rules=tuple(broken[:MAX_TOLD]),
            message=_CANNOT_CHANGE,
            reasons=tuple(reasons[:MAX_TOLD]),
            policy_digest=digest,
        ),
    )


# --- refusals ------------------------------------------------------------------------------------


def _refusal(
    rules: RuleIndex, request: AccessRequest, objects: Objection, digest: str
) -> Decision | None:
    """Return the refusal of all rules that object; of those that broke, where none objects."""
    objecting: list[Rule] = []
    broken: list[Rule] = []
    reasons: list[str] = []
    for rule in rules.candidates(request):
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
        judged=request,
        rules=tuple(rule.id for rule in (objecting or broken)[:MAX_TOLD]),
        message=next((rule.message for rule in objecting if rule.message), _DENIED),
        reasons=tuple(reasons[:MAX_TOLD]),
        policy_digest=digest,
    )


def _forbids(rule: Rule, request: AccessRequest) -> str:
    return f"deny {rule.id!r} matched" if holds(rule.match, request) else ""


def _falls_short(rule: Rule, request: AccessRequest) -> str:
    if (rule.match and not holds(rule.match, request)) or holds(rule.that, request):
        return ""
    failing = first_failing(rule.that, request)
    return f"require {rule.id!r} is not met at {_why(failing, request)}"


# --- allows --------------------------------------------------------------------------------------


def _allow(
    rules: RuleIndex, request: AccessRequest, obligations: Obligations | None, digest: str
) -> Decision:
    has_phi = bool(request.labels) and any(map(is_phi, request.labels))
    if has_phi and not request.provider.phi:
        provider = request.call.provider
        return Decision(
            verdict=Verdict.DENY,
            judged=request,
            rules=(PHI,),
            message=_NOT_ELIGIBLE,
            reasons=(f"provider {provider!r} is not configured as eligible: phi: true",),
            policy_digest=digest,
        )
    candidates = rules.candidates(request)
    if has_phi:
        candidates = [rule for rule in candidates if rule.authorises_phi]
    broken: list[str] = []
    for rule in candidates:
        try:
            if holds(rule.match, request):
                return Decision(
                    verdict=Verdict.ALLOW,
                    judged=request,
                    rules=(rule.id,),
                    policy_digest=digest,
                    obligations=obligations,
                )
        except Exception as error:  # noqa: BLE001 - an allow that fails does not match
            broken.append(f"allow {rule.id!r} failed: {type(error).__name__}")
    near = candidates or [rule for rule in rules if rule.authorises_phi or not has_phi]
    return Decision(
        verdict=Verdict.ERROR if broken else Verdict.DENY,
        judged=request,
        rules=(PHI,) if has_phi else (),
        message=_DENIED,
        reasons=(*broken[:MAX_TOLD], _nearest(near[:MAX_EXPLAINED], request, has_phi=has_phi)),
        policy_digest=digest,
    )


def first_failing(conditions: Sequence[Condition], request: AccessRequest) -> Condition | None:
    """Return the first condition that does not hold, or cannot be evaluated."""
    for condition in conditions:
        try:
            if not condition.holds(request):
                return condition
        except Exception:  # noqa: BLE001 - only an explanation is at stake
            return condition
    return None


def _why(condition: Condition | None, request: AccessRequest) -> str:
    return condition.failing(request) if condition is not None else "nothing"


def _nearest(allows: Sequence[Rule], request: AccessRequest, *, has_phi: bool) -> str:
    """Say which allow came closest and where it failed: the operator's next step."""
    what = "allow rule that authorises PHI" if has_phi else "allow rule"
    if not allows:
        return f"there is no {what}"

    def conditions_met(rule: Rule) -> int:
        failing = first_failing(rule.match, request)
        return rule.match.index(failing) if failing is not None else len(rule.match)

    nearest = max(allows, key=conditions_met)
    failing = first_failing(nearest.match, request)
    what = "allow that authorises PHI" if has_phi else "allow"
    return f"no {what} matched; nearest is {nearest.id!r}, which failed at {_why(failing, request)}"
