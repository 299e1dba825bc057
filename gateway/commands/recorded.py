"""Decisions as audit logs hold them, read back for the workbench. It trusts what it reads.

Whoever has to rely on a log verifies it first: `veklom audit verify`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from policies.replay import Recorded

_BY_POLICY: Final = frozenset({"policy_denied", "policy_error"})
_KINDS: Final = (b'"type":"call.start"', b'"type":"call.denied"')


class _Line(msgspec.Struct):
    """The part of an event that says how a call was decided."""

    type: str
    call: str = ""
    tenant: str = ""
    code: str = ""
    rules: tuple[str, ...] = ()
    facts: dict[str, Any] = {}
    would: str = ""
    would_rules: tuple[str, ...] = ()


_decode = msgspec.json.Decoder(_Line).decode


def read_lines(log: Path) -> Iterator[_Line]:
    """Yield the decisions in a log file, or in every one below a folder.

    Raises:
        ValueError: A line is no event.
    """
    files = sorted(log.rglob("*.jsonl")) if log.is_dir() else [log]
    if not files:
        raise ValueError(f"{log}: holds no audit log")
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if any(kind in line for kind in _KINDS):
                    try:
                        yield _decode(line)
                    except msgspec.DecodeError as error:
                        raise ValueError(f"{file}:{number}: {error}") from None


def read_decisions(log: Path) -> Iterator[Recorded]:
    """Yield what policies decided. A call that was refused for something else had been allowed.

    Raises:
        ValueError: A line is no event.
    """
    for line in read_lines(log):
        allowed = line.type == "call.start" or line.code not in _BY_POLICY
        yield Recorded(call=line.call, allowed=allowed, rules=line.rules, facts=line.facts)


def shadow_report(log: Path) -> Iterator[str]:
    """Yield what enforcing the rules in shadow would have changed, as it was recorded.

    Raises:
        ValueError: A line is no event.
    """
    total = 0
    groups: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for line in read_lines(log):
        total += 1
        if line.would:
            key = (line.would, line.tenant, line.would_rules)
            groups.setdefault(key, []).append(line.call)
    yield f"{total} decisions, {sum(map(len, groups.values()))} of them otherwise with rules in shadow"
    for (would, tenant, rules), calls in sorted(groups.items(), key=lambda each: -len(each[1])):
        by = ", ".join(rules) or "default"
        yield f"  would {would}: {len(calls)} of tenant {tenant!r} by {by} [{calls[0]}]"
