"""Issuers' tokens: each check has rows that only that check refuses; all else is a `Principal`."""

import base64
import itertools
import json
from collections.abc import Callable
from typing import Any, Final

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm, get_default_algorithms

from gateway.errors import Refused
from gateway.identity import tokens
from gateway.identity.slots import MAX_TOKEN_BYTES
from gateway.identity.tokens import (
    ALGORITHMS,
    MAX_CACHE_SECONDS,
    MAX_JWKS_BYTES,
    MAX_NAME,
    Issuer,
    KeySet,
    KeysNeeded,
    TokenVerifier,
)

NOW: Final = 1_700_000_000
NAME = "https://login.example.com/realm"
OTHER = "https://other.example.com"
ISSUER = Issuer(issuer=NAME, audiences=("veklom",), algorithms=ALGORITHMS, leeway_seconds=30)
ABSENT: Any = object()
"""Stands for a claim or header that the token does not have; None is JSON's null."""

RSA, OTHER_RSA = (rsa.generate_private_key(65537, 2048) for _ in range(2))
ED = ed25519.Ed25519PrivateKey.generate()
P256, P384, P521 = (
    ec.generate_private_key(c) for c in (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1())
)
KOBLITZ = ec.generate_private_key(ec.SECP256K1())
WEAK_RSA = rsa.generate_private_key(65537, 1024)  # noqa: S505 - that it is weak is the point
KEYS: Final[dict[str, Any]] = {"rsa": RSA, "p256": P256, "p384": P384, "p521": P521, "ed": ED}
KID = {
    **dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "rsa"),
    "ES256": "p256",
    "ES384": "p384",
    "ES512": "p521",
    "EdDSA": "ed",
}


def jwk(key: Any, kid: str = "", **members: Any) -> dict[str, Any]:
    """Return the JWK of a key's public half."""
    kinds: dict[type, Any] = {
        rsa.RSAPrivateKey: RSAAlgorithm, ec.EllipticCurvePrivateKey: ECAlgorithm
    }  # fmt: skip
    kind: Any = next((a for k, a in kinds.items() if isinstance(key, k)), OKPAlgorithm)
    known = {"kid": kid} if kid else {}
    public = {**kind.to_jwk(key.public_key(), as_dict=True), **known, **members}
    return {name: value for name, value in public.items() if value is not ABSENT}


def jwks(*keys: Any) -> bytes:
    """Return a JWK set."""
    return json.dumps({"keys": list(keys)}).encode()


ALL_KEYS = jwks(*(jwk(key, kid, key_ops=ABSENT) for kid, key in KEYS.items()))


def verifier(issuer: Issuer = ISSUER, keys: bytes = ALL_KEYS) -> TokenVerifier:
    """Return a verifier that has one issuer and its keys."""
    made = TokenVerifier([issuer])
    made.install_keys(issuer.issuer, keys)
    return made


def segment(part: object) -> bytes:
    """Return a base64url segment: of bytes as they are, of anything else as JSON."""
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def sign(algorithm: str, key: Any, message: bytes) -> bytes:
    """Sign as `algorithm` says, with whatever key: also those that do not fit it."""
    digests: dict[str, Any] = {
        "256": hashes.SHA256, "384": hashes.SHA384, "512": hashes.SHA512
    }  # fmt: skip
    digest = digests.get(algorithm[2:5])
    if isinstance(key, rsa.RSAPrivateKey):
        chosen = (digest or hashes.SHA256)()
        pss = padding.PSS(padding.MGF1(chosen), chosen.digest_size)
        return key.sign(message, pss if algorithm[:2] == "PS" else padding.PKCS1v15(), chosen)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        width = (key.key_size + 7) // 8
        pair = decode_dss_signature(key.sign(message, ec.ECDSA((digest or hashes.SHA256)())))
        return b"".join(part.to_bytes(width, "big") for part in pair)
    if isinstance(key, bytes):
        return bytes(get_default_algorithms()[algorithm].sign(message, key))
    return bytes(key.sign(message))


def raw_token(header: object, claims: object, algorithm: str = "EdDSA", key: Any = ED) -> bytes:
    """Return a token of exactly this header and these claims, correctly signed."""
    message = segment(header) + b"." + segment(claims)
    return message + b"." + segment(sign(algorithm, key, message))


def claims_with(**changes: Any) -> dict[str, Any]:
    """Return good claims with some changed."""
    good = {
        "iss": NAME,
        "aud": "veklom",
        "sub": "alice",
        "tenant": "acme",
        "iat": NOW,
        "exp": NOW + 600,
    }
    return {name: value for name, value in {**good, **changes}.items() if value is not ABSENT}


def token(
    algorithm: str = "EdDSA",
    kid: str | None = None,
    key: Any = None,
    header: dict[str, Any] | None = None,
    **claims: Any,
) -> bytes:
    """Return a good token, but for what is said."""
    kid = KID.get(algorithm, "ed") if kid is None else kid
    fields = {"alg": algorithm, "kid": kid, **(header or {})}
    fields = {name: value for name, value in fields.items() if value is not ABSENT}
    return raw_token(fields, claims_with(**claims), algorithm, key or KEYS[kid])


def code_of(verify: TokenVerifier, made: bytes, now: float = NOW) -> str:
    """Return the code that the token is refused with; also when it comes again."""
    codes = []
    for _ in range(2):
        with pytest.raises(Refused) as caught:
            verify.verify(made, now)
        codes.append(caught.value.code)
    assert codes[0] == codes[1]
    assert not verify._cache
    return codes[0]


def accepts(verify: TokenVerifier, made: bytes, now: float = NOW) -> bool:
    """Return whether the token is accepted."""
    try:
        return bool(verify.verify(made, now))
    except Refused:
        return False


# --- algorithms and keys ---


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_works_where_it_is_listed(algorithm: str) -> None:
    """An issuer with one algorithm has its tokens accepted."""
    only = msgspec.structs.replace(ISSUER, algorithms=(algorithm,))
    assert verifier(only).verify(token(algorithm), NOW).principal.subject == "alice"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_algorithm_works_where_it_is_not_listed(algorithm: str) -> None:
    """A good signature by an algorithm that the issuer does not use is refused."""
    others = tuple(each for each in ALGORITHMS if each != algorithm)
    without = msgspec.structs.replace(ISSUER, algorithms=others)
    assert code_of(verifier(without), token(algorithm)) == "invalid_token"


PEM = RSA.public_key().public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)


@pytest.mark.parametrize(
    "algorithm",
    [
        *("none", "None", "NONE", "nOnE", "", "HS256", "HS384", "HS512", "ES256K", "ES521"),
        *("rs256", "RS256 ", "RS1", "dir", "A128KW", "EDDSA", "Ed25519", "RSA-OAEP"),
    ],
)
@pytest.mark.parametrize("kid", ["rsa", "ed", "k", "oct"])
def test_no_other_algorithm_works_even_if_listed(algorithm: str, kid: str) -> None:
    """Unsigned, symmetric and unlisted kinds stay refused under any configuration and any key."""
    listed = msgspec.structs.replace(ISSUER, algorithms=(algorithm,))
    octets = {"kty": "oct", "kid": "oct", "k": segment(b"k" * 64).decode()}
    keys = jwks(jwk(RSA, "rsa"), jwk(ED, "ed"), jwk(KOBLITZ, "k"), octets)
    message = segment({"alg": algorithm, "kid": kid}) + b"." + segment(claims_with())
    secrets = [b"k" * 64, PEM, ED.public_key().public_bytes_raw() * 2]
    signatures = [b"", KEYS.get(kid, KOBLITZ) and sign("RS256", KEYS.get(kid, KOBLITZ), message)]
    if algorithm.startswith("HS"):
        hmac = get_default_algorithms()[algorithm]
        signatures += [hmac.sign(message, secret) for secret in secrets]
    for signature in signatures:
        made = message + b"." + segment(signature)
        assert code_of(verifier(listed, keys), made) == "invalid_token"


@pytest.mark.parametrize("algorithm", [ABSENT, None, 5, True, [], ["EdDSA"], {}, {"EdDSA": 1}])
def test_an_algorithm_is_a_text(algorithm: Any) -> None:
    """A header without an algorithm, or with something else in its place, is refused."""
    assert code_of(verifier(), token(header={"alg": algorithm})) == "invalid_token"


MISFITS = [(algorithm, kid) for algorithm in ALGORITHMS for kid in KEYS if KID[algorithm] != kid]


@pytest.mark.parametrize(("algorithm", "kid"), MISFITS)
def test_a_key_of_another_kind_is_refused(algorithm: str, kid: str) -> None:
    """A signature by the named key counts for nothing if the algorithm is not for its kind or curve."""
    assert code_of(verifier(), token(algorithm, kid)) == "invalid_token"


BINDINGS = [
    ("RS256", "RS256", True),
    ("PS256", "PS256", True),
    ("RS256", "PS256", False),
    ("PS256", "RS256", False),
    ("RS512", "RS256", False),
    ("RS256", "RS512", False),
    ("PS512", "RS512", False),
    ("RS256", "", True),
    ("RS256", None, True),
    ("PS384", ABSENT, True),
]


@pytest.mark.parametrize(("used", "bound", "is_accepted"), BINDINGS)
def test_a_key_serves_the_algorithm_it_is_for(used: str, bound: Any, is_accepted: bool) -> None:  # noqa: FBT001 - a column of a table
    """A key whose set names its algorithm verifies that one only; RSA keys would fit six."""
    keys = jwks(jwk(RSA, "rsa", alg=bound))
    if is_accepted:
        assert accepts(verifier(keys=keys), token(used))
    else:
        assert code_of(verifier(keys=keys), token(used)) == "invalid_token"


OCTETS = {"kty": "oct", "kid": "a", "k": segment(b"k" * 64).decode()}
UNUSABLE = [
    pytest.param("RS256", WEAK_RSA, jwk(WEAK_RSA, "a"), id="rsa-1024"),
    pytest.param("RS256", RSA, jwk(RSA, "a", use="enc"), id="for-encryption"),
    pytest.param("RS256", RSA, jwk(RSA, "a", use=None), id="use-null"),
    pytest.param("RS256", RSA, jwk(RSA, "a", use=["sig"]), id="use-list"),
    pytest.param("RS256", RSA, jwk(RSA, "a", key_ops=["encrypt"]), id="ops-for-encryption"),
    pytest.param("RS256", RSA, jwk(RSA, "a", key_ops=[]), id="ops-empty"),
    pytest.param("RS256", RSA, jwk(RSA, "a", key_ops="verify"), id="ops-text"),
    pytest.param("RS256", RSA, jwk(RSA, "a", alg="RSA-OAEP"), id="alg-for-encryption"),
    pytest.param("RS256", RSA, RSAAlgorithm.to_jwk(RSA, as_dict=True) | {"kid": "a"}, id="rsa-d"),
    pytest.param("ES256", P256, ECAlgorithm.to_jwk(P256, as_dict=True) | {"kid": "a"}, id="ec-d"),
    pytest.param("EdDSA", ED, OKPAlgorithm.to_jwk(ED, as_dict=True) | {"kid": "a"}, id="okp-d"),
    pytest.param("EdDSA", ED, OCTETS, id="oct"),
    pytest.param("EdDSA", ED, jwk(ED, "a", kty="okp"), id="kty-case"),
    pytest.param("EdDSA", ED, jwk(ED, "a", kty=["OKP"]), id="kty-list"),
    pytest.param("EdDSA", ED, jwk(ED, "a", kty=ABSENT), id="kty-absent"),
    pytest.param("EdDSA", ED, jwk(ED, "a", x="AAAA"), id="x-short"),
    pytest.param("EdDSA", ED, jwk(ED, "a", x=5), id="x-number"),
    pytest.param("EdDSA", ED, jwk(ED, "a", crv="X25519"), id="crv-for-agreement"),
    pytest.param("EdDSA", ED, jwk(ED, "a", crv=[]), id="crv-list"),
    pytest.param("EdDSA", ED, jwk(ED, "a", alg=[]), id="alg-list"),
    pytest.param("EdDSA", ED, jwk(ED, "a", alg={"a": 1}), id="alg-object"),
    pytest.param("ES256", P256, jwk(P256, "a", y=ABSENT), id="y-absent"),
    pytest.param("ES256", P256, jwk(P256, "a", y=jwk(P256)["x"]), id="not-on-the-curve"),
    pytest.param("RS256", RSA, jwk(RSA, "a", n=""), id="n-empty"),
    pytest.param("RS256", RSA, jwk(RSA, "a", e="AA"), id="e-zero"),
    pytest.param("RS256", RSA, jwk(RSA, "a", e=None), id="e-null"),
    pytest.param("EdDSA", ED, ["a"], id="list"),
    pytest.param("EdDSA", ED, None, id="null"),
]


@pytest.mark.parametrize(("algorithm", "key", "published"), UNUSABLE)
def test_an_unusable_key_is_as_good_as_none(algorithm: str, key: Any, published: Any) -> None:
    """A key that must not verify is not used, and the others of its set still are."""
    made = token(algorithm, "a", key)
    checked = verifier(keys=jwks(published, jwk(P384, "b"), published))
    with pytest.raises(KeysNeeded) as caught:
        checked.verify(made, NOW)
    assert (caught.value.issuer, caught.value.kid) == (NAME, "a")
    assert accepts(checked, token("ES384", "b", P384))
    with pytest.raises(KeysNeeded):  # nor is it the only key of a token that names none
        verifier(keys=jwks(published)).verify(token(algorithm, "a", key, {"kid": ABSENT}), NOW)


@pytest.mark.parametrize("key_ops", [ABSENT, ["verify"], ["sign", "verify"]])
@pytest.mark.parametrize("use", [ABSENT, "sig"])
def test_a_key_for_signatures_is_used(use: Any, key_ops: Any) -> None:
    """Both ways of saying what a key is for are understood, and neither is required."""
    assert accepts(verifier(keys=jwks(jwk(ED, "ed", use=use, key_ops=key_ops))), token())


def test_ed448_is_no_ed25519() -> None:
    """A token by a key of the other Edwards curve is either verified by that key or refused."""
    other = ed448.Ed448PrivateKey.generate()
    checked = verifier(keys=jwks(jwk(ED, "a")))
    assert code_of(checked, token(kid="a", key=other)) == "invalid_token"


def test_rsa_of_2048_bits_is_the_least() -> None:
    """2048 bits are accepted; the row of 1024 above is not."""
    assert accepts(verifier(keys=jwks(jwk(RSA, "rsa"))), token("RS256"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_signature_by_anybody_else_is_refused(algorithm: str) -> None:
    """Another key of the same kind, a changed, cut, lengthened or empty signature: none passes."""
    key = KEYS[KID[algorithm]]
    made = token(algorithm)
    message, _, signature = made.rpartition(b".")
    raw = base64.urlsafe_b64decode(signature + b"==")
    another = {
        "rsa": OTHER_RSA,
        "p256": ec.generate_private_key(ec.SECP256R1()),
        "p384": ec.generate_private_key(ec.SECP384R1()),
        "p521": ec.generate_private_key(ec.SECP521R1()),
        "ed": ed25519.Ed25519PrivateKey.generate(),
    }[KID[algorithm]]
    bad = [
        sign(algorithm, another, message),
        sign(algorithm, key, message + b" "),
        b"",
        b"\0" * len(raw),
        raw[:-1],
        raw + b"\0",
        bytes([raw[0] ^ 1]) + raw[1:],
        raw[:-1] + bytes([raw[-1] ^ 1]),
    ]
    checked = verifier()
    for each in bad:
        assert code_of(checked, message + b"." + segment(each)) == "invalid_token"
    assert accepts(checked, made)


def test_a_key_belongs_to_its_issuer() -> None:
    """A trusted issuer's key vouches for nothing in the name of another."""
    other = msgspec.structs.replace(ISSUER, issuer=OTHER)
    both = TokenVerifier([ISSUER, other])
    both.install_keys(NAME, jwks(jwk(ED, "a")))
    both.install_keys(OTHER, jwks(jwk(P256, "a"), jwk(P384, "b")))
    assert accepts(both, token("ES256", "a", P256, iss=OTHER))
    with pytest.raises(Refused) as caught:
        both.verify(token("ES256", "a", P256), NOW)
    assert caught.value.code == "invalid_token"
    with pytest.raises(KeysNeeded):
        both.verify(token("ES384", "b", P384), NOW)


# --- key ids ---


def test_without_a_key_id_the_only_key_is_meant() -> None:
    """A token without `kid` is verified where there is no choice, and nowhere else."""
    made = token(header={"kid": ABSENT})
    assert accepts(verifier(keys=jwks(jwk(ED))), made)
    assert accepts(verifier(keys=jwks(jwk(ED, "a"))), made)
    with pytest.raises(KeysNeeded):
        verifier(keys=jwks(jwk(ED, "a"), jwk(P256, "b"))).verify(made, NOW)


@pytest.mark.parametrize("kid", ["", "other", "ED", "ed ", "a" * 5000])
def test_an_unknown_key_is_asked_for(kid: str) -> None:
    """An id that the set does not hold, byte for byte, is asked for by a bounded name."""
    for checked in (verifier(), TokenVerifier([ISSUER])):
        with pytest.raises(KeysNeeded) as caught:
            checked.verify(token(kid="ed", header={"kid": kid}), NOW)
        assert (caught.value.issuer, caught.value.kid) == (NAME, kid[:MAX_NAME])


@pytest.mark.parametrize("kid", [None, 5, True, [], ["ed"], {}, {"ed": 1}])
def test_a_key_id_is_a_text(kid: Any) -> None:
    """Anything else is refused and never asked for."""
    only = jwks(jwk(ED))
    assert code_of(verifier(keys=only), token(header={"kid": kid})) == "invalid_token"


# --- headers ---


@pytest.mark.parametrize("name", ["crit", "jku", "x5u", "x5c", "jwk", "b64"])
@pytest.mark.parametrize("value", [None, "", [], ["exp"], "https://evil.example/keys", True])
def test_a_header_that_brings_keys_or_rules_is_refused(name: str, value: Any) -> None:
    """Where keys come from and what is understood is configured, never read from a token."""
    assert code_of(verifier(), token(header={name: value})) == "invalid_token"


def test_a_key_in_the_header_is_refused() -> None:
    """A token that brings the key that it was signed with is refused."""
    mine = ed25519.Ed25519PrivateKey.generate()
    assert code_of(verifier(), token(key=mine, header={"jwk": jwk(mine)})) == "invalid_token"


@pytest.mark.parametrize("name", ["x5t", "x5t#S256", "cty", "nonce", "pi.atm"])
def test_a_harmless_header_passes(name: str) -> None:
    """What identity providers add for others is ignored."""
    assert accepts(verifier(), token(header={name: "x"}))


@pytest.mark.parametrize(
    "kind", [ABSENT, "", "JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt"]
)
def test_a_type_of_an_access_or_plain_token_passes(kind: Any) -> None:
    """RFC 7519 5.1 and RFC 9068 2.1, in any case of letters."""
    assert accepts(verifier(), token(header={"typ": kind}))


@pytest.mark.parametrize(
    "kind",
    [
        *("logout+jwt", "dpop+jwt", "secevent+jwt", "veklom-session+jwt", "JOSE", "jwt ", "at"),
        *(None, 5, ["jwt"], {"jwt": 1}, False),
    ],
)
def test_a_token_of_another_type_is_refused(kind: Any) -> None:
    """A token that was issued for something else is no identity."""
    assert code_of(verifier(), token(header={"typ": kind})) == "invalid_token"


# --- claims ---

PATIENT = msgspec.structs.replace(ISSUER, max_lifetime_seconds=2**41)
"""An issuer whose tokens may live long, so that nothing but the row's own check refuses."""


@pytest.mark.parametrize("missing", [ABSENT, None])
@pytest.mark.parametrize("name", ["aud", "exp", "iat", "sub"])
def test_a_required_claim_is_required(name: str, missing: Any) -> None:
    """Without it, or with null in its place, the token is refused."""
    assert code_of(verifier(PATIENT), token(**{name: missing})) == "invalid_token"


_NO_INSTANTS: tuple[Any, ...] = ("", str(NOW), [], {}, True)


@pytest.mark.parametrize(
    "claims",
    [
        *[{name: value} for name in ("exp", "iat", "nbf") for value in _NO_INSTANTS],
        *[{name: [NOW]} for name in ("exp", "iat", "nbf")],
        *[{name: value} for name in ("iat", "nbf") for value in (-1, -0.5, False)],
        {"nbf": None},
        {"exp": 2**40},
        {"exp": 10**400},
        *[{"sub": value} for value in ("", 5, True, [], ["alice"], {"a": 1})],
    ],
)
def test_a_claim_of_another_type_is_refused(claims: dict[str, Any]) -> None:
    """Instants are numbers within reason, a subject is a text."""
    assert code_of(verifier(PATIENT), token(**claims)) == "invalid_token"


@pytest.mark.parametrize(
    "text", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1e400", b"0x10", b"9" * 5000]
)
@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
def test_an_instant_is_a_number_of_json(name: str, text: bytes) -> None:
    """What only Python's reader takes for a number is refused."""
    claims = json.dumps(claims_with(**{name: 5.5})).encode().replace(b"5.5", text)
    made = raw_token({"alg": "EdDSA", "kid": "ed"}, claims)
    assert code_of(verifier(PATIENT), made) == "invalid_token"


@pytest.mark.parametrize(
    "issuer",
    [
        *(NAME + "/", NAME[:-1], NAME.upper(), NAME.replace("https", "http"), " " + NAME),
        *(NAME + "\n", NAME + "\0", NAME.replace("e", "\u0435"), NAME + "?", NAME + "#"),
        *(NAME.replace(".com", ".com:443"), "", OTHER, "urn:veklom:development"),
        *(ABSENT, None, 5, True, [NAME], {NAME: 1}, [], {}),
    ],
)
def test_an_issuer_is_known_byte_for_byte(issuer: Any) -> None:
    """A name that merely resembles a trusted issuer's is nobody's."""
    assert code_of(verifier(), token(iss=issuer)) == "unknown_issuer"


def test_with_no_issuer_configured_nobody_is_known() -> None:
    """Nothing is trusted by default."""
    assert code_of(TokenVerifier([]), token()) == "unknown_issuer"


@pytest.mark.parametrize(
    "audience", ["veklom", "second", ["veklom"], ["else", "second"], ["veklom", "veklom"]]
)
def test_one_of_the_audiences_suffices(audience: Any) -> None:
    """The token may be for several; one of them must be ours."""
    two = msgspec.structs.replace(ISSUER, audiences=("veklom", "second"))
    assert accepts(verifier(two), token(aud=audience))


@pytest.mark.parametrize(
    "audience",
    ["else", "Veklom", "veklo", "veklom ", "veklom else", ["else"], ["vek", "lom"], [""], "*"],
)
def test_a_token_for_somebody_else_is_refused(audience: Any) -> None:
    """An audience is compared whole."""
    assert code_of(verifier(), token(aud=audience)) == "wrong_audience"


@pytest.mark.parametrize("audience", ["", [], 5, True, {"veklom": 1}, ["veklom", 5], [["veklom"]]])
def test_an_audience_is_texts(audience: Any) -> None:
    """Anything else is refused, also beside ours."""
    assert code_of(verifier(), token(aud=audience)) in {"wrong_audience", "invalid_token"}


@pytest.mark.parametrize("audience", ["veklom", "", ["veklom"], ABSENT])
def test_an_issuer_without_audiences_accepts_nothing(audience: Any) -> None:
    """An empty list of audiences means none, not any."""
    nobody = msgspec.structs.replace(ISSUER, audiences=())
    assert code_of(verifier(nobody), token(aud=audience)) in {"wrong_audience", "invalid_token"}


# --- time ---

TIMES = [
    ("exp", NOW + 1, 0, ""),
    ("exp", NOW, 0, "token_expired"),
    ("exp", NOW - 1, 0, "token_expired"),
    ("exp", NOW - 29, 30, ""),
    ("exp", NOW - 30, 30, "token_expired"),
    ("exp", NOW + 0.5, 0, ""),
    ("exp", 0, 30, "token_expired"),
    ("iat", NOW, 0, ""),
    ("iat", NOW + 1, 0, "invalid_token"),
    ("iat", NOW + 30, 30, ""),
    ("iat", NOW + 31, 30, "invalid_token"),
    ("iat", NOW - 3600, 0, ""),
    ("nbf", ABSENT, 0, ""),
    ("nbf", NOW, 0, ""),
    ("nbf", NOW + 1, 0, "invalid_token"),
    ("nbf", NOW + 30, 30, ""),
    ("nbf", NOW + 31, 30, "invalid_token"),
]


@pytest.mark.parametrize(("name", "instant", "leeway", "code"), TIMES)
def test_a_token_is_valid_in_its_time(name: str, instant: Any, leeway: int, code: str) -> None:
    """Not before, not after, and the issuer's leeway is exact on both sides."""
    checked = verifier(msgspec.structs.replace(ISSUER, leeway_seconds=leeway))
    made = token(**{name: instant})
    assert accepts(checked, made) if not code else code_of(checked, made) == code


@pytest.mark.parametrize(
    ("issued", "expires", "is_accepted"),
    [(-100, 500, True), (-100, 501, False), (0, 600, True), (0, 601, False), (-1e9, 1, False)],
)
def test_a_token_has_a_longest_life(issued: int, expires: int, is_accepted: bool) -> None:  # noqa: FBT001 - a column of a table
    """From its issue to its end a token lives no longer than the issuer's tokens may."""
    checked = verifier(msgspec.structs.replace(ISSUER, max_lifetime_seconds=600))
    made = token(iat=NOW + issued, exp=NOW + expires)
    assert accepts(checked, made) if is_accepted else code_of(checked, made) == "invalid_token"


# --- tenant ---

NESTED = {"tenant": ABSENT, "org": {"id": "acme", "deep": {"er": "acme"}}, "a.b/c": "acme"}


def with_tenant(**options: Any) -> Issuer:
    """Return an issuer that reads tenants in another way."""
    return msgspec.structs.replace(ISSUER, **options)


@pytest.mark.parametrize(
    ("issuer", "claims"),
    [
        (with_tenant(), {"tenant": "acme"}),
        (with_tenant(tenant_claim="org.id"), NESTED),
        (with_tenant(tenant_claim="org.deep.er"), NESTED),
        (with_tenant(tenant_claim="a.b/c"), NESTED),
        (with_tenant(tenant_claim="org.id"), {**NESTED, "org.id": "acme", "org": {"id": "x"}}),
        (with_tenant(tenant="acme"), {"tenant": ABSENT}),
        (with_tenant(tenant="acme"), {"tenant": "other"}),
        (with_tenant(tenant="acme", tenants=("other",)), {"tenant": "other"}),
        (with_tenant(tenants=("other", "acme")), {"tenant": "acme"}),
    ],
)
def test_the_tenant_is_found(issuer: Issuer, claims: dict[str, Any]) -> None:
    """By a claim, by a path, by a whole name with dots, or as a constant that no claim can change."""
    assert verifier(issuer).verify(token(**claims), NOW).principal.tenant == "acme"


@pytest.mark.parametrize(
    ("issuer", "claims"),
    [
        (with_tenant(), {"tenant": ABSENT}),
        *[(with_tenant(), {"tenant": value}) for value in (None, "", 5, True, ["acme"], {"a": 1})],
        (with_tenant(), {"tenant": "a" * (MAX_NAME + 1)}),
        (with_tenant(tenant_claim="org.none"), NESTED),
        (with_tenant(tenant_claim="org"), NESTED),
        (with_tenant(tenant_claim="org.id.more"), NESTED),
        (with_tenant(tenant_claim="org."), NESTED),
        (with_tenant(tenant_claim=".org"), NESTED),
        (with_tenant(tenant_claim="list.0"), {"list": ["acme"]}),
        (with_tenant(tenant_claim="other"), {"tenant": "acme"}),
        (with_tenant(tenants=("other",)), {"tenant": "acme"}),
        (with_tenant(tenants=("acme",)), {"tenant": "Acme"}),
        (with_tenant(tenants=("acme",)), {"tenant": "acme "}),
        (with_tenant(tenants=("acme",)), {"tenant": "*"}),
        (with_tenant(tenants=("*",)), {"tenant": "acme"}),
    ],
)
def test_without_its_tenant_a_token_is_refused(issuer: Issuer, claims: dict[str, Any]) -> None:
    """No tenant, none that can be read, or one that is not the issuer's to name."""
    assert code_of(verifier(issuer), token(**claims)) == "missing_tenant"


# --- who it is ---

ROLES = [
    (("roles",), {"roles": ["a", "b"]}, {"a", "b"}),
    (("roles",), {"roles": "a b  c"}, {"a", "b", "c"}),
    (("roles",), {"roles": ["a b"]}, {"a b"}),
    (("roles",), {}, set()),
    (("roles",), {"roles": None}, set()),
    (("roles",), {"roles": 5}, set()),
    (("roles",), {"roles": {"a": 1}}, set()),
    (("roles",), {"roles": ["a", 5, None, ["b"], {"c": 1}, ""]}, {"a"}),
    (("roles",), {"roles": ["a", "b" * MAX_NAME, "c" * (MAX_NAME + 1)]}, {"a", "b" * MAX_NAME}),
    (("realm_access.roles",), {"realm_access": {"roles": ["a"]}}, {"a"}),
    (("https://x.example/roles",), {"https://x.example/roles": ["a"]}, {"a"}),
    (("groups", "roles"), {"roles": ["a"], "groups": "b"}, {"a", "b"}),
    (("groups",), {"roles": ["a"]}, set()),
    ((), {"roles": ["a"]}, set()),
]


@pytest.mark.parametrize(("paths", "claims", "roles"), ROLES)
def test_roles_are_read_by_their_paths(
    paths: tuple[str, ...], claims: dict[str, Any], roles: set[str]
) -> None:
    """From lists and texts, by every path; what is no text or too long is no role."""
    checked = verifier(msgspec.structs.replace(ISSUER, roles=paths))
    assert checked.verify(token(**claims), NOW).principal.roles == roles


@pytest.mark.parametrize(
    ("claims", "field", "value"),
    [
        ({"client_id": "app"}, "client_id", "app"),
        ({"azp": "app"}, "client_id", "app"),
        ({"client_id": "app", "azp": "other"}, "client_id", "app"),
        ({"client_id": ["app"]}, "client_id", ""),
        ({"scope": "read write"}, "scopes", {"read", "write"}),
        ({"scp": ["read"]}, "scopes", {"read"}),
        ({"acr": "high"}, "acr", "high"),
        ({"acr": 3}, "acr", ""),
        ({"amr": ["pwd", "otp"]}, "amr", {"pwd", "otp"}),
        ({"auth_time": 1_700_000_000}, "authenticated_at", 1_700_000_000),
        ({}, "authenticated_at", 0),
        ({"amr": {}}, "amr", set()),
        ({}, "issuer", NAME),
        ({"sub": "\u00e9\U0001f600"}, "subject", "\u00e9\U0001f600"),
    ],
)
def test_the_other_facts_are_read(claims: dict[str, Any], field: str, value: Any) -> None:
    """Each fact comes from its claim and is empty where that is no text."""
    assert getattr(verifier().verify(token(**claims), NOW).principal, field) == value


@pytest.mark.parametrize(("length", "is_accepted"), [(MAX_NAME, True), (MAX_NAME + 1, False)])
def test_a_subject_has_a_greatest_length(length: int, is_accepted: bool) -> None:  # noqa: FBT001 - a column of a table
    """A longer one is refused, not cut: two subjects must never become one."""
    assert accepts(verifier(), token(sub="a" * length)) is is_accepted


# --- form ---


def test_a_token_has_a_greatest_length() -> None:
    """One of 8,192 bytes is read; one byte more is refused before it is parsed."""

    def padded(claims: int, header: int) -> bytes:
        return token(header={"pad": "a" * header}, pad="a" * claims)

    size = len(padded(0, 0))
    fits = (
        padded((MAX_TOKEN_BYTES - size) * 3 // 4 - 9 + c, h) for c in range(12) for h in range(4)
    )
    sizes = {len(each): each for each in fits}
    assert accepts(verifier(), sizes[MAX_TOKEN_BYTES])
    over = next(sizes[n] for n in itertools.count(MAX_TOKEN_BYTES + 1) if n in sizes)
    assert code_of(verifier(), over) == "invalid_token"


GOOD_HEADER = b'{"alg":"EdDSA","kid":"ed"}'
GOOD_CLAIMS = json.dumps(claims_with()).encode()
DOUBLED = [
    (b'{"alg":"none","alg":"EdDSA","kid":"ed"}', GOOD_CLAIMS),
    (b'{"alg":"EdDSA","kid":"x","kid":"ed"}', GOOD_CLAIMS),
    (b'{"alg":"EdDSA","\\u0061lg":"EdDSA","kid":"ed"}', GOOD_CLAIMS),
    (b'{"alg":"EdDSA","kid":"ed","x":{"a":1,"a":1}}', GOOD_CLAIMS),
    *[
        (GOOD_HEADER, b'{"%b":%b,' % (name, value) + GOOD_CLAIMS[1:])
        for name, value in [
            (b"sub", b'"root"'),
            (b"sub", b'"alice"'),
            (b"iss", b'"https://other.example.com"'),
            (b"tenant", b'"globex"'),
            (b"aud", b'"else"'),
            (b"exp", b"1"),
            (b"\\u0073ub", b'"root"'),
        ]
    ],
    (GOOD_HEADER, b'{"x":[{"a":1,"a":2}],' + GOOD_CLAIMS[1:]),
]


@pytest.mark.parametrize(("header", "claims"), DOUBLED)
def test_a_name_given_twice_is_refused(header: bytes, claims: bytes) -> None:
    """Readers differ in which of the two counts, so neither does: at any depth, in any spelling."""
    assert code_of(verifier(), raw_token(header, claims)) == "invalid_token"
    assert accepts(verifier(), raw_token(GOOD_HEADER, GOOD_CLAIMS))


DEEP = b"[" * 3000 + b"]" * 3000
FORMS = [
    *(b"", b".", b"..", b"...", b"a.b", b"a.b.c", b"e30.e30.", b"e30.e30.e30", b"bnVsbA.bnVsbA.x"),
    token() + b".",
    token() + b".e30",
    b"." + token(),
    token().replace(b".", b"..", 1),
    token() + b"\n",
    b" " + token(),
    token()[:-1] + b"!",
    token().replace(b".", b"\n.", 1),
    token().replace(b".", b"A.", 1),
    raw_token(b"[]", b"[]"),
    raw_token(b'"a"', GOOD_CLAIMS),
    raw_token(GOOD_HEADER, b"null"),
    raw_token(GOOD_HEADER, b"[" + GOOD_CLAIMS + b"]"),
    raw_token(GOOD_HEADER, GOOD_CLAIMS + b"x"),
    raw_token(GOOD_HEADER, b"\xef\xbb\xbf" + GOOD_CLAIMS),
    raw_token(GOOD_HEADER, GOOD_CLAIMS.decode().encode("utf-16")),
    raw_token(GOOD_HEADER, b'{"a":' + DEEP[1000:-1000] + b"," + GOOD_CLAIMS[1:]),
    raw_token(b'{"a":' + DEEP[2000:-2000] + b"," + GOOD_HEADER[1:], GOOD_CLAIMS),
    raw_token(GOOD_HEADER, b'{"a":"\\ud800",' + GOOD_CLAIMS[1:]),
    raw_token(GOOD_HEADER, GOOD_CLAIMS.replace(b"alice", b"al\xff")),
]


@pytest.mark.parametrize("made", FORMS, ids=range(len(FORMS)))
def test_what_is_no_signed_jwt_is_refused(made: bytes) -> None:
    """Segments too few or too many, other alphabets, no objects, deep or broken JSON."""
    assert code_of(verifier(), made) in {"invalid_token", "unknown_issuer"}


def outcome(made: bytes) -> str:
    """Return what becomes of a token; any other error is the test's failure."""
    try:
        WITH_ALL.verify(made, NOW)
    except Refused as refused:
        return refused.code
    except KeysNeeded:
        return "keys needed"
    return "accepted"


WITH_ALL = verifier()
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([NAME, "ed"]),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.text(max_size=3), scalars, max_size=2),
)
headers = st.dictionaries(
    st.sampled_from(["alg", "kid", "typ", "crit", "b64", "x"]),
    st.sampled_from([*ALGORITHMS, *KEYS, "JWT"]) | values,
)
bodies = st.dictionaries(st.sampled_from([*claims_with(), "nbf", "roles", "scope"]), values)


@given(st.binary() | st.lists(st.binary(), min_size=3, max_size=3).map(b".".join))
def test_junk_is_refused_and_nothing_else(made: bytes) -> None:
    """Any bytes are refused, never accepted and never another error."""
    assert outcome(made) in {"invalid_token", "unknown_issuer"}


@given(st.binary() | headers, st.binary() | bodies, st.binary(max_size=80))
def test_junk_in_segments_is_refused_and_nothing_else(
    header: object, claims: object, signature: bytes
) -> None:
    """Any JSON in well-formed segments is refused, or its key asked for."""
    made = b".".join(map(segment, (header, claims, signature)))
    assert outcome(made) != "accepted"


@given(headers, bodies)
def test_junk_that_an_issuer_signed_is_no_other_error(
    header: dict[str, Any], claims: dict[str, Any]
) -> None:
    """What a trusted issuer signs is read with the same care."""
    made = raw_token({"alg": "EdDSA", "kid": "ed", **header}, claims_with(**claims))
    assert outcome(made)


VALID = token()


@given(st.integers(0, len(VALID) - 1), st.integers(1, 255))
def test_any_changed_byte_is_refused(at: int, change: int) -> None:
    """No byte of a token may be changed, though the token itself is known."""
    assert outcome(VALID) == "accepted"
    changed = VALID[:at] + bytes([VALID[at] ^ change]) + VALID[at + 1 :]
    assert outcome(changed) != "accepted"


# --- key sets ---


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"null", b"[]", b'"keys"', b"5", b"{}", b'{"keys":{}}', b'{"keys":null}'),
        *(b'{"keys":"a"}', b"\xff\xfe", b'{"keys":[]', b"<html>", b'{"keys":' + b"[" * 100_000),
        b'{"keys":[]}'.ljust(MAX_JWKS_BYTES + 1),
    ],
)
def test_what_is_no_key_set_leaves_the_old_one(data: bytes) -> None:
    """It is an error with one name, and the keys that were there still serve."""
    checked = verifier()
    with pytest.raises(ValueError, match=r"key set|JWK set"):
        checked.install_keys(NAME, data)
    assert accepts(checked, token())


def test_a_key_set_has_a_greatest_size() -> None:
    """The largest that is allowed is read."""
    assert KeySet.from_json(ALL_KEYS.ljust(MAX_JWKS_BYTES)).find("ed")


members = st.sampled_from(
    ["kty", "kid", "use", "alg", "crv", "x", "y", "n", "e", "d", "p", "q", "dp", "dq", "qi", "oth"]
)
entries = st.sampled_from([*(jwk(key) for key in KEYS.values())]).flatmap(
    lambda good: st.dictionaries(
        members,
        st.sampled_from(["RSA", "EC", "OKP", "oct", "P-256", "Ed25519", "AQAB", ""]) | values,
        max_size=4,
    ).map(lambda changed: {**good, **changed})
)


@given(st.lists(entries | values, max_size=3))
def test_any_key_set_is_read_or_refused(listed: list[Any]) -> None:
    """An issuer's junk among its keys never stops the process that reads it."""
    KeySet.from_json(json.dumps({"keys": listed}).encode())


# --- the cache ---


def test_a_known_token_is_not_verified_again() -> None:
    """The same bytes give the same answer, without another signature check."""
    checked = verifier()
    assert checked.verify(VALID, NOW) is checked.verify(VALID, NOW + 1)


def test_a_token_is_known_as_a_whole() -> None:
    """A known token's header and claims under another signature are another token."""
    checked = verifier()
    checked.verify(VALID, NOW)
    head, claims, _ = VALID.split(b".")
    forged = [
        b".".join([head, claims, segment(b"\0" * 64)]),
        b".".join([head, segment(claims_with(sub="root")), VALID.split(b".")[2]]),
        b".".join([segment({"alg": "none"}), claims, b""]),
    ]
    for each in forged:
        with pytest.raises(Refused):
            checked.verify(each, NOW)


def test_a_known_token_still_expires() -> None:
    """The end of its time, leeway included, is kept to the second."""
    checked = verifier()
    made = token(exp=NOW + 10)
    checked.verify(made, NOW)
    assert accepts(checked, made, NOW + 39.9)
    assert code_of(checked, made, NOW + 40) == "token_expired"


def test_a_known_token_is_verified_again_after_a_while() -> None:
    """What is known is known for a minute."""
    checked = verifier()
    first = checked.verify(VALID, NOW)
    assert checked.verify(VALID, NOW + MAX_CACHE_SECONDS - 0.1) is first
    assert checked.verify(VALID, NOW + MAX_CACHE_SECONDS) is not first


def test_the_oldest_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has a greatest size, at which the oldest token makes room for the newest."""
    monkeypatch.setattr(tokens, "MAX_CACHED", 3)
    checked = verifier()
    made = [token(sub=f"user-{n}") for n in range(4)]
    known = [checked.verify(each, NOW) for each in made]
    assert len(checked._cache) == 3
    newest = zip(made[1:], known[1:], strict=True)
    assert all(checked.verify(each, NOW) is old for each, old in newest)
    assert checked.verify(made[0], NOW) is not known[0]


def rotated(checked: TokenVerifier, keys: bytes) -> Callable[[bytes], object]:
    """Install keys and return the verification after that."""
    checked.install_keys(NAME, keys)
    return lambda made: checked.verify(made, NOW)


def test_new_keys_forget_what_the_old_ones_vouched_for() -> None:
    """After a rotation a known token needs its key again; the same id with another key refuses it."""
    checked = verifier()
    checked.verify(VALID, NOW)
    with pytest.raises(KeysNeeded):
        rotated(checked, jwks(jwk(P256, "p256")))(VALID)
    checked = verifier()
    checked.verify(VALID, NOW)
    another = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(Refused) as caught:
        rotated(checked, jwks(jwk(another, "ed")))(VALID)
    assert caught.value.code == "invalid_token"


def test_the_same_keys_forget_nothing() -> None:
    """A refresh that brings nothing new costs no verification."""
    checked = verifier()
    known = checked.verify(VALID, NOW)
    assert rotated(checked, ALL_KEYS)(VALID) is known


def test_one_issuers_new_keys_leave_the_others_tokens() -> None:
    """Only the tokens of the issuer whose keys changed are forgotten."""
    both = TokenVerifier([ISSUER, msgspec.structs.replace(ISSUER, issuer=OTHER)])
    both.install_keys(NAME, ALL_KEYS)
    both.install_keys(OTHER, ALL_KEYS)
    theirs = token(iss=OTHER)
    known = both.verify(theirs, NOW)
    both.verify(VALID, NOW)
    both.install_keys(NAME, jwks(jwk(P256, "p256")))
    assert both.verify(theirs, NOW) is known


def test_a_refusal_is_not_remembered() -> None:
    """A token that came before its key is accepted once the key is there."""
    checked = verifier(keys=jwks())
    with pytest.raises(KeysNeeded):
        checked.verify(VALID, NOW)
    assert rotated(checked, ALL_KEYS)(VALID)
