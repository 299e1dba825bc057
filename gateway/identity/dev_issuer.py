"""A development issuer: a key in memory, tokens for whoever asks. For loopback, never for service.

`serve --dev` and `demo` use it so that a first call needs no account anywhere. It ends with the
process, and nothing that it signed is accepted by the next. No I/O.
"""

import json
import secrets
from collections.abc import Sequence
from typing import Final

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm

from gateway.identity.tokens import Issuer
from policies.roles import ROLES, Grant

ISSUER: Final = "urn:veklom:development"
AUDIENCE: Final = "veklom"
DEVELOPMENT: Final = Issuer(issuer=ISSUER, audiences=(AUDIENCE,), algorithms=("EdDSA",))
DEVELOPMENT_GRANTS: Final = tuple(Grant(issuer=ISSUER, role=role, grants=role) for role in ROLES)
"""The gateway's own roles are what a development token names."""


class DevelopmentIssuer:
    """Signs tokens for any subject and tenant."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()
        self._kid = secrets.token_hex(4)

    def __repr__(self) -> str:
        """Return nothing of the key."""
        return "DevelopmentIssuer(…)"

    def jwks(self) -> bytes:
        """Return the public key as a JWK set."""
        key = OKPAlgorithm.to_jwk(self._key.public_key(), as_dict=True)
        return json.dumps({"keys": [{**key, "kid": self._kid, "use": "sig"}]}).encode()

    def mint(  # noqa: PLR0913 - one argument for each thing a token says
        self,
        *,
        subject: str,
        tenant: str,
        roles: Sequence[str],
        now: int,
        ttl_seconds: int,
        amr: Sequence[str] = (),
    ) -> str:
        """Return a token that says so, and that its subject has authenticated `now`."""
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": subject,
            "tenant": tenant,
            "roles": list(roles),
            "amr": list(amr),
            "auth_time": now,
            "iat": now,
            "exp": now + ttl_seconds,
        }
        return jwt.encode(claims, self._key, algorithm="EdDSA", headers={"kid": self._kid})
