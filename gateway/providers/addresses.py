"""Which addresses a provider's name may lead to: public ones, and no disguise of any other.

A name is answered by whoever holds its zone, or sits between. Were every answer dialled, a changed
record would carry a customer's key to a metadata service or a neighbour's machine. The tables are
IANA's special-purpose registries (RFC 6890 and what was added since). No I/O.
"""

from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

_NOT_PUBLIC: Final = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network (RFC 791)
            "10.0.0.0/8",  # private (RFC 1918)
            "100.64.0.0/10",  # carriers' NAT (RFC 6598)
            "127.0.0.0/8",  # loopback
            "168.63.129.16/32",  # a cloud's platform channel, in public dress
            "169.254.0.0/16",  # link-local; metadata services
            "172.16.0.0/12",  # private
            "192.0.0.0/24",  # IETF protocol assignments
            "192.0.2.0/24",  # documentation
            "192.88.99.0/24",  # 6to4 relays (RFC 7526)
            "192.168.0.0/16",  # private
            "198.18.0.0/15",  # benchmarking
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, and broadcast
        ),
    )
)
_GLOBAL_UNICAST: Final = IPv6Network("2000::/3")
_NOT_PUBLIC_6: Final = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # IETF protocol assignments, Teredo among them
            "2001:db8::/32",  # documentation
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)
_MAPPED: Final = IPv6Network("::ffff:0:0/96")
_6TO4: Final = IPv6Network("2002::/16")
_NAT64: Final = IPv6Network("64:ff9b::/96")  # RFC 6052; its local kin 64:ff9b:1::/48 is not public


class Reach(StrEnum):
    """Where a provider's connections may lead."""

    PUBLIC = "public"
    LOOPBACK = "loopback"
    ANY = "any"


def reach_of(host: str, *, private_addresses: bool) -> Reach:
    """Return where the connections of a provider at `host` may lead.

    An address is declared by standing in the configuration. `localhost` and the names below it are
    this machine and nothing else (RFC 6761 6.3). Any other name leads to public addresses, unless
    its provider declares `private_addresses`.
    """
    if private_addresses or _parse(host) is not None:
        return Reach.ANY
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return Reach.LOOPBACK
    return Reach.PUBLIC


def may_dial(address: str, reach: Reach) -> bool:
    """Return whether an address that a name led to may be dialled; what is no address may not."""
    parsed = _parse(address)
    if parsed is None:
        return False
    if reach is Reach.ANY:
        return True
    if reach is Reach.LOOPBACK:
        return parsed.is_loopback
    return _is_public(parsed)


def _parse(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text)
    except ValueError:
        return None


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC)
    if address.scope_id is not None:
        return False  # a zone names a link, and what is beyond a link has none
    number = int(address)
    if address in _MAPPED or address in _NAT64:
        return _is_public(IPv4Address(number & 0xFFFFFFFF))
    if address in _6TO4:
        return _is_public(IPv4Address((number >> 80) & 0xFFFFFFFF))
    return address in _GLOBAL_UNICAST and not any(address in network for network in _NOT_PUBLIC_6)
