"""Session tokens: ours, whole and in time, or refused; the secret in them is never kept."""

import base64
import json

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gateway.errors import Refused
from gateway.identity.session_tokens import (
    AUDIENCE,
    SessionTokenIssuer,
    SessionTokenVerifier,
    session_secret,
)
from gateway.identity.slots import SESSION_TOKEN_PREFIX, find_credentials

SECRET = bytes(range(32))
NOW, EXPIRY = 1000, 2000


@pytest.fixture
def issuer() -> SessionTokenIssuer:
    """Return this gateway's issuer."""
    return SessionTokenIssuer("test", bytes(range(32)))


def mint(issuer: SessionTokenIssuer) -> bytes:
    """Return a valid token."""
    return issuer.mint(
        session_id="ab" * 16,
        generation=3,
        subject="alice",
        tenant="acme",
        secret=bytearray(SECRET),
        now=NOW,
        expires_at=EXPIRY,
    ).encode()


def verifier(issuer: SessionTokenIssuer) -> SessionTokenVerifier:
    """Return a worker's verifier."""
    return SessionTokenVerifier(issuer.public_key, "test")


def test_a_token_gives_claims_and_secret(issuer: SessionTokenIssuer) -> None:
    """The public claims come from the verifier, S from the token itself."""
    token = mint(issuer)
    claims = verifier(issuer).verify(token, NOW)
    assert (claims.session_id, claims.generation, claims.subject) == ("ab" * 16, 3, "alice")
    assert session_secret(token) == SECRET


def test_is_told_by_its_first_segment(issuer: SessionTokenIssuer) -> None:
    """The slots recognise a session token without reading it."""
    token = mint(issuer)
    assert token.startswith(SESSION_TOKEN_PREFIX)
    assert find_credentials([(b"x-api-key", token)]).session_token == token


@pytest.mark.parametrize("index", range(3))
def test_a_changed_segment_is_refused(issuer: SessionTokenIssuer, index: int) -> None:
    """A change in any segment is refused, also when the original is already cached."""
    token, verify = mint(issuer), verifier(issuer).verify
    verify(token, NOW)
    parts = token.split(b".")
    parts[index] = parts[index][:-3] + (b"AAA" if parts[index][-3:] != b"AAA" else b"BBB")
    with pytest.raises(Refused) as caught:
        verify(b".".join(parts), NOW)
    assert caught.value.code == "invalid_session_token"


def test_expires_to_the_second_even_when_cached(issuer: SessionTokenIssuer) -> None:
    """A cached verification does not outlive the token."""
    token, verify = mint(issuer), verifier(issuer).verify
    verify(token, EXPIRY - 1)
    with pytest.raises(Refused) as caught:
        verify(token, EXPIRY)
    assert caught.value.code == "session_expired"


def forged(key: Ed25519PrivateKey | str, algorithm: str, **claims: object) -> bytes:
    """Return a token somebody else made."""
    body = {
        "iss": "test",
        "aud": AUDIENCE,
        "sub": "alice",
        "sid": "ab" * 16,
        "gen": 1,
        "iat": NOW,
        "exp": EXPIRY,
        "s": base64.urlsafe_b64encode(SECRET).decode().rstrip("="),
    }
    body = {name: value for name, value in {**body, **claims}.items() if value is not None}
    return jwt.encode(body, key, algorithm=algorithm).encode()


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "other"},
        {"aud": "other"},
        {"sid": None},
        {"gen": None},
        {"gen": "1"},
        {"exp": None},
        {"exp": "2000"},
        {"s": None},
    ],
)
def test_wrong_claims_are_refused(issuer: SessionTokenIssuer, claims: dict[str, object]) -> None:
    """A token of the right key with a wrong, missing or mistyped claim is refused."""
    with pytest.raises(Refused):
        verifier(issuer).verify(forged(issuer._key, "EdDSA", **claims), NOW)


def test_anothers_key_and_other_algorithms_are_refused(issuer: SessionTokenIssuer) -> None:
    """Neither another key, nor HMAC with the public key, nor no signature at all passes."""
    unsigned = base64.urlsafe_b64encode(json.dumps({"alg": "none"}).encode()).rstrip(b"=")
    tokens = [
        forged(Ed25519PrivateKey.generate(), "EdDSA"),
        forged(issuer.public_key.hex(), "HS256"),
        unsigned + b"." + mint(issuer).split(b".")[1] + b".",
        b"",
        b"..",
        b"not a token",
    ]
    for token in tokens:
        with pytest.raises(Refused):
            verifier(issuer).verify(token, NOW)


def test_the_cache_holds_no_secret(issuer: SessionTokenIssuer) -> None:
    """What is cached is a hash and public claims."""
    token, checked = mint(issuer), verifier(issuer)
    checked.verify(token, NOW)
    assert token.split(b".")[1] not in repr(checked._cache).encode()
    assert "s" not in next(iter(checked._cache.values())).__struct_fields__


@pytest.mark.parametrize("payload", [b"{}", b'{"s":"AAAA"}', b'{"s":1}', b"not json"])
def test_a_token_without_a_whole_secret_has_none(payload: bytes) -> None:
    """A missing, short or mistyped S is refused."""
    with pytest.raises(Refused):
        session_secret(b"e30." + base64.urlsafe_b64encode(payload).rstrip(b"=") + b".x")
