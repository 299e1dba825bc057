"""A sealed credential opens with its own key, for its own binding, and in no other way."""

from dataclasses import fields, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from hypothesis import given
from hypothesis import strategies as st

from keys.envelope import Binding, derive_key_into, seal, unseal_into
from keys.errors import UnsealFailed

BINDING = Binding(
    tenant="acme",
    issuer="https://idp",
    subject="alice",
    provider="openai",
    origin="https://api.openai.com",
    session_id="ab" * 16,
    generation=1,
    revision=1,
    expires_at=2_000_000_000,
)
KEY = bytes(range(32))


def unseal(sealed: bytes, associated_data: bytes, key: bytes = KEY) -> bytes:
    """Return the credential, by way of a buffer."""
    out = bytearray(8192)
    return bytes(out[: unseal_into(key, sealed, associated_data, memoryview(out))])


@given(st.binary(max_size=4096))
def test_what_is_sealed_opens(credential: bytes) -> None:
    """Sealing and unsealing give the credential back, at its own length."""
    data = BINDING.to_associated_data()
    assert unseal(seal(KEY, credential, data), data) == credential


@pytest.mark.parametrize("field", [field.name for field in fields(Binding)])
def test_nothing_bound_may_differ(field: str) -> None:
    """With any one part of the binding changed the credential stays shut."""
    sealed = seal(KEY, b"sk-planted", BINDING.to_associated_data())
    value = getattr(BINDING, field)
    changed: dict[str, Any] = {field: value + 1 if isinstance(value, int) else value + "x"}
    other = replace(BINDING, **changed)
    with pytest.raises(UnsealFailed):
        unseal(sealed, other.to_associated_data())


@given(st.data())
def test_no_bit_may_flip(data: st.DataObject) -> None:
    """One flipped bit anywhere, version and nonce included, and it does not open."""
    bound = BINDING.to_associated_data()
    sealed = bytearray(seal(KEY, b"sk-planted", bound))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(UnsealFailed):
        unseal(bytes(sealed), bound)


@given(st.integers(0, 38))
def test_a_cut_envelope_does_not_open(length: int) -> None:
    """A prefix of an envelope is refused like a forged one."""
    bound = BINDING.to_associated_data()
    with pytest.raises(UnsealFailed):
        unseal(seal(KEY, b"sk-planted", bound)[:length], bound)


@given(st.integers(0, 4), st.text(min_size=1, max_size=8), st.data())
def test_text_cannot_move_between_parts(index: int, text: str, data: st.DataObject) -> None:
    """Bindings that differ only in where one part ends and the next begins do not read alike."""
    names = ["tenant", "issuer", "subject", "provider", "origin", "session_id"]
    cut = data.draw(st.integers(0, len(text) - 1))
    early: dict[str, Any] = {names[index]: text[:cut], names[index + 1]: text[cut:]}
    late: dict[str, Any] = {names[index]: text, names[index + 1]: ""}
    one, other = replace(BINDING, **early), replace(BINDING, **late)
    assert one.to_associated_data() != other.to_associated_data()


def test_the_derivation_is_the_standard_one() -> None:
    """The key is SHA-256(counter ‖ S ‖ purpose, 0, session id), as SP 800-56C 4.1 has it."""
    secret, out = b"s" * 32, bytearray(32)
    derive_key_into(secret, "sid", memoryview(out))
    expected = Hash(SHA256())
    expected.update(b"\0\0\0\1" + secret + b"veklom session credential v1\0sid")
    assert out == expected.finalize()
