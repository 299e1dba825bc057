"""Session tokens: a JWT that the gateway signs, with the session secret S as a private claim.

The whole token is the caller's half of a split key; it is verified like any JWT on every call. What
is cached is the hash of the whole token and its public claims, never S: S is read from the token
that the caller sends again with each call.

No I/O.
"""

import base64
import binascii
import hashlib
from collections import OrderedDict
from typing import Final

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from gateway.errors import Refused
from gateway.identity.slots import SESSION_TOKEN_PREFIX
from keys.envelope import SECRET_BYTES, Buffer

AUDIENCE: Final = "veklom"
_HEADERS = {"alg": "EdDSA", "typ": "veklom-session+jwt"}

MAX_CACHED: Final = 10_000
"""About 2 MB; more live sessions than that on one worker verify a signature more often."""


class SessionClaims(msgspec.Struct, frozen=True):
    """The public claims of a session token; `expires_at` in seconds since the epoch."""

    session_id: str
    generation: int
    subject: str
    expires_at: int


class _SecretClaim(msgspec.Struct):
    s: str


_secret_decoder = msgspec.json.Decoder(_SecretClaim)


def session_secret(token: bytes) -> bytes:
    """Return S of a session token that `SessionTokenVerifier` has accepted.

    Raises:
        Refused: There is none in it.
    """
    payload = token.split(b".", 2)[1]
    try:
        claims = base64.urlsafe_b64decode(payload + b"=" * (-len(payload) % 4))
        secret = base64.urlsafe_b64decode(_secret_decoder.decode(claims).s + "=")
    except (msgspec.DecodeError, binascii.Error, ValueError):
        raise Refused("invalid_session_token", "The session token is not valid.") from None
    if len(secret) != SECRET_BYTES:
        raise Refused("invalid_session_token", "The session token is not valid.")
    return secret


class SessionTokenIssuer:
    """Signs session tokens; lives in the control process only."""

    def __init__(self, deployment: str, seed: Buffer) -> None:
        """Take the 32-byte seed of the signing key: tokens outlive the process that signed them."""
        self._deployment = deployment
        self._key = Ed25519PrivateKey.from_private_bytes(seed)

    def __repr__(self) -> str:
        """Return the name only."""
        return f"SessionTokenIssuer({self._deployment})"

    @property
    def public_key(self) -> bytes:
        """Return the raw public key, for the workers."""
        return self._key.public_key().public_bytes_raw()

    def mint(  # noqa: PLR0913 - one argument for each claim
        self,
        *,
        session_id: str,
        generation: int,
        subject: str,
        tenant: str,
        secret: bytearray,
        now: int,
        expires_at: int,
    ) -> str:
        """Return the token of one generation of a session."""
        claims = {
            "iss": self._deployment,
            "aud": AUDIENCE,
            "sub": subject,
            "tenant": tenant,
            "sid": session_id,
            "gen": generation,
            "iat": now,
            "exp": expires_at,
            "s": base64.urlsafe_b64encode(secret).decode().rstrip("="),
        }
        token = jwt.encode(claims, self._key, algorithm="EdDSA", headers=_HEADERS)
        assert token.encode().startswith(SESSION_TOKEN_PREFIX)  # noqa: S101 - a contract with `slots`
        return token


class SessionTokenVerifier:
    """Verifies session tokens with the public key of this gateway's issuer."""

    def __init__(self, public_key: bytes, deployment: str) -> None:
        self._key = Ed25519PublicKey.from_public_bytes(public_key)
        self._deployment = deployment
        self._cache: OrderedDict[bytes, SessionClaims] = OrderedDict()

    def verify(self, token: bytes, now: float) -> SessionClaims:
        """Return the claims of a token that is ours and still valid at `now`.

        Raises:
            Refused: It is not, or no longer.
        """
        digest = hashlib.sha256(token).digest()
        claims = self._cache.get(digest)
        if claims is None:
            claims = self._decode(token)
            self._cache[digest] = claims
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        if claims.expires_at <= now:
            raise Refused("session_expired", "The session has expired.")
        return claims

    def _decode(self, token: bytes) -> SessionClaims:
        try:
            decoded = jwt.decode(
                token,
                self._key,
                algorithms=["EdDSA"],
                audience=AUDIENCE,
                issuer=self._deployment,
                options={
                    "require": ["exp", "iat", "iss", "aud", "sub", "sid", "gen", "s"],
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
            return msgspec.convert(
                {
                    "session_id": decoded["sid"],
                    "generation": decoded["gen"],
                    "subject": decoded["sub"],
                    "expires_at": decoded["exp"],
                },
                SessionClaims,
            )
        except (jwt.PyJWTError, msgspec.ValidationError):
            raise Refused("invalid_session_token", "The session token is not valid.") from None
