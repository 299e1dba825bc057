"""Opening, renewing and rotating: the record and the secret open keys together, neither alone."""

from dataclasses import replace

import pytest

from keys.errors import NoCredential, UnsealFailed
from keys.region import SecretRegion
from keys.secret import Secret
from keys.session import (
    Deposit,
    SessionRecord,
    fingerprint,
    renew_session,
    rotate_session,
    seal_session,
)
from keys.vault import SessionVault
from keys.wrapping import Wrapping

BOOT_KEY = b"b" * 32

PLAIN = b"sk-planted-credential"
BLANK = SessionRecord(
    session_id="ab" * 16,
    tenant="acme",
    issuer="https://idp",
    subject="alice",
    generation=1,
    revision=1,
    created_at=1,
    expires_at=100,
    idle_seconds=10,
    credentials=(),
)


def opened() -> tuple[SessionRecord, bytearray]:
    """Return a sealed session of one key."""
    deposit = Deposit(provider="openai", origin="https://api.openai.com", credential=Secret(PLAIN))
    return seal_session(BLANK, [deposit], b"f" * 32)


def use(record: SessionRecord, secret: bytes | bytearray) -> bytes:
    """Return the credential, by the way that a worker takes."""
    vault = SessionVault(SecretRegion.open(slots=2, slot_bytes=4096), Wrapping(BOOT_KEY))
    vault.put(Wrapping(BOOT_KEY).wrap(record), 0.0)
    key = vault.find(record.session_id, "openai", "https://api.openai.com")
    return bytes(vault.compose_head(key, secret, b"", b"").view)


def test_the_record_holds_neither_half_in_clear() -> None:
    """Neither the credential nor the session secret stands in the record."""
    record, secret = opened()
    shown = repr(record).encode() + record.credentials[0].sealed
    assert PLAIN not in shown
    assert bytes(secret) not in shown


def test_every_session_has_its_own_secret() -> None:
    """Two sessions of the same key do not open each other."""
    (first, _), (_, other) = opened(), opened()
    with pytest.raises(UnsealFailed):
        use(first, other)


def test_a_renewed_session_opens_with_the_same_secret() -> None:
    """Renewal keeps secret and credential, counts the generation and moves the expiry."""
    record, secret = opened()
    renewed = renew_session(record, secret, 500)
    assert (renewed.generation, renewed.expires_at) == (2, 500)
    assert use(renewed, secret) == PLAIN


def test_an_earlier_generation_cannot_pass_for_a_later_one() -> None:
    """The old sealed credential does not open in the new record."""
    record, secret = opened()
    renewed = renew_session(record, secret, 500)
    mixed = SessionRecord(
        **{
            name: getattr(renewed, name)
            for name in SessionRecord.__slots__
            if name != "credentials"
        },
        credentials=record.credentials,
    )
    with pytest.raises(UnsealFailed):
        use(mixed, secret)


def test_renewal_needs_the_secret() -> None:
    """Without the session's own secret a session cannot be renewed."""
    record, _ = opened()
    with pytest.raises(UnsealFailed):
        renew_session(record, bytes(32), 500)


def deposit(provider: str = "openai", key: bytes = b"sk-another") -> Deposit:
    """Return another key, as it came in."""
    return Deposit(
        provider=provider, origin="https://api.openai.com", credential=Secret(bytearray(key))
    )


def test_a_rotated_session_opens_the_new_key_with_the_same_secret() -> None:
    """Rotation keeps secret and generation, counts the revision, and names the new key."""
    record, secret = opened()
    rotated = rotate_session(record, secret, [deposit()], b"f" * 32, overlap_seconds=7)
    assert (rotated.generation, rotated.revision) == (1, 2)
    assert rotated.credentials[0].overlap_seconds == 7
    assert use(rotated, secret) == b"sk-another"
    assert rotated.credentials[0].fingerprint != record.credentials[0].fingerprint
    assert use(renew_session(rotated, secret, 500), secret) == b"sk-another"


def test_a_replaced_key_cannot_pass_for_its_successor() -> None:
    """The old sealed form does not open as one of the new revision."""
    record, secret = opened()
    rotated = rotate_session(record, secret, [deposit()], b"f" * 32, overlap_seconds=7)
    old = replace(record.credentials[0], revision=rotated.credentials[0].revision)
    with pytest.raises(UnsealFailed):
        use(replace(rotated, credentials=(old,)), secret)


def test_rotation_leaves_other_keys_as_they_are() -> None:
    """Only the provider that is named gets another key."""
    both = [
        Deposit(provider=name, origin="https://api.openai.com", credential=Secret(PLAIN))
        for name in ("openai", "mistral")
    ]
    record, secret = seal_session(BLANK, both, b"f" * 32)
    rotated = rotate_session(record, secret, [deposit("mistral")], b"f" * 32, overlap_seconds=0)
    assert rotated.credentials[0] == record.credentials[0]
    assert use(rotated, secret) == PLAIN


def test_rotation_needs_the_secret_and_a_key_to_replace() -> None:
    """Without the session's own secret, or for a provider it has no key for, nothing is replaced."""
    record, secret = opened()
    with pytest.raises(UnsealFailed):
        rotate_session(record, bytes(32), [deposit()], b"f" * 32, overlap_seconds=0)
    with pytest.raises(NoCredential):
        rotate_session(record, secret, [deposit("mistral")], b"f" * 32, overlap_seconds=0)


def test_a_fingerprint_names_a_key_and_tells_nothing() -> None:
    """Same key, same name; another key, provider or deployment, another name."""
    name = fingerprint(b"f" * 32, "openai", PLAIN)
    assert name.startswith("v1:")
    assert name == fingerprint(b"f" * 32, "openai", PLAIN)
    others = {
        fingerprint(b"g" * 32, "openai", PLAIN),
        fingerprint(b"f" * 32, "mistral", PLAIN),
        fingerprint(b"f" * 32, "openai", PLAIN + b"x"),
    }
    assert name not in others
    assert len(others) == 3
