"""An issuer's JWT becomes a `Principal`, or is refused. Pure: keys and the time come in.

Laws of this file:
- the issuer is looked up by the token's own claim, and only ever in the configured table;
- the algorithm is one of that issuer's list, asymmetric, and fits the key's type;
- `iss`, `aud`, `exp`, `iat` and `sub` are required; `crit`, `jku`, `x5u` and `jwk` are refused;
- a name given twice in a JSON object is refused: whoever else reads the token might read the other;
- an issuer may only name tenants that its configuration lets it name;
- a verified token is cached by the hash of all of it, and forgotten when the issuer's keys change.

No I/O.
"""

import base64
import binascii
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import jwt
import msgspec

from gateway.errors import Refused
from gateway.identity.slots import MAX_TOKEN_BYTES
from policies.request import Principal

ALGORITHMS: Final = (
    "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA",
)  # fmt: skip
"""Every algorithm that an issuer may be configured with; no symmetric one, and never `none`."""

MAX_JWKS_BYTES: Final = 256 * 1024
MAX_CACHED: Final = 10_000
MAX_CACHE_SECONDS: Final = 60.0
MAX_NAME: Final = 256
"""As long as a subject, tenant or role may be (OIDC Core 2 caps `sub` at 255)."""

_MIN_RSA_BITS = 2048
_KEY_TYPES = ("RSA", "EC", "OKP")
_REQUIRED = ("iss", "aud", "exp", "iat", "sub")
_FORBIDDEN_HEADERS = ("crit", "jku", "x5u", "x5c", "jwk", "b64")
_TYPES = frozenset({"", "jwt", "at+jwt", "application/at+jwt"})


class Issuer(msgspec.Struct, frozen=True, kw_only=True):
    """An identity provider that is trusted, and how its claims are read.

    `tenant_claim` is a path into the claims; `tenants`, where given, are the only ones it may name.
    `tenant` is the constant used instead of a claim. Paths are dotted (`realm_access.roles`); a claim
    whose name holds dots or slashes is found whole first.
    """

    issuer: str
    audiences: tuple[str, ...]
    algorithms: tuple[str, ...] = ("RS256", "PS256", "ES256", "EdDSA")
    tenant: str = ""
    tenant_claim: str = "tenant"
    tenants: tuple[str, ...] = ()
    roles: tuple[str, ...] = ("roles",)
    leeway_seconds: int = 30
    max_lifetime_seconds: int = 24 * 3600


class JwksSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where an issuer's keys come from: a URL, a file, or (neither) its discovery document."""

    issuer: str
    url: str = ""
    file: str = ""
    plain_http: bool = False


class KeysNeeded(Exception):
    """The token names a key of `issuer` that is not here (yet)."""

    def __init__(self, issuer: str, kid: str) -> None:
        super().__init__(issuer, kid)
        self.issuer = issuer
        self.kid = kid


class VerifiedIdentity(msgspec.Struct, frozen=True):
    """Who the token speaks for, and until when."""

    principal: Principal
    expires_at: float


class SigningKey(NamedTuple):
    """A public key, and the one algorithm it is for ("" where its set does not say)."""

    key: Any
    algorithm: str


class KeySet:
    """The signing keys of one issuer, by key id."""

    def __init__(self, keys: Mapping[str, SigningKey]) -> None:
        self._keys = keys

    @classmethod
    def from_json(cls, data: bytes) -> "KeySet":
        """Return the usable keys of a JWK set: signature keys of kinds we accept, RSA of 2048 bits up.

        Raises:
            ValueError: It is no JWK set, or too large.
        """
        if len(data) > MAX_JWKS_BYTES:
            raise ValueError("the key set is too large")
        try:
            listed = json.loads(data)["keys"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError("not a JWK set") from None
        if not isinstance(listed, list):
            raise ValueError("not a JWK set")
        keys: dict[str, SigningKey] = {}
        for each in listed:
            if not isinstance(each, dict) or not _is_for_verifying(each):
                continue
            try:
                key = jwt.PyJWK(each).key
            except (jwt.PyJWTError, ValueError, TypeError, KeyError, NotImplementedError):
                continue  # a key that we cannot use is no reason to lose the others
            if each["kty"] == "RSA" and key.key_size < _MIN_RSA_BITS:
                continue
            keys[str(each.get("kid", ""))] = SigningKey(key, str(each.get("alg") or ""))
        return cls(keys)

    def find(self, kid: str) -> SigningKey | None:
        """Return the key of this id; without an id, the only key there is."""
        if not kid and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(kid)


def _is_for_verifying(jwk: dict[str, Any]) -> bool:
    """Return whether a JWK is a public signature key (RFC 7517 4.2, 4.3) of a kind we accept."""
    if jwk.get("kty") not in _KEY_TYPES or jwk.get("use", "sig") != "sig":
        return False
    operations = jwk.get("key_ops", ["verify"])
    if not isinstance(operations, list) or "verify" not in operations:
        return False
    if not isinstance(jwk.get("alg"), str | None):
        return False
    return "d" not in jwk  # a private key that its set gives away may be anybody's


class TokenVerifier:
    """Verifies the tokens of every configured issuer."""

    def __init__(self, issuers: Sequence[Issuer]) -> None:
        self._issuers = {issuer.issuer: issuer for issuer in issuers}
        self._keys: dict[str, KeySet] = {}
        self._sources: dict[str, bytes] = {}
        self._cache: OrderedDict[bytes, tuple[float, VerifiedIdentity]] = OrderedDict()

    def install_keys(self, issuer: str, jwks: bytes) -> None:
        """Use this key set for the issuer from now on; what its old keys vouched for is forgotten.

        Raises:
            ValueError: It is no JWK set; the old keys stay.
        """
        if self._sources.get(issuer) == jwks:
            return
        keys = KeySet.from_json(jwks)
        self.remove_keys(issuer)
        self._keys[issuer] = keys
        self._sources[issuer] = jwks

    def remove_keys(self, issuer: str) -> None:
        """Forget the issuer's keys, and all that they vouched for."""
        self._keys.pop(issuer, None)
        self._sources.pop(issuer, None)
        stale = [
            digest
            for digest, (_, identity) in self._cache.items()
            if identity.principal.issuer == issuer
        ]
        for digest in stale:
            del self._cache[digest]

    def verify(self, token: bytes, now: float) -> VerifiedIdentity:
        """Return who the token speaks for.

        Raises:
            Refused: It is not valid, for anybody or any more.
            KeysNeeded: Its key is not known here; ask for the issuer's keys and try again.
        """
        digest = hashlib.sha256(token).digest()
        cached = self._cache.get(digest)
        if cached is not None:
            if cached[0] > now:
                return cached[1]
            del self._cache[digest]
        identity = self._verify(token, now)
        self._cache[digest] = (min(identity.expires_at, now + MAX_CACHE_SECONDS), identity)
        if len(self._cache) > MAX_CACHED:
            self._cache.popitem(last=False)
        return identity

    def _verify(self, token: bytes, now: float) -> VerifiedIdentity:
        header, claimed = _unverified(token)
        issuer = self._issuers.get(claimed) if isinstance(claimed, str) else None
        if issuer is None:
            raise Refused("unknown_issuer", "The token's issuer is not trusted here.")
        algorithm, kid = header.get("alg"), header.get("kid", "")
        if algorithm not in issuer.algorithms or algorithm not in ALGORITHMS:
            raise Refused("invalid_token", "The token's algorithm is not accepted.")
        if any(name in header for name in _FORBIDDEN_HEADERS) or not isinstance(kid, str):
            raise Refused("invalid_token", "The token's header is not accepted.")
        if str(header.get("typ", "")).lower() not in _TYPES:
            raise Refused("invalid_token", "The token's type is not accepted.")
        keys = self._keys.get(issuer.issuer)
        key = keys.find(kid) if keys is not None else None
        if key is None:
            raise KeysNeeded(issuer.issuer, kid[:MAX_NAME])
        if key.algorithm not in {"", algorithm}:
            raise Refused("invalid_token", "The token's algorithm is not its key's.")
        claims = _decode(token, key, str(algorithm), issuer)
        return _identity(claims, issuer, now)


def _unverified(token: bytes) -> tuple[dict[str, Any], object]:
    """Return the header and the claimed issuer: enough to look the issuer up, trusted for no more."""
    parts = token.split(b".")
    if len(parts) != 3 or len(token) > MAX_TOKEN_BYTES:
        raise Refused("invalid_token", "The token is not a signed JWT.")
    try:
        header, claims = map(_object, parts[:2])
    except (ValueError, binascii.Error, RecursionError):
        raise Refused("invalid_token", "The token is not a signed JWT.") from None
    if not isinstance(header, dict) or not isinstance(claims, dict):
        raise Refused("invalid_token", "The token is not a signed JWT.")
    return header, claims.get("iss")


def _object(segment: bytes) -> object:
    text = base64.b64decode(segment + b"=" * (-len(segment) % 4), b"-_", validate=True)
    msgspec.json.decode(text)  # refuses what our own records could not hold: lone surrogates, NaN
    return json.loads(text, object_pairs_hook=_members)


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name is given twice")
    return members


def _decode(token: bytes, key: SigningKey, algorithm: str, issuer: Issuer) -> dict[str, Any]:
    try:
        return jwt.decode(
            token,
            key.key,
            algorithms=[algorithm],
            audience=list(issuer.audiences),
            issuer=issuer.issuer,
            options={
                "require": list(_REQUIRED),
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
                "enforce_minimum_key_length": True,
            },
        )
    except jwt.InvalidAudienceError:
        raise Refused("wrong_audience", "The token is meant for somebody else.") from None
    except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
        raise Refused("invalid_token", "The token is not valid.") from None


def _identity(claims: dict[str, Any], issuer: Issuer, now: float) -> VerifiedIdentity:
    expires, issued, begins = (_instant(claims, name) for name in ("exp", "iat", "nbf"))
    leeway = issuer.leeway_seconds
    if expires + leeway <= now:
        raise Refused("token_expired", "The token has expired.")
    if issued - leeway > now or begins - leeway > now:
        raise Refused("invalid_token", "The token is not valid yet.")
    if expires - issued > issuer.max_lifetime_seconds:
        raise Refused("invalid_token", "The token lives longer than is accepted.")
    subject = claims["sub"]
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_NAME:
        raise Refused("invalid_token", "The token's subject is not accepted.")
    principal = Principal(
        issuer=issuer.issuer,
        subject=subject,
        tenant=_tenant(claims, issuer),
        client_id=_text(claims.get("client_id", claims.get("azp", ""))),
        roles=frozenset(role for path in issuer.roles for role in _texts(_at(claims, path))),
        scopes=frozenset(_texts(claims.get("scope", claims.get("scp")))),
        acr=_text(claims.get("acr", "")),
        amr=frozenset(_texts(claims.get("amr"))),
        authenticated_at=int(_instant(claims, "auth_time")),
    )
    return VerifiedIdentity(principal, expires + leeway)


def _instant(claims: dict[str, Any], name: str) -> float:
    value = claims.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**40:
        raise Refused("invalid_token", f"The token's {name} is not an instant.")
    return float(value)


def _tenant(claims: dict[str, Any], issuer: Issuer) -> str:
    if issuer.tenant:
        return issuer.tenant
    tenant = _text(_at(claims, issuer.tenant_claim))
    if not tenant:
        raise Refused("missing_tenant", "The token names no tenant.")
    if issuer.tenants and tenant not in issuer.tenants:
        raise Refused("missing_tenant", "The token's issuer may not speak for its tenant.")
    return tenant


def _at(claims: Mapping[str, Any], path: str) -> object:
    if path in claims:
        return claims[path]
    value: object = claims
    for part in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(part)
    return value


def _text(value: object) -> str:
    return value if isinstance(value, str) and len(value) <= MAX_NAME else ""


def _texts(value: object) -> list[str]:
    """Return the words of a space-separated text, or the texts of a list."""
    values = value.split() if isinstance(value, str) else value
    return [text for text in map(_text, values) if text] if isinstance(values, list) else []
