"""What replicas leave for each other comes out as it went in, or not at all."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.store.sessions import Entry
from gateway.store.words import Changed, Dropped, Event, KillLifted, KillPlaced, Words
from keys.deployment import Authenticator
from keys.errors import Forged
from keys.session import SealedCredential, SessionRecord
from policies.request import Principal

AUTHENTICATOR = Authenticator(b"k" * 32, "space")
WORDS = Words(AUTHENTICATOR)
TEXT = st.text(max_size=9)
COUNT = st.integers(0, 2**53)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(Dropped, session_id=TEXT, reason=TEXT, by=TEXT),
    st.builds(Changed, session_id=TEXT, by=TEXT),
    st.builds(KillPlaced, kill_id=TEXT, data=st.binary(max_size=9)),
    st.builds(KillLifted, kill_id=TEXT),
)
ENTRIES = st.builds(
    Entry,
    principal=st.builds(
        Principal, issuer=TEXT, subject=TEXT, tenant=TEXT, roles=st.frozensets(TEXT, max_size=3)
    ),
    record=st.builds(
        SessionRecord,
        session_id=TEXT, tenant=TEXT, issuer=TEXT, subject=TEXT,
        generation=COUNT, revision=COUNT, created_at=COUNT, expires_at=COUNT, idle_seconds=COUNT,
        credentials=st.lists(
            st.builds(
                SealedCredential, provider=TEXT, revision=COUNT, sealed=st.binary(max_size=50)
            ),
            max_size=2,
        ).map(tuple),
    ),
    label=TEXT,
    used_at=st.just(5.0),
)  # fmt: skip


@given(EVENTS)
def test_events_come_out_as_they_went_in(event: Event) -> None:
    """Every replica reads what one of them said."""
    assert WORDS.to_event(WORDS.from_event(event)) == event


@given(ENTRIES)
def test_sessions_come_out_as_they_went_in(entry: Entry) -> None:
    """A record is whole; what its end is recorded from holds no key, not even a sealed one."""
    session_id = entry.record.session_id
    assert WORDS.to_entry(session_id, WORDS.from_entry(entry), 5.0) == entry
    about = WORDS.from_about(entry)
    assert WORDS.to_about(session_id, about).record == replace(entry.record, credentials=())
    for sealed in (each.sealed for each in entry.record.credentials if len(each.sealed) > 8):
        assert sealed not in about


@given(ENTRIES, EVENTS)
def test_nothing_passes_for_something_else(entry: Entry, event: Event) -> None:
    """A session under another id, an end as a session, a kill as an event: none is believed."""
    session_id = entry.record.session_id
    kept, about, said = WORDS.from_entry(entry), WORDS.from_about(entry), WORDS.from_event(event)
    for read in (
        lambda: WORDS.to_entry(session_id + "x", kept, 0.0),
        lambda: WORDS.to_entry(session_id, about, 0.0),
        lambda: WORDS.to_about(session_id, kept),
        lambda: WORDS.to_event(kept),
        lambda: WORDS.to_kill("", said),
        lambda: Words(Authenticator(b"k" * 32, "other")).to_event(said),
    ):
        with pytest.raises(Forged):
            read()


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x81\xa4type\xa3new"])
def test_what_another_version_said_is_refused(body: bytes) -> None:
    """A replica that does not understand a word does not act on it."""
    with pytest.raises(Forged):
        WORDS.to_event(AUTHENTICATOR.protect("event", "", body))
    with pytest.raises(Forged):
        WORDS.to_entry("id", AUTHENTICATOR.protect("session", "id", body), 0.0)
