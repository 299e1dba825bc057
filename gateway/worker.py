"""A worker process: the composition root of the data plane.

It is started by the supervisor with its listening socket and its leash, over which its ends of
relays come, and reads everything else from the boot message. It has no other way in: no file of
keys, no fetching of issuers' keys, no web framework.

Laws of this file:
- it listens only once control has told it everything there is to know;
- it outlives control: it goes on with the sessions it holds and waits for the next relay, but not
  for longer than `WITHOUT_CONTROL_SECONDS`, since meanwhile nobody could tell it what was closed; in a
  fleet, not for longer than its lease;
- it does not outlive the supervisor.
"""

import asyncio
import gc
import json
import socket
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

import uvloop

import gateway
from gateway.audit.durability import Durability
from gateway.audit.event import (
    LimitsStoreChanged,
    LimitWarned,
    PolicyLoaded,
    ProcessStarted,
    ProcessStopped,
)
from gateway.audit.journal import AuditUnavailable, Journal
from gateway.audit.recorder import Recorder
from gateway.audit.refusals import RefusalBudget
from gateway.boot import (
    Boot,
    Protections,
    issuers_of,
    open_journal,
    protections_event,
    run_child,
    take_signals,
)
from gateway.bundles import Bundle
from gateway.clock import SystemClock
from gateway.config import Config, ConfigurationError, known_to, providers_from
from gateway.execution import BodyLimits, Execution
from gateway.identity.session_tokens import SessionTokenVerifier
from gateway.identity.sessions import SessionTable
from gateway.identity.tokens import TokenVerifier
from gateway.leash import Leash, NewRelay, Order, PoliciesRefused, Retire, UsePolicies
from gateway.limiting import open_limiter
from gateway.limits.memory_store import MemoryLimiter
from gateway.limits.redis_store import RedisLimiter
from gateway.limits.reservation import Warned
from gateway.providers.provider import Provider
from gateway.providers.routes import RouteTable
from gateway.proxy.pool import Pool
from gateway.proxy.server import Proxy, ProxyLimits
from gateway.relay import (
    UNASKED,
    Ack,
    DropSession,
    Held,
    Hello,
    IssuerAbsent,
    IssuerKeys,
    KeepCounts,
    KeysNeeded,
    Lease,
    LetStand,
    Link,
    Message,
    PutSession,
    Ready,
    Serve,
    SessionAbsent,
    SessionKey,
    SessionNeeded,
    Snapshot,
    SnapshotRequest,
    Told,
    Touched,
)
from gateway.telemetry.logs import get_log
from gateway.telemetry.metrics import CallMetrics
from gateway.tls import client_context, server_context
from keys.boot_secrets import BootSecrets
from keys.region import SecretRegion
from keys.vault import SessionVault
from keys.wrapping import Wrapping
from policies.document import DocumentError
from policies.kills import Kill, KillTable, Scope

TOUCH_SECONDS = 1.0
"""How often control hears which sessions were used; idle expiry is no finer than this. Counted
refusals are written as often."""

WITHOUT_CONTROL_SECONDS = 60.0
"""How long sessions are served that nobody could close: far longer than control takes to start."""

GRACE_SECONDS = 1.0
"""How long callers of a worker that is replaced may begin a call on a connection they had."""

KILLED = "An operator stopped this call."

log = get_log()


class Worker:
    """One worker's parts, and its inbox."""

    def __init__(self, boot: Boot, protections: Protections, region: SecretRegion) -> None:
        loop = asyncio.get_running_loop()
        self._boot = boot
        self._protections = protections
        self._index = int(boot.role.rpartition("-")[2])
        self._clock = SystemClock()
        self._metrics = CallMetrics()
        secrets = BootSecrets.open(boot.secrets)
        self._is_shared = boot.config.store.is_shared
        self._sessions = SessionTable(
            SessionVault(region, Wrapping(secrets.boot_key)), self._clock, is_shared=self._is_shared
        )
        self._lease: asyncio.TimerHandle | None = None
        self._limiter: MemoryLimiter | RedisLimiter = MemoryLimiter(self._clock)
        self._kills = KillTable()
        self._identities = TokenVerifier(issuers_of(boot))
        self._refusals = RefusalBudget(self._clock)
        self._link: Link | None = None
        self._without_control_since: float | None = None
        self._kept: KeepCounts | None = None
        self._proxy: Proxy | None = None
        self._is_listening = False
        self._journal: Journal | None = None
        self._recorder: Recorder | None = None
        self._session_key: bytes | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._bundle = boot.bundle
        self._compiling = asyncio.Lock()
        self._may_serve: asyncio.Future[None] = loop.create_future()
        self._stopped: asyncio.Future[str] = loop.create_future()
        self._orphaned: asyncio.Future[None] = loop.create_future()
        self._leash = Leash(boot.leash, self._on_order, self._on_supervisor_lost)

    async def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        boot = self._boot
        loop = asyncio.get_running_loop()
        take_signals(self._stop)
        journal = self._journal = open_journal(boot, self._clock, loop)
        audit = boot.config.audit
        self._recorder = Recorder(journal, Durability(audit.durability), audit.wait, self._clock)
        journal.append(ProcessStarted(role=boot.role, run=boot.run, version=gateway.__version__))
        journal.append(protections_event(boot.role, self._protections))
        either: list[asyncio.Future[Any]] = [self._may_serve, self._stopped]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not self._stopped.done():
            await self._listen()
        ticking = loop.create_task(self._tick())
        # Without its clock a worker would serve without control for ever: its death is the worker's.
        ticking.add_done_callback(self._on_tick_ended)
        reason = await self._stopped
        self._is_listening = False
        await self._drain(reason)
        await self._recorder.settle()
        ticking.cancel()
        await asyncio.gather(ticking, return_exceptions=True)
        self._record_counted()
        if isinstance(self._limiter, RedisLimiter):
            await self._limiter.close()
        try:
            journal.append(ProcessStopped(role=boot.role, reason=reason))
        except AuditUnavailable:
            reason = "audit_unavailable"
        journal.close()
        if self._link is not None:
            self._link.send(Snapshot(n=UNASKED, data=self._snapshot()))
            await self._link.finish()
        return 0 if reason in {"shutdown", "replaced"} else 1

    async def _listen(self) -> None:
        boot, config = self._boot, self._boot.config
        providers = providers_from(config)
        assert self._recorder is not None  # noqa: S101 - opened before anything else
        try:
            tls = {p.name: client_context(p.ca_file) for p in providers if p.is_tls}
            context = server_context(config.listeners.proxy)
            self._limiter = open_limiter(
                config, self._clock, self._record_warning, self._record_limits_store
            )
        except OSError as error:
            raise ConfigurationError((f"certificates: {error}",)) from None
        self._proxy = Proxy(
            execution=self._execution(providers),
            recorder=self._recorder,
            pool=Pool(
                clock=self._clock,
                tls=tls,
                connect_seconds=config.timeouts.connect,
                idle_seconds=config.timeouts.upstream_idle,
                max_connections=config.limits.upstream_connections,
            ),
            limits=proxy_limits_from(config),
            metrics=self._metrics,
            clock=self._clock,
            ask_for_keys=self._ask_for_keys,
            ask_for_session=self._ask_for_session,
            well_known=json.dumps(
                {"sessions": boot.addresses["sessions"] + "/v1/sessions"}
            ).encode(),
        )
        listener = socket.socket(fileno=boot.listeners["proxy"])
        await self._proxy.listen(listener, context)
        self._is_listening = True
        if self._link is not None:
            self._link.send(Ready(worker=self._index, protections=self._protections))
        self._leash.tell_serving()
        # What exists now lives as long as the process: keep the collector from walking it.
        gc.collect()
        gc.freeze()

    async def _drain(self, reason: str) -> None:
        """Let live calls end, for as long as the supervisor lives and nothing is wrong with us."""
        if self._proxy is None:
            return
        if reason in {"shutdown", "replaced"}:
            grace = GRACE_SECONDS if reason == "replaced" else 0.0
            draining = asyncio.get_running_loop().create_task(
                self._proxy.drain(self._boot.config.timeouts.drain, grace_seconds=grace)
            )
            either: list[asyncio.Future[Any]] = [draining, self._orphaned]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not self._orphaned.done():
                await draining
                return
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
        await self._proxy.drain(0)

    def _execution(self, providers: tuple[Provider, ...]) -> Execution:
        config = self._boot.config
        assert self._session_key is not None  # noqa: S101 - control's first word came before `Serve`
        return Execution(
            routes=RouteTable(providers),
            identities=self._identities,
            session_tokens=SessionTokenVerifier(self._session_key, config.name),
            sessions=self._sessions,
            policy_set=self._bundle.compile(known_to(config)),
            limiter=self._limiter,
            kills=self._kills,
            limits=BodyLimits(
                buffered=config.limits.buffered_body, streamed=config.limits.streamed_body
            ),
            metrics=self._metrics,
            refusals=self._refusals,
            clock=self._clock,
        )

    # --- the leash ---

    def _on_order(self, order: Order, sockets: list[socket.socket]) -> None:
        match order:
            case NewRelay():
                for end in sockets:
                    self._start(self._meet_control(end))
            case Retire():
                self._stop("replaced")
            case UsePolicies():
                self._bundle = order.bundle
                self._start(self._use_policies(order.bundle))
            case PoliciesRefused():
                pass  # control has it recorded
            case _:
                self._stop("leash_confused")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _use_policies(self, bundle: Bundle) -> None:
        """Decide by another bundle, compiled beside the calls that go on meanwhile."""
        async with self._compiling:
            if bundle is not self._bundle or self._proxy is None:
                return  # a later one has come, or serving begins with this one
            known = known_to(self._boot.config)
            try:
                policy_set = await asyncio.to_thread(bundle.compile, known)
            except DocumentError as error:  # the supervisor compiled the same bytes: a defect
                log.error("policies.refused", error=str(error))
                return
            self._proxy.execution.use(policy_set)
        if self._journal is not None:
            with suppress(
                AuditUnavailable
            ):  # a call that cannot be recorded is not forwarded either
                self._journal.append(PolicyLoaded(digest=bundle.digest, files=bundle.files))

    def _on_supervisor_lost(self) -> None:
        self._orphaned.set_result(None)
        self._stop("supervisor_lost")

    # --- control: introduced, lost, heard ---

    async def _meet_control(self, end: socket.socket) -> None:
        link = self._link = await Link.open(end, self._on_message, self._on_link_lost)
        is_fresh = not self._may_serve.done()
        link.send(Hello(worker=self._index, is_fresh=is_fresh, kept=self._kept))
        if is_fresh:
            # What a control that died had begun to tell may have been closed since.
            for session in self._sessions.all():
                self._sessions.drop(session.record.session_id)
        else:
            self._note_use()
            for session in self._sessions.all():
                link.send(
                    Held(
                        principal=session.principal,
                        record=self._sessions.complete(session),
                        label=session.label,
                        used_at=self._sessions.used_at(session.record.session_id),
                    )
                )
        link.send(Told())
        if self._is_listening:
            link.send(Ready(worker=self._index, protections=self._protections))

    def _on_link_lost(self, link: Link) -> None:
        if link.is_broken:
            self._stop("relay_confused")
        if link is self._link:
            self._link = None
            if self._without_control_since is None:
                self._without_control_since = self._clock.monotonic()
            log.warning("control.lost")

    def _on_message(self, link: Link, message: Message) -> None:
        match message:
            case SessionKey():
                if self._session_key not in {None, message.public_key}:
                    self._stop("relay_confused")
                self._session_key = message.public_key
            case PutSession() | DropSession() | LetStand():
                self._confirm(link, message.n, self._change_sessions(message))
            case SessionAbsent():
                self._on_session(message.session_id, is_known=message.is_known)
            case Lease():
                self._serve_until(message.until)
            case IssuerKeys():
                self._take_keys(message)
            case IssuerAbsent():
                if self._proxy is not None:
                    self._proxy.keys_arrived(message.issuer, are_known=False)
            case Serve():
                self._go_on()
            case KeepCounts():
                self._kept = message
            case SnapshotRequest():
                link.send(Snapshot(n=message.n, data=self._snapshot()))
            case _:
                self._stop("relay_confused")

    def _go_on(self) -> None:
        """Serve, or go on serving; whoever was asked for something before may be gone."""
        self._without_control_since = None
        if not self._is_shared:
            self._sessions.resume()
        if self._proxy is not None:
            self._proxy.ask_again()
        if not self._may_serve.done():
            self._may_serve.set_result(None)

    # --- sessions ---

    def _change_sessions(self, message: PutSession | DropSession | LetStand) -> int:
        """Do as control says; return how many live calls were cut."""
        match message:
            case PutSession():
                destroyed = self._sessions.put(
                    message.principal, message.record, label=message.label, used_at=message.used_at
                )
                self._on_session(message.record.session_id)
                return self._cut_replaced(destroyed)
            case DropSession():
                return self._end(message.session_id, "session_closed", "The session was closed.")
            case LetStand():
                return self._let_stand(message.kills)

    def _end(self, session_id: str, code: str, message: str) -> int:
        """Destroy a session's keys; return how many live calls that cut."""
        self._sessions.drop(session_id)
        return self._proxy.cut_session(session_id, code, message) if self._proxy else 0

    def _let_stand(self, kills: tuple[Kill, ...]) -> int:
        """Let only these kills stand; return how many live calls the new ones cut."""
        fresh = KillTable(kill for kill in kills if self._kills.get(kill.kill_id) is None)
        self._kills.replace(kills)
        cut = 0
        for session in self._sessions.all() if len(fresh) else ():
            record = session.record
            fingerprints = [each.fingerprint for each in record.credentials]
            if fresh.find_session(session.principal, record.session_id, fingerprints):
                cut += self._end(record.session_id, "killed", KILLED)
        if self._proxy is not None:
            for kill in fresh.standing():
                if kill.scope is Scope.PROVIDER:
                    cut += self._proxy.cut_provider(kill.value, "killed", KILLED)
                if kill.scope is Scope.FINGERPRINT:  # perhaps a key that was replaced already
                    cut += self._proxy.cut_key(kill.value, "killed", KILLED)
                    self._sessions.destroy_replaced(kill.value)
        return cut

    def _cut_replaced(self, destroyed: int) -> int:
        """Cut the calls whose key was replaced and is destroyed now; return how many."""
        return self._proxy.cut_replaced() if destroyed and self._proxy is not None else 0

    def _take_keys(self, message: IssuerKeys) -> None:
        if message.jwks is None:
            self._identities.remove_keys(message.issuer)
        else:
            self._identities.install_keys(message.issuer, message.jwks)
        if self._proxy is not None:
            self._proxy.keys_arrived(message.issuer, are_known=message.jwks is not None)

    def _on_session(self, session_id: str, *, is_known: bool = True) -> None:
        if self._proxy is not None:
            self._proxy.session_arrived(session_id, is_known=is_known)

    def _serve_until(self, until: float) -> None:
        """Serve sessions of a fleet for as long as control vouches for what it knows of it."""
        if self._lease is not None:
            self._lease.cancel()
        remaining = until - self._clock.monotonic()
        if remaining > 0:
            self._sessions.resume()
            loop = asyncio.get_running_loop()
            self._lease = loop.call_later(remaining, self._sessions.suspend)
        else:
            self._sessions.suspend()

    @staticmethod
    def _confirm(link: Link, n: int, count: int = 0) -> None:
        if n != UNASKED:
            link.send(Ack(n=n, count=count))

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
                **self._limiter.gauges,
                "audit_short": int(journal.is_short) if journal else 0,
                "audit_lost_events": self._recorder.lost if self._recorder else 0,
            }
        )

    def _ask_for_keys(self, issuer: str, kid: str) -> None:
        if self._link is not None:
            self._link.send(KeysNeeded(issuer=issuer, kid=kid))

    def _ask_for_session(self, session_id: str) -> None:
        if self._link is not None:
            self._link.send(SessionNeeded(session_id=session_id))

    # --- time ---

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TOUCH_SECONDS)
            if self._recorder is not None:
                self._recorder.tick()
            self._record_counted()
            if isinstance(self._limiter, RedisLimiter):
                self._limiter.tick()
            self._cut_replaced(self._sessions.end_overlaps())
            used = self._note_use()
            if used and self._link is not None:
                self._link.send(Touched(session_ids=used))
            since = self._without_control_since
            if since is not None and self._clock.monotonic() - since > WITHOUT_CONTROL_SECONDS:
                self._sessions.suspend()

    def _note_use(self) -> tuple[str, ...]:
        live = self._proxy.live_sessions if self._proxy is not None else ()
        return self._sessions.note_use(live, self._clock.now())

    def _record_warning(self, word: Warned) -> None:
        log.warning("limit.warned", limit=word.limit, percent=word.percent)
        if self._journal is not None:
            with suppress(AuditUnavailable):  # the budget holds all the same
                self._journal.append(
                    LimitWarned(
                        limit=word.limit,
                        counted_for=word.key,
                        percent=word.percent,
                        spent=word.spent,
                        maximum=word.maximum,
                        unit=word.unit,
                    )
                )

    def _record_limits_store(self, is_there: bool, reason: str) -> None:  # noqa: FBT001 - its state
        if is_there:
            log.info("limits_store.found")
        else:
            log.warning("limits_store.lost", reason=reason)
        if self._journal is not None:
            with suppress(AuditUnavailable):  # the calls say themselves what was not counted
                self._journal.append(LimitsStoreChanged(is_there=is_there, reason=reason))

    def _record_counted(self) -> None:
        if self._journal is not None:
            with suppress(AuditUnavailable):  # they stay counted, and `veklom_denied` has them
                self._refusals.flush(self._journal.append)

    def _on_tick_ended(self, ticking: asyncio.Task[None]) -> None:
        if not ticking.cancelled():
            log.error("tick.died", error=type(ticking.exception()).__name__)
            self._stop("tick_died")

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


def main() -> int:
    """Run a worker."""
    region = SecretRegion.open()

    async def run(boot: Boot, protections: Protections) -> int:
        return await Worker(boot, protections, region).run()

    return run_child(
        run, uvloop.run, writes_to=lambda config: [config.audit.directory], region=region
    )


if __name__ == "__main__":
    raise SystemExit(main())
