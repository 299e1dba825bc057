"""Which header fields cross the gateway. Requests by allow-list, responses by what must not pass.

No I/O.
"""

from collections.abc import Sequence
from typing import Final

from gateway.providers.dialect import Dialect
from policies.obligations import Obligations

Header = tuple[bytes, bytes]

COMMON: Final = frozenset(
    {b"accept", b"accept-language", b"content-type", b"user-agent", b"idempotency-key"}
)
_STAINLESS = b"x-stainless-"

HOP_BY_HOP: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate",
        b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
"""RFC 9110 7.6.1, and its obsolete relatives."""

_NOT_RETURNED = HOP_BY_HOP | {
    b"content-length",  # the framing is ours to state
    b"set-cookie",  # a provider's cookie belongs to no caller of a shared connection
    b"alt-svc",  # names a way past the gateway
    b"strict-transport-security",  # speaks for the provider's host, not for ours
}


def forwardable(dialect: Dialect, headers: Sequence[Header]) -> list[Header]:
    """Return the request fields (names lower-case) that the provider may see.

    Everything else stays here: credentials, cookies, who the caller is, how it is connected. The
    answer is asked for uncompressed, so that usage can be read and bytes stay comparable.
    """
    named_hop_by_hop = _connection_options(headers)
    own = dialect.headers
    kept = [
        field
        for field in headers
        if (field[0] in COMMON or field[0] in own or field[0].startswith(_STAINLESS))
        and field[0] not in named_hop_by_hop
    ]
    kept.append((b"accept-encoding", b"identity"))
    return kept


def changed_fields(fields: Sequence[Header], obligations: Obligations) -> list[Header]:
    """Return request fields with those that a policy sets and without those that it removes."""
    chosen = [(name.encode(), value.encode()) for name, value in obligations.set_headers]
    gone = {name.encode() for name in obligations.remove_headers} | {name for name, _ in chosen}
    return [field for field in fields if field[0] not in gone] + chosen


def response_headers(headers: Sequence[Header]) -> list[Header]:
    """Return the response fields that the caller sees, spelt and ordered as they came."""
    lowered = [(name.lower(), name, value) for name, value in headers]
    named_hop_by_hop = _connection_options([(low, value) for low, _, value in lowered])
    return [
        (name, value)
        for low, name, value in lowered
        if low not in _NOT_RETURNED and low not in named_hop_by_hop
    ]


def _connection_options(headers: Sequence[Header]) -> frozenset[bytes]:
    for name, _ in headers:
        if name == b"connection":
            break
    else:
        return frozenset()
    return frozenset(
        option.strip().lower()
        for name, value in headers
        if name == b"connection"
        for option in value.split(b",")
    )
