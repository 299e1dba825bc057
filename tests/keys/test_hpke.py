"""Sealed deposits open once, for one deployment, one key and one caller, and only for a while."""

import hashlib
import struct
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PublicKey, Suite
from hypothesis import given
from hypothesis import strategies as st

from keys.errors import AlreadyOpened, CustodyError, DoesNotOpen, TooManyOpened, UnknownDepositKey
from keys.hpke import (
    LIFETIME_SECONDS,
    ROTATION_SECONDS,
    DepositKey,
    DepositKeyRing,
    Kem,
    SealedDeposit,
    deposit_info,
)

NOW = 1_000_000.0
PLAIN = b'{"openai":"sk-planted"}'


def seal(
    key: DepositKey,
    audience: str = "test",
    issuer: str = "https://idp",
    subject: str = "alice",
    plain: bytes = PLAIN,
) -> SealedDeposit:
    """Seal as a client would, from what is published and documented alone."""
    parts = [b"veklom deposit v1", *map(str.encode, (audience, key.kid, issuer, subject))]
    info = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    public: X25519PublicKey | MLKEM768X25519PublicKey
    if key.kem == "x25519":
        kem, public = KEM.X25519, X25519PublicKey.from_public_bytes(key.public)
    else:
        kem = KEM.MLKEM768_X25519
        public = MLKEM768X25519PublicKey(
            MLKEM768PublicKey.from_public_bytes(key.public[:1184]),
            X25519PublicKey.from_public_bytes(key.public[1184:]),
        )
    sealed = Suite(kem, KDF.HKDF_SHA256, AEAD.AES_256_GCM).encrypt(plain, public, info)
    return SealedDeposit(kid=key.kid, kem=key.kem, ciphertext=sealed)


@pytest.fixture
def ring() -> DepositKeyRing:
    """A ring of a deployment named `test`."""
    return DepositKeyRing("test")


def open_for_alice(ring: DepositKeyRing, sealed: SealedDeposit, now: float = NOW) -> bytearray:
    """Open as the caller that everything is sealed for."""
    return ring.open(sealed, "https://idp", "alice", now)


@pytest.fixture(params=list(Kem))
def key(ring: DepositKeyRing, request: pytest.FixtureRequest) -> DepositKey:
    """The newest key of each kind."""
    (key,) = [key for key in ring.current(NOW) if key.kem is request.param]
    return key


def test_opens_once(ring: DepositKeyRing, key: DepositKey) -> None:
    """What was sealed comes out, the first time."""
    sealed = seal(key)
    assert open_for_alice(ring, sealed) == PLAIN
    with pytest.raises(AlreadyOpened):
        open_for_alice(ring, sealed)


def test_the_same_keys_sealed_again_open(ring: DepositKeyRing, key: DepositKey) -> None:
    """Single use is of a ciphertext, not of what is in it."""
    assert open_for_alice(ring, seal(key)) == open_for_alice(ring, seal(key))


@pytest.mark.parametrize(
    "other", [{"audience": "prod"}, {"issuer": "https://other"}, {"subject": "bob"}]
)
def test_opens_for_nobody_else(
    ring: DepositKeyRing, key: DepositKey, other: dict[str, Any]
) -> None:
    """Sealed for another deployment, issuer or subject, it does not open."""
    with pytest.raises(DoesNotOpen):
        open_for_alice(ring, seal(key, **other))


@pytest.mark.parametrize("bit", [0, 7, 8 * 40, -8, -1])
def test_an_altered_deposit_does_not_open(ring: DepositKeyRing, key: DepositKey, bit: int) -> None:
    """A single bit, wherever it is, is enough; and the genuine one opens afterwards."""
    sealed = seal(key)
    altered = bytearray(sealed.ciphertext)
    altered[bit // 8] ^= 1 << (bit % 8)
    spoilt = SealedDeposit(kid=key.kid, kem=key.kem, ciphertext=bytes(altered))
    with pytest.raises(DoesNotOpen):
        open_for_alice(ring, spoilt)
    assert open_for_alice(ring, sealed) == PLAIN


def test_the_other_kind_does_not_open(ring: DepositKeyRing, key: DepositKey) -> None:
    """A key's id goes with its kind."""
    with pytest.raises(UnknownDepositKey):
        open_for_alice(ring, SealedDeposit(kid=key.kid, kem="p256", ciphertext=b""))


def test_keys_rotate_and_die(ring: DepositKeyRing, key: DepositKey) -> None:
    """After half its life a key is published no more, and after all of it opens nothing."""
    first, second, third = seal(key), seal(key), seal(key)
    assert key in ring.current(NOW + ROTATION_SECONDS - 1)
    later = ring.current(NOW + ROTATION_SECONDS)
    assert key.kid not in {each.kid for each in later}
    assert open_for_alice(ring, first, NOW + ROTATION_SECONDS) == PLAIN
    assert open_for_alice(ring, second, NOW + LIFETIME_SECONDS - 1) == PLAIN
    with pytest.raises(UnknownDepositKey):
        open_for_alice(ring, third, NOW + LIFETIME_SECONDS)
    assert len(ring._keys) == len(ring._opened) == len(later)


def test_a_ring_that_nobody_asked_for_long(ring: DepositKeyRing, key: DepositKey) -> None:
    """After a pause there are fresh keys, and none of the old."""
    fresh = ring.current(NOW + 10 * LIFETIME_SECONDS)
    assert {each.kid for each in fresh}.isdisjoint({key.kid})
    assert len(ring._keys) == len(fresh) == len(Kem)


def test_what_is_remembered_is_bounded() -> None:
    """When no more can be remembered nothing is opened, until the keys are gone."""
    ring = DepositKeyRing("test", max_opened=2)
    key = ring.current(NOW)[0]
    for _ in range(2):
        open_for_alice(ring, seal(key))
    with pytest.raises(TooManyOpened):
        open_for_alice(ring, seal(key))
    later = NOW + LIFETIME_SECONDS
    assert open_for_alice(ring, seal(ring.current(later)[0]), later) == PLAIN


def test_only_what_opened_is_remembered(ring: DepositKeyRing, key: DepositKey) -> None:
    """Junk takes no place."""
    for junk in (b"", b"x" * 16, bytes(32), bytes(5000)):
        with pytest.raises(DoesNotOpen):
            open_for_alice(ring, SealedDeposit(kid=key.kid, kem=key.kem, ciphertext=junk))
    assert not ring._opened[key.kid]


@given(st.binary(max_size=2000))
def test_junk_does_not_open(junk: bytes) -> None:
    """Whatever the bytes, they are refused as what they are."""
    ring = DepositKeyRing("test")
    for key in ring.current(NOW):
        with pytest.raises(DoesNotOpen):
            open_for_alice(ring, SealedDeposit(kid=key.kid, kem=key.kem, ciphertext=junk))


@given(
    st.lists(st.text(max_size=5), min_size=4, max_size=4),
    st.lists(st.text(max_size=5), min_size=4, max_size=4),
)
def test_no_two_bindings_are_alike(one: list[str], other: list[str]) -> None:
    """Parts that run together differently are bound differently."""
    assert (deposit_info(*one) == deposit_info(*other)) is (one == other)


def test_says_nothing(ring: DepositKeyRing, key: DepositKey) -> None:
    """Neither a key nor an error prints more than an id."""
    assert repr(key) == f"DepositKey({key.kid})"
    assert key.kid == hashlib.sha256(key.kem.encode() + b"\0" + key.public).hexdigest()[:16]
    with pytest.raises(CustodyError) as raised:
        open_for_alice(ring, seal(key, subject="bob"))
    assert "planted" not in repr(raised.value)
    assert raised.value.__suppress_context__
