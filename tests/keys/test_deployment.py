"""A deployment's key: another key for each purpose, and proof of who left something where."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keys.deployment import STORE, TOKEN_SEED, Authenticator, derive
from keys.errors import Forged

KEY = bytes(range(32))
TEXT = st.text(max_size=9)


def test_each_purpose_has_its_own_key() -> None:
    """What is derived depends on key and purpose, is whole, and is none of the keys it came from."""
    derived = [derive(key, purpose) for key in (KEY, bytes(32)) for purpose in (TOKEN_SEED, STORE)]
    assert len({*derived, KEY, bytes(32)}) == 6
    assert all(len(each) == 32 for each in derived)
    # SP 800-56C one-step: SHA-256 of a counter, the key, the purpose.
    assert derive(KEY, b"veklom store authentication v1").hex() == (
        "08934e239d0841135e9d7bdb6748bb097d2861bc4d1e85d3c7b5e009a8e2e58f"
    )


@given(kind=TEXT, name=TEXT, body=st.binary(max_size=99))
def test_what_was_protected_is_revealed(kind: str, name: str, body: bytes) -> None:
    """Whoever holds the key reads back exactly what was left."""
    protected = Authenticator(KEY, "space").protect(kind, name, body)
    assert Authenticator(KEY, "space").reveal(kind, name, protected) == body


@given(
    parts=st.tuples(TEXT, TEXT, TEXT, st.binary(max_size=9)),
    others=st.tuples(TEXT, TEXT, TEXT, st.binary(max_size=9)),
)
def test_nothing_passes_for_something_else(
    parts: tuple[str, str, str, bytes], others: tuple[str, str, str, bytes]
) -> None:
    """Another space, kind, name or body is another thing, however the parts are cut."""
    macs = [
        Authenticator(KEY, space).mac(kind, name, body)
        for space, kind, name, body in (parts, others)
    ]
    assert (macs[0] == macs[1]) == (parts == others)


@given(at=st.integers(0, 32 + 8), bit=st.integers(0, 7))
def test_a_single_bit_is_noticed(at: int, bit: int) -> None:
    """Whatever is altered, or left off, is refused."""
    protected = bytearray(Authenticator(KEY, "s").protect("kind", "name", b"the body!"))
    protected[at] ^= 1 << bit
    for altered in (bytes(protected), bytes(protected[:at])):
        with pytest.raises(Forged):
            Authenticator(KEY, "s").reveal("kind", "name", altered)


def test_another_key_is_another_deployment() -> None:
    """What somebody without the key leaves there is refused; the key is in no repr."""
    protected = Authenticator(bytes(32), "s").protect("kind", "name", b"body")
    with pytest.raises(Forged):
        Authenticator(KEY, "s").reveal("kind", "name", protected)
    assert repr(Authenticator(KEY, "s")) == "Authenticator(s)"
