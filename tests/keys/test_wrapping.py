"""What processes hold of a session opens neither with its token nor with another host's key."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.errors import UnsealFailed
from keys.session import SealedCredential, SessionRecord
from keys.wrapping import WRAPPING_BYTES, Wrapping

HERE, ELSEWHERE = Wrapping(b"b" * 32), Wrapping(b"c" * 32)


def record(*sealed: bytes) -> SessionRecord:
    """Return a session of such sealed forms."""
    return SessionRecord(
        session_id="s", tenant="acme", issuer="i", subject="alice", generation=1, revision=1,
        created_at=1, expires_at=2, idle_seconds=3,
        credentials=tuple(
            SealedCredential(provider=str(n), origin="o", fingerprint="f", revision=1, sealed=each)
            for n, each in enumerate(sealed)
        ),
    )  # fmt: skip


@given(st.lists(st.binary(max_size=300), max_size=3))
def test_what_is_wrapped_unwraps(sealed: list[bytes]) -> None:
    """Here, to what it was; meanwhile nothing of it is seen, and no two wrappings are alike."""
    plain = record(*sealed)
    wrapped = HERE.wrap(plain)
    assert HERE.unwrap(wrapped) == plain
    for before, after, again in zip(
        plain.credentials, wrapped.credentials, HERE.wrap(plain).credentials, strict=True
    ):
        assert len(after.sealed) == len(before.sealed) + WRAPPING_BYTES
        assert after.sealed != again.sealed
        assert len(before.sealed) < 8 or before.sealed not in after.sealed


@pytest.mark.parametrize("wrapped", [b"", b"x" * WRAPPING_BYTES, b"x" * 100])
def test_what_was_not_wrapped_here_does_not_unwrap(wrapped: bytes) -> None:
    """Neither another key's nor anything else, however short."""
    with pytest.raises(UnsealFailed):
        HERE.unwrap(record(wrapped))
    with pytest.raises(UnsealFailed):
        HERE.unwrap(ELSEWHERE.wrap(record(wrapped)))
