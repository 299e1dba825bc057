"""What a new control process adopts, and what it destroys."""

import pytest

from gateway.relay import Held
from gateway.takeover import settle
from keys.session import SessionRecord
from policies.request import Principal


def held(session_id: str, generation: int = 1, used_at: float = 10.0) -> Held:
    """Return a session as a worker holds it."""
    record = SessionRecord(
        session_id=session_id, tenant="acme", issuer="i", subject="alice", generation=generation,
        revision=generation,
        created_at=1, expires_at=100 + generation, idle_seconds=3, credentials=(),
    )  # fmt: skip
    principal = Principal(issuer="i", subject="alice", tenant="acme")
    return Held(principal=principal, record=record, label="l", used_at=used_at)


@pytest.mark.parametrize(
    ("holdings", "adopted", "half_open"),
    [
        ([], [], []),
        ([[]], [], []),
        ([[held("a")]], [("a", 1)], []),
        ([[held("a"), held("b")], [held("b"), held("a")]], [("a", 1), ("b", 1)], []),
        ([[held("a"), held("b")], [held("a")]], [("a", 1)], ["b"]),
        ([[held("a")], []], [], ["a"]),
        ([[held("a")], [held("b")], []], [], ["a", "b"]),
        ([[held("a", 3)], [held("a", 2)]], [("a", 2)], []),
        ([[held("a", 2)], [held("a", 2)]], [("a", 2)], []),
    ],
    ids=[
        "no worker", "no session", "one worker", "two that agree", "lacking in one",
        "lacking in the other", "nothing in common", "renewed in one", "renewed in both",
    ],
)  # fmt: skip
def test_only_what_all_hold_was_open(
    holdings: list[list[Held]], adopted: list[tuple[str, int]], half_open: list[str]
) -> None:
    """What all hold goes on, in the revision that its owner knows; the rest is destroyed."""
    takeover = settle(holdings)
    found = [(each.record.session_id, each.record.generation) for each in takeover.adopted]
    assert found == adopted
    assert [each.record.session_id for each in takeover.half_open] == half_open


def test_the_latest_use_counts() -> None:
    """A session is as idle as the worker that used it last says."""
    (one,) = settle([[held("a", 2, used_at=5.0)], [held("a", 1, used_at=7.0)]]).adopted
    assert (one.used_at, one.record.generation) == (7.0, 1)
