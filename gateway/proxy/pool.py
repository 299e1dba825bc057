"""Connections to providers, kept between calls.

A connection carries calls of any caller, one at a time: it holds no credential, each request brings
its own. Only hosts from the configuration are ever dialled. The most recently used connection is
taken first, so that the rest may grow old and be closed. Each is looked at again before it is
taken: it must be the very provider's, and `Upstream.is_fit`.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Callable

from gateway.clock import Clock
from gateway.errors import Refused
from gateway.providers.provider import Provider
from gateway.proxy.dialling import Resolver, dial, system_resolver
from gateway.proxy.upstream import Upstream

OnDialled = Callable[[Upstream | Refused], None]


class Pool:
    """Idle connections by provider, and the dialling of new ones."""

    def __init__(  # noqa: PLR0913 - four named limits
        self,
        *,
        clock: Clock,
        tls: dict[str, ssl.SSLContext],
        connect_seconds: float,
        idle_seconds: float,
        max_connections: int,
        max_idle: int = 256,
        resolver: Resolver = system_resolver,
    ) -> None:
        self._clock = clock
        self._tls = tls
        self._connect_seconds = connect_seconds
        self._idle_seconds = idle_seconds
        self._max_connections = max_connections
        self._max_idle = max_idle
        self._resolver = resolver
        self._idle: dict[str, deque[Upstream]] = {}
        self._busy = 0
        self._dials: set[asyncio.Task[None]] = set()

    @property
    def busy(self) -> int:
        """How many connections carry a call or are being dialled."""
        return self._busy

    def acquire(self, provider: Provider, on_ready: OnDialled) -> None:
        """Hand a connection to `on_ready`: at once where one is idle, else when dialled.

        `on_ready` gets the refusal where the provider cannot be reached, or must not be. Whoever
        got a connection returns it with `give_back`.

        Raises:
            Refused: As many connections as are allowed are in use.
        """
        idle = self._idle.get(provider.name)
        while idle:
            upstream = idle.pop()
            if upstream.provider is provider and upstream.is_fit(self._clock.now()):
                self._busy += 1
                on_ready(upstream)
                return
            upstream.abort()
        if self._busy >= self._max_connections:
            raise Refused("overloaded", "Too many calls are under way.", retry_after_seconds=1)
        self._busy += 1
        task = asyncio.get_running_loop().create_task(self._dial(provider, on_ready))
        self._dials.add(task)
        task.add_done_callback(self._dials.discard)

    async def _dial(self, provider: Provider, on_ready: OnDialled) -> None:
        context = self._tls[provider.name] if provider.is_tls else None
        dialled: Upstream | Refused
        try:
            dialled = await dial(provider, context, self._resolver, self._connect_seconds)
        except Refused as refusal:
            self._busy -= 1
            dialled = refusal
        on_ready(dialled)

    def give_back(self, upstream: Upstream) -> None:
        """Take a connection back: to be kept where it is fit for another call, else closed."""
        self._busy -= 1
        if not upstream.detach():
            upstream.abort()
            return
        idle = self._idle.setdefault(upstream.provider.name, deque())
        upstream.idle_since = self._clock.monotonic()
        idle.append(upstream)
        if len(idle) > self._max_idle:
            idle.popleft().abort()

    def sweep(self, now: float) -> None:
        """Close what has been idle too long; `now` is monotonic."""
        for idle in self._idle.values():
            while idle and (not idle[0].is_open or now - idle[0].idle_since > self._idle_seconds):
                idle.popleft().abort()

    def close(self) -> None:
        """Close every idle connection and stop dialling."""
        for task in self._dials:
            task.cancel()
        for idle in self._idle.values():
            while idle:
                idle.pop().abort()
