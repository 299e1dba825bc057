"""A worker's table of sessions: suspended when nobody could tell it what was closed."""

import pytest

from gateway.clock import SystemClock
from gateway.errors import Refused
from gateway.identity.sessions import SessionTable
from keys.region import SecretRegion
from keys.session import SessionRecord
from keys.vault import SessionVault
from keys.wrapping import Wrapping
from policies.request import Principal

PRINCIPAL = Principal(issuer="i", subject="alice", tenant="acme")


def record(session_id: str) -> SessionRecord:
    """Return a session without credentials."""
    return SessionRecord(
        session_id=session_id, tenant="acme", issuer="i", subject="alice", generation=1, revision=1,
        created_at=1, expires_at=100, idle_seconds=3, credentials=(),
    )  # fmt: skip


@pytest.fixture
def table() -> SessionTable:
    """A table with two sessions."""
    table = SessionTable(
        SessionVault(SecretRegion.open(slots=1, slot_bytes=64), Wrapping(b"b" * 32)), SystemClock()
    )
    table.put(PRINCIPAL, record("one"), label="l", used_at=5.0)
    table.put(PRINCIPAL, record("two"))
    return table


def test_suspended_sessions_are_refused(table: SessionTable) -> None:
    """While suspended no session is found, open or not, and the caller is told to come again."""
    table.suspend()
    for session_id in ("one", "unknown"):
        with pytest.raises(Refused) as refused:
            table.find(session_id)
        assert refused.value.code == "control_unavailable"
        assert refused.value.retry_after_seconds == 1
    table.resume()
    assert table.find("one") is not None
    assert table.find("unknown") is None


def test_use_is_told_once_and_remembered(table: SessionTable) -> None:
    """Touched and live sessions are told of once; when, is kept for the next control process."""
    table.touch("two")
    assert set(table.note_use(["one"], 9.0)) == {"one", "two"}
    assert table.note_use([], 10.0) == ()
    assert (table.used_at("one"), table.used_at("two")) == (9.0, 9.0)


def test_an_earlier_use_does_not_undo_a_later_one(table: SessionTable) -> None:
    """A record that is put again, by a control that knows less, keeps the later use."""
    table.put(PRINCIPAL, record("one"), label="l", used_at=3.0)
    assert table.used_at("one") == 5.0


def test_what_is_dropped_is_gone(table: SessionTable) -> None:
    """A dropped session is neither listed nor told as used."""
    table.touch("one")
    table.drop("one")
    assert [session.record.session_id for session in table.all()] == ["two"]
    assert table.note_use(["one"], 9.0) == ()
    assert table.used_at("one") == 0.0


def test_a_shared_table_serves_nothing_without_a_lease() -> None:
    """Until somebody vouches for what is held, no session is found, and none is asked for."""
    vault = SessionVault(SecretRegion.open(slots=1, slot_bytes=64), Wrapping(b"b" * 32))
    table = SessionTable(vault, SystemClock(), is_shared=True)
    table.put(PRINCIPAL, record("one"))
    with pytest.raises(Refused):
        table.find("one")
    table.resume()
    assert table.find("one") is not None


def test_a_shared_table_knows_what_it_lacks(table: SessionTable) -> None:
    """What is not held, or in an older generation than a token names, may be in the shared store."""
    vault = SessionVault(SecretRegion.open(slots=1, slot_bytes=64), Wrapping(b"b" * 32))
    shared = SessionTable(vault, SystemClock(), is_shared=True)
    shared.put(PRINCIPAL, record("one"))
    assert [shared.must_ask("one", generation) for generation in (0, 1, 2)] == [False, False, True]
    assert shared.must_ask("unknown", 1)
    assert not table.must_ask("unknown", 1)
