"""Who and what was touched: the report that an incident asks for. No I/O.

Given a time and what is known (a stolen key's fingerprint, a tenant, a provider, a policy that should
not have been), it tells which calls were made, by whom, in which sessions, and how they ended.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

_CALLS: Final = ("call.start", "call.denied")
_COLUMNS: Final = (
    "ts", "type", "call", "tenant", "issuer", "subject", "session", "provider", "operation", "model",
    "credential", "policy", "client_address", "outcome", "status", "input_tokens", "output_tokens",
    "origin", "seq",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """What to look for; what is empty is not asked. Times are RFC 3339, as events have them."""

    begin: str = ""
    end: str = ""
    tenant: str = ""
    fingerprint: str = ""
    provider: str = ""
    policy: str = ""

    def has(self, event: dict[str, Any]) -> bool:
        """Return whether a call or a session is in it."""
        ts = str(event["ts"])
        fingerprints = [event.get("credential", "")]
        providers = [event.get("provider", "")]
        for each in event.get("credentials", ()):
            fingerprints.append(each["fingerprint"])
            providers.append(each["provider"])
        return (
            (not self.begin or ts >= self.begin)
            and (not self.end or ts < self.end)
            and self.tenant in {"", event.get("tenant")}
            and self.fingerprint in {"", *fingerprints}
            and self.provider in {"", *providers}
            and self.policy in {"", event.get("policy")}
        )


@dataclass(slots=True)
class Affected:
    """What was found."""

    scope: Scope
    rows: list[dict[str, Any]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def collect(cls, events: Iterable[dict[str, Any]], scope: Scope) -> "Affected":
        """Return what of these events is in the scope; ends may stand before their starts."""
        found = cls(scope)
        ends: dict[str, dict[str, Any]] = {}
        for event in events:
            kind = event["type"]
            if kind in {"call.end", "call.unclosed"}:
                ends[event["call"]] = event
            elif kind in _CALLS and scope.has(event):
                found.rows.append(event)
            elif kind == "session.opened" and not scope.policy and scope.has(event):
                found.sessions.append(event)
        found.rows = [_row(each, ends.get(each["call"])) for each in found.rows]
        found.rows.sort(key=lambda row: str(row["ts"]))
        return found

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many calls there were, by each thing that tells them apart."""
        by = (
            "outcome",
            "tenant",
            "subject",
            "session",
            "provider",
            "model",
            "credential",
            "policy",
        )
        counted = {name: dict(Counter(str(row[name]) for row in self.rows)) for name in by}
        counted["hour"] = dict(sorted(Counter(str(row["ts"])[:13] for row in self.rows).items()))
        return counted

    def to_lines(self) -> Iterator[str]:
        """Return the report for a person."""
        scope = self.scope
        asked = {name: value for name in scope.__slots__ if (value := getattr(scope, name))}
        yield f"Scope     {', '.join(f'{name} {value}' for name, value in asked.items()) or 'all'}"
        yield f"Calls     {len(self.rows)}"
        yield f"Sessions  {len(self.sessions)} opened"
        if self.rows:
            yield f"First     {self.rows[0]['ts']}"
            yield f"Last      {self.rows[-1]['ts']}"
        for name, counted in self.counts().items():
            yield f"By {name}"
            yield from (f"  {count:>8}  {value or '(none)'}" for value, count in counted.items())

    def to_json(self) -> str:
        """Return everything, for a program."""
        scope = {name: getattr(self.scope, name) for name in self.scope.__slots__}
        found = {
            "scope": scope, "counts": self.counts(), "calls": self.rows, "sessions": self.sessions,
        }  # fmt: skip
        return json.dumps(found, indent=1)

    def to_csv(self) -> str:
        """Return one line for each call. A text that a spreadsheet would compute is quoted."""
        out = io.StringIO()
        writer = csv.DictWriter(out, _COLUMNS)
        writer.writeheader()
        for row in self.rows:
            writer.writerow({name: _harmless(row[name]) for name in _COLUMNS})
        return out.getvalue()


def _row(event: dict[str, Any], end: dict[str, Any] | None) -> dict[str, Any]:
    row = {name: event.get(name, "") for name in _COLUMNS}
    usage = (end or {}).get("usage", {})
    row["outcome"] = "denied" if event["type"] == "call.denied" else "no end"
    if end is not None:
        row["outcome"] = end.get("outcome", "unclosed")
        row["status"] = end.get("status", "")
    row["input_tokens"], row["output_tokens"] = usage.get("input", 0), usage.get("output", 0)
    return row


def _harmless(value: object) -> object:
    """Callers choose models and subjects: a formula among them is shown, not computed (CWE-1236)."""
    text = str(value)
    return "'" + text if text[:1] in {"=", "+", "-", "@", "\t", "\r"} else value
