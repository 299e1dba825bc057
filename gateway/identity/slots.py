"""Where callers put credentials, and which of them they are.

An SDK has one place for its API key and each SDK another; the token is accepted in all of them. A
JWT is told from a raw key by its first characters, a session token from an issuer's JWT by its
constant first segment. Two tokens of one kind that differ are refused, never chosen between.

No I/O.
"""

import re
from collections.abc import Sequence
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from gateway.errors import Refused

SESSION_TOKEN_PREFIX: Final = b"eyJhbGciOiJFZERTQSIsInR5cCI6InZla2xvbS1zZXNzaW9uK2p3dCJ9."
"""The first segment of every session token: `{"alg":"EdDSA","typ":"veklom-session+jwt"}`."""

_JWT_PREFIX = b"eyJ"  # base64url of `{"`, with which every JOSE header begins
_BEARER = b"bearer "

MAX_TOKEN_BYTES: Final = 8192
"""As long as a header field of common servers may be; longer tokens are not parsed at all."""

_BEARER_SLOTS = frozenset({b"authorization", b"x-veklom-authorization"})
_BARE_SLOTS = frozenset({b"x-veklom-session", b"x-api-key", b"api-key", b"x-goog-api-key"})

CREDENTIAL_SLOTS: Final = (
    _BEARER_SLOTS
    | _BARE_SLOTS
    | {b"cookie", b"proxy-authorization", b"xi-api-key", b"x-amz-security-token"}
)
"""Every field that may carry a credential; none of them is ever forwarded."""

_SEPARATOR = re.compile(rb"[&;]")
_QUERY_CREDENTIAL = re.compile(
    rb"\$?(?:key|api[-_]?key|(?:(?:access|oauth)[-_]?)?token)", re.IGNORECASE
)  # Google's system parameters may begin with a dollar sign


class Presented(NamedTuple):
    """The tokens of one request; never printed."""

    session_token: bytes | None
    identity_token: bytes | None

    def __repr__(self) -> str:
        """Return nothing of the tokens."""
        return "Presented(…)"


def find_credentials(  # noqa: PLR0912 - one loop is faster, and reads in order
    headers: Sequence[tuple[bytes, bytes]],
) -> Presented:
    """Return the tokens that the fields (names lower-case) carry.

    Raises:
        Refused: None is there, two differ, or one is no token of ours or of an issuer's.
    """
    session: bytes | None = None
    identity: bytes | None = None
    for name, value in headers:
        if name in _BARE_SLOTS:
            token = value.strip()
            if token[:7].lower() == _BEARER:
                token = token[7:].strip()
        elif name in _BEARER_SLOTS:
            if value[:7].lower() != _BEARER:
                raise Refused("credential_not_accepted", "Only Bearer credentials are accepted.")
            token = value[7:].strip()
        else:
            continue
        if token.startswith(SESSION_TOKEN_PREFIX):
            if session is not None and session != token:
                raise Refused("ambiguous_credentials", "Two different session tokens were sent.")
            session = token
        elif token.startswith(_JWT_PREFIX):
            if identity is not None and identity != token:
                raise Refused("ambiguous_credentials", "Two different identity tokens were sent.")
            identity = token
        else:
            raise Refused(
                "credential_not_accepted",
                "Send a session token here; provider keys are deposited by opening a session.",
            )
        if len(token) > MAX_TOKEN_BYTES:
            raise Refused("invalid_token", "The token is too long.")
    if session is None and identity is None:
        raise Refused("no_credentials", "Send a session token in place of the API key.")
    return Presented(session, identity)


def query_has_credential(query: bytes) -> bool:
    """Return whether a query carries a credential; URLs are logged by everyone on the way.

    Names are compared decoded, as a provider would read them (`k%65y` is `key`).
    """
    parameters = (parameter.partition(b"=") for parameter in _SEPARATOR.split(query))
    return any(
        equals and _QUERY_CREDENTIAL.fullmatch(unquote_to_bytes(name))
        for name, equals, _ in parameters
    )
