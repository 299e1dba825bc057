"""What replicas leave for each other in the shared store: sessions, events, kills; all authenticated.

A session is kept as MessagePack of who opened it and its sealed record; nothing in it opens a key
without the session token. Events are what every replica must hear, in one order. No I/O.
"""

from dataclasses import replace
from typing import TypeVar

import msgspec

from gateway.store.sessions import Entry
from keys.deployment import Authenticator
from keys.errors import Forged
from keys.session import SessionRecord
from policies.request import Principal


class Dropped(msgspec.Struct, frozen=True, kw_only=True, tag="dropped"):
    """A session ended; the replica `by` told its own workers itself."""

    session_id: str
    reason: str
    by: str


class Changed(msgspec.Struct, frozen=True, kw_only=True, tag="changed"):
    """A session has another revision; the replica `by` told its own workers itself."""

    session_id: str
    by: str


class KillPlaced(msgspec.Struct, frozen=True, kw_only=True, tag="kill-placed"):
    """From now on this kill stands; what `data` means is for who placed it."""

    kill_id: str
    data: bytes


class KillLifted(msgspec.Struct, frozen=True, kw_only=True, tag="kill-lifted"):
    """The kill stands no more."""

    kill_id: str


Event = Dropped | Changed | KillPlaced | KillLifted


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    principal: Principal
    record: SessionRecord
    label: str


T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_kept: msgspec.msgpack.Decoder[_Kept] = msgspec.msgpack.Decoder(_Kept)
_event: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


class Words:
    """Puts things into the authenticated form and reads them back.

    Everything that reads raises `keys.errors.Forged` for what no replica of this deployment said, or
    none that speaks as this one does.
    """

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    def from_entry(self, entry: Entry) -> bytes:
        """Return what is kept of a session."""
        kept = _Kept(principal=entry.principal, record=entry.record, label=entry.label)
        body = _encoder.encode(kept)
        return self._authenticator.protect("session", entry.record.session_id, body)

    def to_entry(self, session_id: str, data: bytes, used_at: float) -> Entry:
        """Return the session; when it was used is not among what is kept."""
        kept = self._read(_kept, "session", session_id, data)
        return Entry(kept.principal, kept.record, kept.label, used_at)

    def from_about(self, entry: Entry) -> bytes:
        """Return what the end of a session is recorded from: nothing of its keys, not even sealed."""
        record = replace(entry.record, credentials=())
        body = _encoder.encode(_Kept(principal=entry.principal, record=record, label=entry.label))
        return self._authenticator.protect("about", record.session_id, body)

    def to_about(self, session_id: str, data: bytes) -> Entry:
        """Return the session without its keys."""
        kept = self._read(_kept, "about", session_id, data)
        return Entry(kept.principal, kept.record, kept.label, 0.0)

    def from_event(self, event: Event) -> bytes:
        """Return the event as it is published."""
        return self._authenticator.protect("event", "", _encoder.encode(event))

    def to_event(self, data: bytes) -> Event:
        """Return the event."""
        return self._read(_event, "event", "", data)

    def from_kill(self, kill_id: str, data: bytes) -> bytes:
        """Return the kill as it stands."""
        return self._authenticator.protect("kill", kill_id, data)

    def to_kill(self, kill_id: str, data: bytes) -> bytes:
        """Return the kill's data."""
        return self._authenticator.reveal("kill", kill_id, data)

    def _read(self, decoder: msgspec.msgpack.Decoder[T], kind: str, name: str, data: bytes) -> T:
        try:
            return decoder.decode(self._authenticator.reveal(kind, name, data))
        except msgspec.DecodeError:  # of a replica whose version has other words
            raise Forged from None
