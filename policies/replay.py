"""Old decisions, asked again of another policy set: who would newly be denied, who newly allowed.

A question is asked with its own instant and address, as it was recorded. What changes in such a way
has not been tried on anybody. No I/O.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from policies.engine import decide
from policies.facts import TRUNCATED, from_record
from policies.rules import PolicySet

MAX_EXAMPLES: Final = 3
"""Calls that are named of each group; the others are counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One decision as it was recorded; `facts` are empty where it came to none."""

    call: str
    allowed: bool
    rules: tuple[str, ...]
    facts: dict[str, Any]


@dataclass(slots=True)
class Group:
    """Calls that change in one way: same direction, tenant and rules."""

    now: str
    tenant: str
    before: tuple[str, ...]
    rules: tuple[str, ...]
    reason: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return one line."""
        calls = ", ".join(self.examples) + (", …" if self.count > len(self.examples) else "")
        before = ", ".join(self.before) or "default"
        rules = ", ".join(self.rules) or "default"
        return (
            f"{self.now}: {self.count} of tenant {self.tenant!r}, before by {before}, now by {rules}: "
            f"{self.reason} [{calls}]"
        )


@dataclass(slots=True)
class Report:
    """What a candidate would have decided otherwise.

    `unreadable` calls have facts that are none any more; `approximate` ones had more tools or the
    like than a record holds, so that their answer is one of what was recorded.
    """

    decisions: int = 0
    unreadable: int = 0
    approximate: int = 0
    groups: dict[tuple[Any, ...], Group] = field(default_factory=dict)

    def total(self, now: str) -> int:
        """Return how many calls would newly be `denied` or `allowed`."""
        return sum(group.count for group in self.groups.values() if group.now == now)

    def in_order(self) -> list[Group]:
        """Return the groups, the largest first."""
        return sorted(self.groups.values(), key=lambda group: (-group.count, str(group)))

    def to_lines(self) -> Iterator[str]:
        """Yield the report in words."""
        yield f"{self.decisions} decisions replayed"
        yield f"newly denied  {self.total('denied')}"
        yield f"newly allowed {self.total('allowed')}"
        if self.unreadable:
            yield f"not replayed  {self.unreadable}: their facts are of another version"
        if self.approximate:
            yield f"approximate   {self.approximate}: they had more tools than a record holds"
        yield from (f"  {group}" for group in self.in_order())

    def to_json(self) -> dict[str, object]:
        """Return the report as plain values."""
        return {
            "decisions": self.decisions,
            "newly_denied": self.total("denied"),
            "newly_allowed": self.total("allowed"),
            "unreadable": self.unreadable,
            "approximate": self.approximate,
            "groups": [
                {
                    "now": group.now,
                    "tenant": group.tenant,
                    "before": list(group.before),
                    "rules": list(group.rules),
                    "reason": group.reason,
                    "count": group.count,
                    "calls": group.examples,
                }
                for group in self.in_order()
            ],
        }


def replay(decisions: Iterable[Recorded], candidate: PolicySet) -> Report:
    """Return what `candidate` would have decided otherwise."""
    report = Report()
    for recorded in decisions:
        if not recorded.facts:
            continue
        try:
            request = from_record(recorded.facts)
        except ValueError:
            report.unreadable += 1
            continue
        report.decisions += 1
        report.approximate += TRUNCATED in recorded.facts
        decision = decide(candidate, request)
        if decision.is_allowed == recorded.allowed:
            continue
        now = "allowed" if decision.is_allowed else "denied"
        tenant = request.principal.tenant
        key = (now, tenant, recorded.rules, decision.rules)
        group = report.groups.get(key)
        if group is None:
            reason = decision.reasons[0] if decision.reasons else "an allow matches"
            group = report.groups[key] = Group(now, tenant, recorded.rules, decision.rules, reason)
        group.count += 1
        if len(group.examples) < MAX_EXAMPLES:
            group.examples.append(recorded.call)
    return report
