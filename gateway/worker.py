"""A worker process: the composition root of the data plane.

It is started by the supervisor with two inherited sockets, the listening one and its end of the
relay, and reads everything else from the boot message. It has no other way in: no file of keys, no
fetching of issuers' keys, no web framework.
"""

import asyncio
import gc
import json
import socket
from contextlib import suppress

import uvloop

import gateway
from gateway.audit.event import ProcessStarted, ProcessStopped
from gateway.audit.journal import AuditUnavailable, Journal
from gateway.audit.refusals import RefusalBudget
from gateway.boot import (
    Boot,
    boot_argument,
    issuers_of,
    open_journal,
    policy_set_of,
    protect,
    protections_event,
    watch_over,
)
from gateway.clock import SystemClock
from gateway.config import Config, providers_from
from gateway.execution import BodyLimits, Execution
from gateway.hardening import ProtectionMissing
from gateway.identity.session_tokens import SessionTokenVerifier
from gateway.identity.sessions import SessionTable
from gateway.identity.tokens import TokenVerifier
from gateway.limits.memory_store import MemoryLimiter
from gateway.providers.provider import Provider
from gateway.providers.routes import RouteTable
from gateway.proxy.pool import Pool
from gateway.proxy.server import Proxy, ProxyLimits
from gateway.relay import (
    Ack,
    DropSession,
    IssuerKeys,
    KeysNeeded,
    Link,
    Message,
    PutSession,
    Ready,
    SessionKey,
    Snapshot,
    SnapshotRequest,
    Touched,
)
from gateway.telemetry.logs import configure_logs, get_log
from gateway.telemetry.metrics import CallMetrics
from gateway.tls import client_context, server_context
from keys.region import SecretRegion
from keys.vault import SessionVault

TOUCH_SECONDS = 1.0
"""How often control hears which sessions were used; idle expiry is no finer than this. Counted
refusals are written as often."""


class Worker:
    """One worker's parts, and its inbox."""

    def __init__(self, boot: Boot, region: SecretRegion, protections: dict[str, str]) -> None:
        self._boot = boot
        self._protections = protections
        self._index = int(boot.role.rpartition("-")[2])
        self._clock = SystemClock()
        self._metrics = CallMetrics()
        self._sessions = SessionTable(SessionVault(region))
        self._identities = TokenVerifier(issuers_of(boot))
        self._refusals = RefusalBudget(self._clock)
        self._link: Link | None = None
        self._proxy: Proxy | None = None
        self._journal: Journal | None = None
        self._first_word: asyncio.Future[SessionKey] = asyncio.get_running_loop().create_future()
        self._stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        boot, config = self._boot, self._boot.config
        loop = asyncio.get_running_loop()
        watch_over(boot, self._stop)
        self._link = await Link.open(
            socket.socket(fileno=boot.relays[0]), self._on_message, self._on_link_lost
        )
        journal = self._journal = open_journal(boot, self._clock, loop)
        journal.append(ProcessStarted(role=boot.role, version=gateway.__version__))
        journal.append(protections_event(boot.role, self._protections))
        session_key = await self._first_word
        providers = providers_from(config)
        self._proxy = Proxy(
            execution=self._execution(session_key, providers),
            journal=journal,
            pool=Pool(
                clock=self._clock,
                tls={p.name: client_context(p.ca_file) for p in providers if p.is_tls},
                connect_seconds=config.timeouts.connect,
                idle_seconds=config.timeouts.upstream_idle,
                max_connections=config.limits.upstream_connections,
            ),
            limits=proxy_limits_from(config),
            metrics=self._metrics,
            clock=self._clock,
            ask_for_keys=self._ask_for_keys,
            well_known=json.dumps(
                {"sessions": boot.addresses["sessions"] + "/v1/sessions"}
            ).encode(),
        )
        listener = socket.socket(fileno=boot.listeners["proxy"])
        await self._proxy.listen(listener, server_context(config.listeners.proxy))
        self._link.send(Ready(worker=self._index, protections=self._protections))
        # What exists now lives as long as the process: keep the collector from walking it.
        gc.collect()
        gc.freeze()
        touching = loop.call_later(TOUCH_SECONDS, self._tell_touched)
        reason = await self._stopped
        touching.cancel()
        await self._proxy.drain(config.timeouts.drain)
        self._record_counted()
        try:
            journal.append(ProcessStopped(role=boot.role, reason=reason))
        except AuditUnavailable:
            reason = "audit_unavailable"
        journal.close()
        self._link.close()
        return 0 if reason == "shutdown" else 1

    def _execution(self, session_key: SessionKey, providers: tuple[Provider, ...]) -> Execution:
        config = self._boot.config
        return Execution(
            routes=RouteTable(providers),
            identities=self._identities,
            session_tokens=SessionTokenVerifier(session_key.public_key, config.name),
            sessions=self._sessions,
            policy_set=policy_set_of(self._boot),
            limiter=MemoryLimiter(self._clock),
            limits=BodyLimits(
                buffered=config.limits.buffered_body, streamed=config.limits.streamed_body
            ),
            metrics=self._metrics,
            refusals=self._refusals,
            clock=self._clock,
        )

    # --- the inbox ---

    def _on_message(self, link: Link, message: Message) -> None:
        match message:
            case SessionKey():
                self._first_word.set_result(message)
            case PutSession():
                self._sessions.put(message.principal, message.record)
                link.send(Ack(n=message.n))
            case DropSession():
                self._sessions.drop(message.session_id)
                cut = self._proxy.cut_session(message.session_id) if self._proxy else 0
                link.send(Ack(n=message.n, count=cut))
            case IssuerKeys():
                if message.jwks is None:
                    self._identities.remove_keys(message.issuer)
                else:
                    self._identities.install_keys(message.issuer, message.jwks)
                if self._proxy is not None:
                    self._proxy.keys_arrived(message.issuer, are_known=message.jwks is not None)
            case SnapshotRequest():
                link.send(Snapshot(n=message.n, data=self._snapshot()))
            case _:
                self._stop("relay_confused")

    def _snapshot(self) -> dict[str, object]:
        proxy, journal = self._proxy, self._journal
        return self._metrics.snapshot(
            {
                "connections": proxy.connections if proxy else 0,
                "live_calls": proxy.live_calls if proxy else 0,
                "upstream_connections_busy": proxy.pool.busy if proxy else 0,
                "buffered_bytes": proxy.buffered_bytes if proxy else 0,
                "audit_pending_events": journal.pending_events if journal else 0,
                "audit_durable_events": journal.durable_events if journal else 0,
                "audit_failed": int(journal.has_failed) if journal else 0,
            }
        )

    def _ask_for_keys(self, issuer: str, kid: str) -> None:
        if self._link is not None:
            self._link.send(KeysNeeded(issuer=issuer, kid=kid))

    def _tell_touched(self) -> None:
        touched = set(self._sessions.take_touched())
        if self._proxy is not None:
            touched.update(self._proxy.live_sessions)  # a long stream is use, too
        if touched and self._link is not None:
            self._link.send(Touched(session_ids=tuple(touched)))
        self._record_counted()
        asyncio.get_running_loop().call_later(TOUCH_SECONDS, self._tell_touched)

    def _record_counted(self) -> None:
        if self._journal is not None:
            with suppress(AuditUnavailable):  # they stay counted, and `veklom_denied` has them
                self._refusals.flush(self._journal.append)

    def _on_link_lost(self, _link: Link) -> None:
        self._stop("control_lost")

    def _stop(self, reason: str) -> None:
        if not self._stopped.done():
            self._stopped.set_result(reason)


def proxy_limits_from(config: Config) -> ProxyLimits:
    """Return the data plane's limits, as the operator set them."""
    limits, timeouts = config.limits, config.timeouts
    return ProxyLimits(
        head_bytes=limits.head,
        headers=limits.headers,
        buffered_total_bytes=limits.buffered_total,
        streamed_body_bytes=limits.streamed_body,
        connections=limits.connections,
        head_seconds=timeouts.head,
        body_seconds=timeouts.body,
        keep_alive_seconds=timeouts.downstream_idle,
        first_byte_seconds=timeouts.first_byte,
        idle_seconds=timeouts.idle,
        total_seconds=timeouts.total,
    )


async def _run(boot: Boot, region: SecretRegion, protections: dict[str, str]) -> int:
    return await Worker(boot, region, protections).run()


def main() -> int:
    """Run a worker; its boot message's descriptor is the only argument."""
    boot = boot_argument()
    configure_logs(boot.config.logs.format, boot.config.logs.level, boot.role)
    region = SecretRegion.open()
    try:
        protections = protect(boot, [boot.config.audit.directory], region=region)
    except ProtectionMissing as missing:
        get_log().error("process.not_protected", reason=str(missing))
        return 1
    return uvloop.run(_run(boot, region, protections))


if __name__ == "__main__":
    raise SystemExit(main())
