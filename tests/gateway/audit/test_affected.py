"""An incident report finds what it is asked for, and nothing else."""

import csv
import io
import json
from typing import Any

import msgspec
import pytest

from gateway.audit.affected import Affected, Scope
from gateway.audit.event import Event
from tests.gateway.audit.conftest import begun, ended


def line(event: Event, at: int, **changed: Any) -> dict[str, Any]:
    """Return an event as it is read from a log."""
    fields = msgspec.to_builtins(event)
    return {
        "ts": f"2026-11-25T10:00:{at:02}.000000Z",
        "origin": "o",
        "seq": at,
        **fields,
        **changed,
    }


EVENTS = [
    line(ended("c1"), 9, usage={"input": 5, "output": 7}),  # of another log, read first
    line(begun("c1"), 1, tenant="acme", credential="f1", provider="openai", policy="p1"),
    line(
        begun("c2"), 2, tenant="evil", credential="f2", provider="gemini", policy="p1", model="=1+1"
    ),
    line(begun("c3"), 3, tenant="acme", credential="f2", provider="openai", policy="p2"),
]


@pytest.mark.parametrize(
    ("scope", "calls"),
    [
        (Scope(), ["c1", "c2", "c3"]),
        (Scope(tenant="acme"), ["c1", "c3"]),
        (Scope(fingerprint="f2"), ["c2", "c3"]),
        (Scope(provider="gemini"), ["c2"]),
        (Scope(policy="p2"), ["c3"]),
        (Scope(begin="2026-11-25T10:00:02", end="2026-11-25T10:00:03"), ["c2"]),
        (Scope(tenant="acme", fingerprint="f9"), []),
    ],
)
def test_scopes(scope: Scope, calls: list[str]) -> None:
    """Every condition narrows the report; all three forms hold the same calls."""
    found = Affected.collect(EVENTS, scope)
    assert [row["call"] for row in found.rows] == calls
    assert [row["call"] for row in json.loads(found.to_json())["calls"]] == calls
    assert [row["call"] for row in csv.DictReader(io.StringIO(found.to_csv()))] == calls
    assert f"Calls     {len(calls)}" in list(found.to_lines())


def test_ends_are_joined_wherever_they_stand() -> None:
    """A call's outcome and tokens come from its end, in whatever log; without one that is said."""
    rows = {row["call"]: row for row in Affected.collect(EVENTS, Scope()).rows}
    assert (rows["c1"]["outcome"], rows["c1"]["output_tokens"]) == ("complete", 7)
    assert rows["c2"]["outcome"] == "no end"


def test_a_spreadsheet_computes_nothing() -> None:
    """A model that looks like a formula is shown as text."""
    rows = list(csv.DictReader(io.StringIO(Affected.collect(EVENTS, Scope()).to_csv())))
    assert rows[1]["model"] == "'=1+1"
