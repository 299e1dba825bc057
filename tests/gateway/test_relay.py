"""Relay frames come out as they went in, whatever the chunking; nothing else comes in."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.relay import (
    MAX_FRAME_BYTES,
    Ack,
    DropSession,
    FrameReader,
    Held,
    Hello,
    IssuerAbsent,
    IssuerKeys,
    KeepCounts,
    KeysNeeded,
    Lease,
    LetStand,
    Message,
    PutSession,
    Ready,
    Serve,
    SessionAbsent,
    SessionKey,
    SessionNeeded,
    Snapshot,
    SnapshotRequest,
    Told,
    Touched,
    encode_frame,
)
from keys.session import SealedCredential, SessionRecord
from policies.kills import Kill, Scope
from policies.request import Principal

RECORD = SessionRecord(
    session_id="s", tenant="acme", issuer="i", subject="alice", generation=1, revision=1, created_at=1,
    expires_at=2, idle_seconds=3,
    credentials=(
        SealedCredential(
            provider="p", origin="https://h", sealed=b"\x00\xff", fingerprint="f", revision=1
        ),
    ),
)  # fmt: skip
PRINCIPAL = Principal(issuer="i", subject="alice", tenant="acme", roles=frozenset({"dev"}))
EVERY: list[Message] = [
    SessionNeeded(session_id="ab"),
    SessionAbsent(session_id="ab", is_known=False),
    Lease(until=1.5),
    SessionKey(public_key=bytes(32)),
    PutSession(n=1, principal=PRINCIPAL, record=RECORD, label="l", used_at=1.5),
    DropSession(n=2, session_id="s", reason="closed"),
    LetStand(
        n=3,
        kills=(
            Kill(
                kill_id="k",
                scope=Scope.TENANT,
                value="acme",
                reason="r",
                placed_by="o",
                placed_at=1,
            ),
        ),
    ),
    IssuerKeys(issuer="i", jwks=b"{}"),
    IssuerKeys(issuer="i", jwks=None),
    IssuerAbsent(issuer="i"),
    Serve(),
    KeepCounts(n=2, data={"denied": {"x": 1}}),
    SnapshotRequest(n=3),
    Hello(worker=1, is_fresh=False, kept=KeepCounts(n=2, data={})),
    Held(principal=PRINCIPAL, record=RECORD, label="", used_at=2.0),
    Told(),
    Ready(worker=0, protections={"no_core": ""}),
    Ack(n=1, count=4),
    Touched(session_ids=("a", "b")),
    KeysNeeded(issuer="i", kid="k"),
    Snapshot(n=3, data={"calls": [], "gauges": {"x": 1.5}}),
]


@given(st.lists(st.sampled_from(EVERY), max_size=8), st.data())
def test_any_chunking_gives_the_same_messages(sent: list[Message], data: st.DataObject) -> None:
    """Frames cut and joined anywhere decode to what was sent, in order."""
    stream = b"".join(map(encode_frame, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    reader = FrameReader()
    got: list[Message] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        got += reader.feed(stream[start:end])
    assert got == sent


@pytest.mark.parametrize(
    "raw",
    [
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        b"\x00\x00\x00\x01\xc1",
        b"\x00\x00\x00\x00",
        encode_frame(Ack(n=1)).replace(b"ack", b"akc"),
        encode_frame(Ack(n=1)).replace(b"\xa1n", b"\xa1m"),
    ],
    ids=["too large", "not MessagePack", "empty", "unknown kind", "missing field"],
)
def test_what_is_no_frame_ends_the_link(raw: bytes) -> None:
    """A frame that is too large or not one of ours raises, so that the link is ended."""
    with pytest.raises(ValueError, match="relay frame"):
        FrameReader().feed(raw)
