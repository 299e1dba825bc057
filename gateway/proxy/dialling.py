"""From a provider's name to a connection: resolve once, check, dial exactly what was checked.

Nothing resolves the name a second time, so an answer that changes between check and use (DNS
rebinding) changes nothing. TLS still asks for, and verifies, the name. Addresses are tried one
after another, the families in turn (RFC 8305 4), each with an even share of the time that is left:
one that swallows packets costs the call a share and not everything.
"""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain, zip_longest
from typing import Final

from gateway.errors import Refused
from gateway.providers.addresses import Reach, may_dial
from gateway.providers.provider import Provider
from gateway.proxy.upstream import Upstream

MAX_ADDRESSES: Final = 4
"""With the default of 5 s for connecting, each still has more than a second."""

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the addresses of a name, preferred ones first; raises `OSError` where there are none."""


async def system_resolver(host: str, port: int) -> Sequence[str]:
    """Return what the system's resolver says."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


def candidates(provider: Provider, answers: Sequence[str]) -> list[str]:
    """Return the addresses to try, in order.

    Raises:
        Refused: There are answers, and none of them may be dialled for this provider.
    """
    allowed = [each for each in dict.fromkeys(answers) if may_dial(each, provider.reach)]
    if answers and not allowed:
        where = "this machine" if provider.reach is Reach.LOOPBACK else "a public address"
        raise Refused(
            "upstream_forbidden_address", f"The provider's name does not lead to {where}."
        )
    first_family = [each for each in allowed if (":" in each) == (":" in allowed[0])]
    second_family = [each for each in allowed if each not in first_family]
    in_turn = chain.from_iterable(zip_longest(first_family, second_family))
    return [each for each in in_turn if each is not None][:MAX_ADDRESSES]


async def dial(
    provider: Provider, context: ssl.SSLContext | None, resolve: Resolver, seconds: float
) -> Upstream:
    """Return a connection to the provider, TLS established, within `seconds`.

    Raises:
        Refused: The name leads to no address that may be dialled, or none of them answers.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    unreachable = Refused("upstream_unreachable", "The provider could not be reached.")
    try:
        async with asyncio.timeout_at(end):
            addresses = candidates(provider, await resolve(provider.host, provider.port))
    except (OSError, TimeoutError, UnicodeError):  # the last: a label that no name can have
        raise unreachable from None
    for tried, address in enumerate(addresses):
        now = loop.time()
        share = (end - now) / (len(addresses) - tried)
        try:
            async with asyncio.timeout_at(now + share):
                _, upstream = await loop.create_connection(
                    lambda: Upstream(provider),
                    address,
                    provider.port,
                    ssl=context,
                    server_hostname=provider.host if context is not None else None,
                )
        except (OSError, TimeoutError, ssl.SSLError):
            continue
        return upstream
    raise unreachable
