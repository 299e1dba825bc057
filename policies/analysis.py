"""What is likely to be a mistake in a set that compiles: rules that can do nothing, or not both.

A finding is advice: it may be wrong about rules that only look alike to it, never about a rule's
effect. Rules are compared by what their conditions say, not by what calls there might be.

No I/O.
"""

import fnmatch
import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from policies.conditions import Condition, is_wild
from policies.document import Fault
from policies.obligations import Change
from policies.request import AccessRequest, ModelCall, Operation, Principal
from policies.rule import Effect, Rule
from policies.rules import PolicySet


@dataclass(frozen=True, slots=True)
class Finding:
    """Advice about one rule; prints as a fault does."""

    rule: Rule
    message: str

    def __str__(self) -> str:
        """Return `path:line:column: warning: …`."""
        place = self.rule.place
        text = f"warning: {self.rule.effect} {self.rule.id!r} {self.message}"
        return str(Fault(place.path, place.line, place.column, text))


def findings(policy_set: PolicySet, *, is_configured: bool = True) -> list[Finding]:
    """Return all advice about a set, in the order of its rules' places.

    Without a configuration nothing is vouched for, and nothing can be said of who meets a rule.
    """
    rules = [rule for rule in policy_set.rules if not rule.is_shadow]
    found = [
        *_unreachable(rules),
        *_redundant(rules),
        *_overlapping(rules),
        *(_met_by_nobody(rules, policy_set) if is_configured else ()),
    ]
    return sorted(
        found, key=lambda each: (each.rule.place.path, each.rule.place.line, each.message)
    )


def _unreachable(rules: Sequence[Rule]) -> Iterator[Finding]:
    denies = [rule for rule in rules if rule.effect is Effect.DENY]
    for rule in rules:
        if rule.effect is not Effect.ALLOW:
            continue
        for deny in denies:
            if covers_all(deny.match, rule.match):
                yield Finding(
                    rule, f"can never allow: deny {deny.id!r} refuses all that it matches"
                )


def _redundant(rules: Sequence[Rule]) -> Iterator[Finding]:
    for effect in (Effect.ALLOW, Effect.DENY):
        alike = [rule for rule in rules if rule.effect is effect]
        for rule in alike:
            for other in alike:
                if other is rule or (rule.authorises_phi and not other.authorises_phi):
                    continue
                if not covers_all(other.match, rule.match):
                    continue
                if other.id > rule.id and covers_all(rule.match, other.match):
                    continue  # the two say the same: told once, of the later
                yield Finding(
                    rule, f"adds nothing: {effect} {other.id!r} matches all that it matches"
                )


def _overlapping(rules: Sequence[Rule]) -> Iterator[Finding]:
    transforms = [rule for rule in rules if rule.change is not None]
    for number, rule in enumerate(transforms):
        for other in transforms[:number]:
            if rule.change is None or other.change is None or _disjoint(rule.match, other.match):
                continue
            for what in _clashes(other.change, rule.change):
                yield Finding(
                    rule,
                    f"is overruled for {what} where transform {other.id!r} applies too; "
                    "let their matches exclude each other",
                )


def _clashes(first: Change, second: Change) -> Iterator[str]:
    for what in ("model", "provider"):
        one, two = getattr(first, what), getattr(second, what)
        if one and two and one != two:
            yield what
    for one_set, two_set in ((first.set, second.set), (first.set_headers, second.set_headers)):
        chosen: dict[str, Any] = dict(one_set)
        for name, value in two_set:
            if name in chosen and chosen[name] != value:
                yield name


def _met_by_nobody(rules: Sequence[Rule], policy_set: PolicySet) -> Iterator[Finding]:
    """Yield what asks of providers what none of those configured is said to be."""
    asked = [
        AccessRequest(
            principal=Principal(issuer="", subject="", tenant=""),
            call=ModelCall(provider=name, operation=Operation.CHAT),
            provider=facts,
        )
        for name, facts in policy_set.known.providers.items()
    ]
    for rule in rules:
        for condition in rule.that or rule.match:
            if not condition.name.startswith("provider.") or not asked:
                continue
            if rule.effect in {Effect.ALLOW, Effect.REQUIRE} and not any(
                map(condition.holds, asked)
            ):
                yield Finding(
                    rule,
                    f"asks for {condition.name} {condition.wanted}, which no configured provider is; "
                    "say so of one in the configuration",
                )


# --- comparing conditions ------------------------------------------------------------------------


def covers_all(wide: Sequence[Condition], narrow: Sequence[Condition]) -> bool:
    """Return whether every call that all of `narrow` match is sure to be matched by all of `wide`."""
    return bool(wide) and all(
        any(covers(each, other) for other in narrow) or _is_all(each) for each in wide
    )


def _is_all(condition: Condition) -> bool:
    """Return whether a condition holds for every call: each has a tenant, a subject, a provider."""
    always = {"tenant", "subject", "issuer", "provider", "operation"}
    return condition.name in always and "*" in condition.patterns


def covers(wide: Condition, narrow: Condition) -> bool:
    """Return whether `wide` is sure to hold wherever `narrow` does."""
    one, two = wide.spec, narrow.spec
    if one == two:
        return bool(one)
    if not one or not two or one[:2] != two[:2]:
        return one[:1] == two[:1] == ("networks",) and _networks_cover(one[1], two[1])
    match one[0]:
        case "text":
            return _patterns_cover(one[2], two[2])
        case "texts":
            parts = (one[2:], two[2:])
            if any(len(part) != 1 or part[0][0] != "any" for part in parts):  # type: ignore[index]
                return False
            return _patterns_cover(one[2][1], two[2][1])  # type: ignore[index]
        case "range":
            return bool(one[2] <= two[2] and two[3] <= one[3])  # type: ignore[operator]
        case _:
            return False


def _patterns_cover(wide: Any, narrow: Any) -> bool:
    return all(
        any(
            pattern in {each, "*"} or (not is_wild(each) and fnmatch.fnmatchcase(each, pattern))
            for pattern in wide
        )
        for each in narrow
    )


def _networks_cover(wide: Any, narrow: Any) -> bool:
    nets = [ipaddress.ip_network(each) for each in wide]
    return all(
        any(
            net.version == other.version and other.subnet_of(net)  # type: ignore[arg-type]
            for net in nets
        )
        for other in map(ipaddress.ip_network, narrow)
    )


def _disjoint(first: Sequence[Condition], second: Sequence[Condition]) -> bool:
    """Return whether no call can match both: some fact is asked to have different values."""
    return any(
        one.name == two.name
        and one.spec[:1] == two.spec[:1] == ("text",)
        and bool(one.exact and two.exact)
        and one.exact.isdisjoint(two.exact)
        for one in first
        for two in second
    )
