"""From a raw request target to an operation: the only door to a provider.

Laws of this file:
- what is not known is refused, in the error shape of the provider it was meant for;
- the path's bytes go upstream as they came, never decoded and encoded again;
- a path that two servers could resolve differently (dot segments, doubled or turned slashes, encoded
  or not) is refused.

No I/O.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

import msgspec

from gateway.errors import Refused
from gateway.providers.dialect import BodyKind, Dialect
from gateway.providers.provider import Provider
from policies.request import Operation

__all__ = ["BodyKind", "Route", "RouteTable", "TargetRefused"]

_AMBIGUOUS = re.compile(
    rb"[^\x21-\x7e]|[#\\]|//|%(?![0-9a-f]{2})|%(?:[01][0-9a-f]|5c|7f)"
    rb"|(?:/|%2f)(?:\.|%2e){1,2}(?=/|%2f|;|$)",
    re.IGNORECASE,
)

MAX_TARGET_BYTES: Final = 8192
_MAX_REMEMBERED: Final = 1024
_METHODS = (b"GET", b"POST", b"DELETE")


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """A target understood. `model` and `stream` are set where the path decides them.

    `generates`: a model is asked to write an answer.
    """

    provider: Provider
    operation: Operation
    upstream_target: bytes
    body: BodyKind
    model: str = ""
    stream: bool = False
    generates: bool = False


class TargetRefused(Refused):
    """No such route, or not to be trusted; `dialect` is that of the provider it was meant for, if any."""

    def __init__(self, code: str, message: str, dialect: Dialect | None) -> None:
        super().__init__(code, message)
        self.dialect = dialect


class RouteTable:
    """The routes of every configured provider."""

    def __init__(self, providers: Iterable[Provider]) -> None:
        self._providers = {provider.name.encode(): provider for provider in providers}
        self._found: OrderedDict[tuple[bytes, bytes], Route] = OrderedDict()

    def find(self, method: bytes, target: bytes) -> Route:
        """Return the route of a request line.

        Raises:
            TargetRefused: There is none, or the target is ambiguous or no origin-form path.
        """
        key = (method, target)
        route = self._found.get(key)
        if route is None:
            route = self._find(method, target)
            self._found[key] = route
            if len(self._found) > _MAX_REMEMBERED:
                self._found.popitem(last=False)
        return route

    def changed(
        self, route: Route, method: bytes, target: bytes, *, provider: str, model: str
    ) -> Route:
        """Return the route of a call that goes to another provider, another model, or both.

        Raises:
            TargetRefused: The other provider has no such operation, though it speaks the dialect.
        """
        if provider:
            rest = target[1 + len(route.provider.name) :]
            route = self.find(method, b"/" + provider.encode() + rest)
        if model and route.model:
            renamed = route.provider.dialect.renamed(route.upstream_target, model)
            route = msgspec.structs.replace(route, upstream_target=renamed, model=model)
        return route

    def _find(self, method: bytes, target: bytes) -> Route:
        path, mark, query = target.partition(b"?")
        name, _, rest = path[1:].partition(b"/")
        provider = self._providers.get(name) if path.startswith(b"/") else None
        if not path.startswith(b"/") or len(target) > MAX_TARGET_BYTES or _AMBIGUOUS.search(path):
            dialect = provider.dialect if provider else None
            raise TargetRefused("invalid_target", "The request target is not accepted.", dialect)
        if provider is None:
            raise TargetRefused("unknown_route", "There is nothing here.", None)
        rest = b"/" + rest
        # HEAD is GET without the body (RFC 9110 9.3.2): whoever may read a thing may ask about it.
        known_as = b"GET" if method == b"HEAD" else method
        try:
            matched = provider.dialect.match(known_as, rest, provider.base_path)
        except Refused as refusal:
            raise TargetRefused(refusal.code, refusal.message, provider.dialect) from None
        if matched is None:
            raise self._unknown(provider, method, rest)
        return Route(
            provider=provider,
            operation=matched.operation,
            upstream_target=matched.path + mark + query,
            body=matched.body,
            model=matched.model,
            stream=matched.stream,
            generates=matched.generates,
        )

    @staticmethod
    def _unknown(provider: Provider, method: bytes, rest: bytes) -> TargetRefused:
        dialect = provider.dialect
        others = [each for each in _METHODS if each != method]
        if any(dialect.match(each, rest, provider.base_path) for each in others):
            return TargetRefused("method_not_allowed", "The method is not allowed here.", dialect)
        return TargetRefused("unknown_route", "This operation is not governed here.", dialect)
