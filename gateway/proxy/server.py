"""What the connections of one worker share: the listener, the live calls, the limits, the clock.

The proxy port answers three things itself, from constants: `HEAD /` (agents knock before they
speak), `GET /livez`, and `GET /.well-known/veklom`, which says where sessions are opened.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable, KeysView

import msgspec

from gateway.clock import Clock
from gateway.errors import Refused
from gateway.execution import Execution
from gateway.proxy.awaited import Awaited, OnArrival
from gateway.proxy.downstream import Downstream
from gateway.proxy.driver import Driver
from gateway.proxy.hangups import HangupWatch
from gateway.proxy.pool import Pool
from gateway.story import Recorder
from gateway.telemetry.metrics import CallMetrics

SWEEP_SECONDS = 1.0
"""How often waiting things are looked at: one timer for all instead of one for each."""


MAX_TURNED_AWAY = 128
"""How many connections over the limit hear so at once; half of the descriptors kept in reserve."""


class ProxyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The named limits of the data plane; sizes in bytes, waits in seconds."""

    head_bytes: int
    headers: int
    buffered_total_bytes: int
    streamed_body_bytes: int
    ahead_bytes: int = 256 * 1024
    connections: int
    head_seconds: float
    body_seconds: float
    keep_alive_seconds: float
    first_byte_seconds: float
    idle_seconds: float
    total_seconds: float
    keys_seconds: float = 5.0
    session_seconds: float = 5.0
    linger_seconds: float = 2.0


class Proxy:
    """One worker's data plane."""

    def __init__(  # noqa: PLR0913 - the composition root names every part once
        self,
        *,
        execution: Execution,
        recorder: Recorder,
        pool: Pool,
        limits: ProxyLimits,
        metrics: CallMetrics,
        clock: Clock,
        ask_for_keys: Callable[[str, str], None],
        ask_for_session: Callable[[str], None],
        well_known: bytes,
    ) -> None:
        self.execution = execution
        self.recorder = recorder
        self.pool = pool
        self.limits = limits
        self.metrics = metrics
        self.now = clock.monotonic
        self.hangups = HangupWatch()
        self.is_draining = False
        self.buffered_bytes = 0
        self.calls_started = 0
        self._keys: Awaited[tuple[str, str]] = Awaited(
            lambda key: ask_for_keys(*key), limits.keys_seconds, _keys_unavailable
        )
        self._awaited_sessions: Awaited[str] = Awaited(
            ask_for_session, limits.session_seconds, _session_unavailable
        )
        self._connections: set[Downstream] = set()
        self._live: dict[str, set[Driver]] = {}
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None
        self._on_idle: Callable[[], None] | None = None
        self._fixed = {
            (b"HEAD", b"/"): _fixed_answer(b"", b"text/plain"),
            (b"GET", b"/livez"): _fixed_answer(b"ok\n", b"text/plain"),
            (b"GET", b"/.well-known/veklom"): _fixed_answer(well_known, b"application/json"),
        }

    async def listen(self, sock: socket.socket, context: ssl.SSLContext | None) -> None:
        """Accept callers on a bound socket."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Downstream(self), sock=sock, ssl=context, backlog=1024
        )
        self._sweeper = loop.call_later(SWEEP_SECONDS, self._sweep)

    # --- connections ---

    @property
    def connections(self) -> int:
        """How many callers are connected."""
        return len(self._connections)

    @property
    def live_calls(self) -> int:
        """How many calls are with a provider."""
        return sum(len(drivers) for drivers in self._live.values())

    @property
    def live_sessions(self) -> KeysView[str]:
        """The sessions that have a call with a provider."""
        return self._live.keys()

    def admit(self, connection: Downstream) -> bool:
        """Take a connection in; return whether it may be served."""
        self._connections.add(connection)
        return len(self._connections) <= self.limits.connections

    @property
    def is_flooded(self) -> bool:
        """Whether too many connections are waiting to be told that they are too many."""
        return len(self._connections) > self.limits.connections + MAX_TURNED_AWAY

    def forget(self, connection: Downstream) -> None:
        """Let a connection go."""
        self._connections.discard(connection)
        if self._on_idle is not None and not self._connections:
            self._on_idle()

    def fixed_answer(self, method: bytes, target: bytes) -> bytes | None:
        """Return the constant answer to this request, if it has one."""
        return self._fixed.get((method, target))

    # --- sessions' live calls ---

    def enter(self, session_id: str, driver: Driver) -> None:
        """Count a call as carried under a session."""
        self._live.setdefault(session_id, set()).add(driver)

    def leave(self, session_id: str, driver: Driver) -> None:
        """Count it no longer."""
        drivers = self._live.get(session_id)
        if drivers is not None:
            drivers.discard(driver)
            if not drivers:
                del self._live[session_id]

    def cut_session(self, session_id: str, code: str, message: str) -> int:
        """Cut every live call of a session; return how many there were."""
        return self._cut(list(self._live.get(session_id, ())), code, message)

    def cut_provider(self, provider: str, code: str, message: str) -> int:
        """Cut every live call with a provider; return how many there were."""
        live = [
            each for calls in self._live.values() for each in calls if each.provider == provider
        ]
        return self._cut(live, code, message)

    def cut_key(self, fingerprint: str, code: str, message: str) -> int:
        """Cut every live call that carries a key of this name; return how many there were."""
        live = [each for calls in self._live.values() for each in calls if each.key == fingerprint]
        return self._cut(live, code, message)

    def cut_replaced(self) -> int:
        """Cut every live call whose key was replaced, and has no overlap left; return how many."""
        live = [each for calls in self._live.values() for each in calls if each.has_lost_its_key]
        return self._cut(live, "key_replaced", "The session's key was replaced.")

    @staticmethod
    def _cut(drivers: list[Driver], code: str, message: str) -> int:
        for driver in drivers:
            driver.cut(code, message)
        return len(drivers)

    # --- what only control can get: issuers' keys, sessions of a fleet ---

    def await_keys(self, issuer: str, kid: str, on_keys: OnArrival) -> None:
        """Ask for an issuer's keys, once for all calls that wait for them."""
        self._keys.wait((issuer, kid), on_keys, self.now())

    def keys_arrived(self, issuer: str, *, are_known: bool) -> None:
        """Let every call that waited for this issuer go on, or be refused."""
        for awaited in self._keys:
            if awaited[0] == issuer:
                self._keys.arrived(awaited, is_known=are_known)

    def await_session(self, session_id: str, on_session: OnArrival) -> None:
        """Ask the shared store for a session, once for all calls that wait for it."""
        self._awaited_sessions.wait(session_id, on_session, self.now())

    def session_arrived(self, session_id: str, *, is_known: bool = True) -> None:
        """Let every call that waited for this session go on, or be refused."""
        self._awaited_sessions.arrived(session_id, is_known=is_known)

    def ask_again(self) -> None:
        """Ask for everything that calls wait for: whoever was asked is gone."""
        self._keys.ask_again()
        self._awaited_sessions.ask_again()

    # --- time and the end ---

    def _sweep(self) -> None:
        now = self.now()
        for connection in list(self._connections):
            connection.check(now)
        self.pool.sweep(now)
        self._keys.sweep(now)
        self._awaited_sessions.sweep(now)
        self._sweeper = asyncio.get_running_loop().call_later(SWEEP_SECONDS, self._sweep)

    async def drain(self, seconds: float, *, grace_seconds: float = 0.0) -> None:
        """Stop accepting, let live calls end for at most `seconds`, then cut the rest.

        For `grace_seconds` callers who are connected may still begin a call: their connection ends
        with its answer, not under a request that is already on its way.
        """
        self.is_draining = True
        if self._server is not None:
            self._server.close()
        if grace_seconds:  # also where nobody is connected yet: a TLS handshake may be under way
            await asyncio.sleep(grace_seconds)
        idle = asyncio.get_running_loop().create_future()

        def on_idle() -> None:
            if not idle.done():
                idle.set_result(None)

        self._on_idle = on_idle
        for connection in list(self._connections):
            connection.drain()
        if not self._connections:
            on_idle()
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(idle)
        except TimeoutError:
            for connection in list(self._connections):
                connection.cut("draining", "The gateway is shutting down.")
            try:
                async with asyncio.timeout(self.limits.linger_seconds):
                    await idle
            except TimeoutError:
                pass
        if self._sweeper is not None:
            self._sweeper.cancel()
        self.hangups.close()
        self.pool.close()


def _keys_unavailable() -> Refused:
    return Refused(
        "identity_unavailable", "The issuer's keys cannot be had now.", retry_after_seconds=5
    )


def _session_unavailable() -> Refused:
    return Refused("store_unavailable", "Sessions cannot be reached now.", retry_after_seconds=1)


def _fixed_answer(body: bytes, content_type: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (
        content_type,
        len(body),
        body,
    )
