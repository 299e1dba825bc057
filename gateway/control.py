"""The control process: the composition root of everything that people and their tools talk to.

It opens and closes sessions, fetches issuers' keys, answers health and metrics, and tells the
workers what they need to know. It carries no calls.

Laws of this file:
- a worker that is fresh is told everything before it may serve, and counts among those that are told
  and asked from the moment its relay stands: on one relay what is said first is heard first;
- what a control process before this one left is settled before anything else happens
  (`gateway.takeover`); deposits wait meanwhile in the listener's backlog;
- sessions are closed when the gateway ends, not when this process does: a successor goes on.
"""

import asyncio
import socket
from collections.abc import Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

import gateway
from gateway.api.admin import admin_app
from gateway.api.deposit_keys import DepositKeys
from gateway.api.kills import FILE_NAME, KillFile, KillSwitch, from_shared, to_shared
from gateway.api.ledger import SessionLedger
from gateway.api.operators import Operators
from gateway.api.quiet import serve
from gateway.api.receipts import Receipts
from gateway.api.sessions import SessionsApi
from gateway.audit.event import (
    ConfigurationLoaded,
    Event,
    KillsStanding,
    PolicyLoaded,
    PolicyRefused,
    ProcessStarted,
    ProcessStopped,
    SessionsAdopted,
)
from gateway.audit.journal import AuditUnavailable
from gateway.audit.keyfile import load_or_create_seed, load_signer
from gateway.audit.refusals import RefusalBudget
from gateway.boot import (
    Boot,
    Protections,
    issuers_of,
    keeper_of,
    open_journal,
    protections_event,
    run_child,
    take_signals,
)
from gateway.bundles import Bundle
from gateway.clock import SystemClock
from gateway.config import ConfigurationError, providers_from, why
from gateway.errors import Refused
from gateway.fleet import FleetMember
from gateway.identity.dev_issuer import DEVELOPMENT_GRANTS, ISSUER, DevelopmentIssuer
from gateway.identity.jwks import JwksCache
from gateway.identity.session_tokens import SessionTokenIssuer, SessionTokenVerifier
from gateway.identity.tokens import KeysNeeded, TokenVerifier
from gateway.leash import (
    Leash,
    NewRelay,
    Order,
    PoliciesRefused,
    Restarts,
    Retire,
    UsePolicies,
)
from gateway.relay import (
    UNASKED,
    Ack,
    DropSession,
    Held,
    Hello,
    IssuerAbsent,
    IssuerKeys,
    LetStand,
    Link,
    Message,
    PutSession,
    Ready,
    Serve,
    SessionKey,
    SessionNeeded,
    Snapshot,
    Told,
    Touched,
)
from gateway.relay import (
    KeysNeeded as KeysNeededMessage,
)
from gateway.store.connection import StoreRefused
from gateway.store.memory import MemoryStore
from gateway.store.redis_store import Owed, RedisStore
from gateway.store.sessions import Entry, SessionStore, StoreUnavailable
from gateway.takeover import settle
from gateway.tasks import end_tasks
from gateway.telemetry.logs import get_log
from gateway.telemetry.metrics import render
from gateway.tls import server_context
from gateway.workers import ACK_SECONDS, Workers
from keys.boot_secrets import BootSecrets
from keys.deployment import TOKEN_SEED, derive
from keys.hpke import DepositKeyRing
from keys.wrapping import Wrapping
from policies.kills import KillTable
from policies.request import Principal

SWEEP_SECONDS = 1.0
"""How often sessions are checked for expiry."""

TAKEOVER_SECONDS = 10.0
"""How long workers may take to say what they hold: 100,000 sessions of three keys took 3 s on a
busy machine."""

GRACE_SECONDS = 1.0
"""How long callers may still ask, on a connection they had, a process that is replaced."""

CLOSE_ALL_SECONDS = 3.0
"""How long sessions that end with the supervisor go on being recorded."""

log = get_log()


class _Newcomer:
    """A relay whose worker has not been told everything yet, and what it has said so far."""

    def __init__(self) -> None:
        self.hello: Hello | None = None
        self.held: list[Held] = []
        self.has_told = False


class Control:
    """The control process's parts."""

    def __init__(self, boot: Boot, protections: Protections) -> None:
        loop = asyncio.get_running_loop()
        self._boot = boot
        self._protections = {"supervisor": boot.supervisor_protections, boot.role: protections}
        self._clock = SystemClock()
        self._workers = Workers()
        self._refusals = RefusalBudget(self._clock)
        secrets = BootSecrets.open(boot.secrets)
        deployment_key = load_or_create_seed(Path(boot.config.state_dir) / "fingerprint.key")
        wrapping = Wrapping(secrets.boot_key)
        is_shared = boot.config.store.is_shared
        seed = derive(deployment_key, TOKEN_SEED) if is_shared else secrets.token_seed
        self._tokens = SessionTokenIssuer(boot.config.name, seed)
        self._development = DevelopmentIssuer() if boot.is_dev else None
        self._identities = TokenVerifier(issuers_of(boot))
        self._jwks = JwksCache(boot.config.jwks, self._clock, self._on_keys)
        signer = load_signer(Path(boot.config.state_dir), boot.config.origin)
        self._deposit_keys = DepositKeys(DepositKeyRing(boot.config.name), signer, self._clock)
        self._receipts = Receipts(Path(boot.config.audit.directory), signer, self._clock)
        self._journal = open_journal(boot, self._clock, loop)
        self._keeper = keeper_of(boot, self._clock, self._record)
        self._kill_file = KillFile(Path(boot.config.state_dir) / FILE_NAME)
        try:
            self._kills = KillTable(self._kill_file.read())
        except (OSError, ValueError) as error:
            raise ConfigurationError((f"kills: {error}",)) from None
        self._store: SessionStore
        self._member: FleetMember | None = None
        if is_shared:
            self._store, self._member = self._join_fleet(deployment_key, wrapping)
        else:
            self._store = MemoryStore(boot.config.sessions)
        self._ledger = SessionLedger(
            store=self._store,
            fleet=self._member or self._workers,
            tokens=self._tokens,
            record=self._record,
            fingerprint_key=deployment_key,
            wrapping=wrapping,
            kills=self._kills,
            limits=boot.config.sessions,
            clock=self._clock,
        )
        self._kill_switch = KillSwitch(
            table=self._kills,
            file=self._kill_file,
            fleet=self._workers,
            ledger=self._ledger,
            shared=self._store if isinstance(self._store, RedisStore) else None,
            record=self._record,
            clock=self._clock,
        )
        self._tasks: set[asyncio.Task[object]] = set()
        self._relays = 0
        self._newcomers: dict[Link, _Newcomer] = {}
        self._has_taken_over = False
        self._has_started = boot.run > 1
        self._all_told: asyncio.Future[None] = loop.create_future()
        self._restarts: dict[str, int] = {}
        self._policies_refused = False
        self._stopped: asyncio.Future[str] = loop.create_future()
        self._last_reason = ""
        self._leash = Leash(boot.leash, self._on_order, self._on_supervisor_lost)

    def _join_fleet(
        self, deployment_key: bytes, wrapping: Wrapping
    ) -> tuple[RedisStore, FleetMember]:
        config = self._boot.config
        store = RedisStore(
            config.store,
            config.sessions,
            deployment=config.name,
            deployment_key=deployment_key,
            wrapping=wrapping,
            clock=self._clock,
        )
        member = FleetMember(
            store=store,
            workers=self._workers,
            record=self._record,
            close=self._close_owed,
            kills={kill.kill_id: to_shared(kill) for kill in self._kills.standing()},
            on_kill=self._on_kill,
            end_killed=self._end_killed,
            persistence_reason=config.store.allow_persistent_store,
            staleness_seconds=config.store.staleness,
            clock=self._clock,
        )
        return store, member

    def _on_kill(self, kill_id: str, data: bytes | None) -> None:
        self._kill_switch.hear(kill_id, data)
        self._start(self._keep_kills())
        if data is not None:
            self._start(self._end_heard(data))

    async def _keep_kills(self) -> None:
        try:
            await self._kill_switch.keep()
        except OSError as error:
            log.error("kills.not_kept", error=why(error))

    async def _end_heard(self, data: bytes) -> None:
        """End what was opened here before the kill was heard; the rest its own replica has ended."""
        await asyncio.sleep(self._boot.config.store.staleness)
        try:
            await self._end_killed(data)
        except (Refused, AuditUnavailable) as error:
            log.error("session.close_failed", code=error.code)

    async def _end_killed(self, data: bytes) -> None:
        await self._ledger.close_killed([from_shared(data)])

    async def _close_owed(self, owed: Owed) -> None:
        await self._ledger.close(owed.session_id, owed.reason, due_at=owed.due_at)

    async def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        boot = self._boot
        take_signals(self._stop)
        await self._record(
            ProcessStarted(role=boot.role, run=boot.run, version=gateway.__version__)
        )
        await self._record(ConfigurationLoaded(digest=boot.config_digest, path=boot.config_path))
        for role, protections in self._protections.items():
            await self._record(protections_event(role, protections))
        await self._record_policies(boot.bundle)
        if len(self._kills):
            standing = tuple(kill.kill_id for kill in self._kills.standing())
            await self._record(KillsStanding(kills=standing))
        await self._take_over()
        await self._meet_fleet()
        await self._jwks.start()
        runners = await self._serve()
        # Without them sessions would outlive their time, or what is said of them: their death is ours.
        vital = [self._start_vital(work) for work in self._vital_work()]
        self._leash.tell_serving()
        reason = await self._stopped
        if reason == "replaced":
            for runner in runners:
                for site in list(runner.sites):
                    await site.stop()
            # Callers who are connected may still ask; who connects now waits for the successor.
            await asyncio.sleep(GRACE_SECONDS)
            reason = self._last_reason  # a gateway that ends meanwhile will have no successor
        if reason == "shutdown":
            # Workers drain on the same signal; what they still ask for is answered until they end.
            await self._wait_for_workers()
        await end_tasks(vital)
        for runner in runners:
            await runner.cleanup()
        if self._member is not None:
            await self._member.aclose()  # a fleet's sessions end with none of its replicas
        elif reason in {"shutdown", "supervisor_lost"}:
            await self._close_all(None if reason == "shutdown" else CLOSE_ALL_SECONDS)
        await self._jwks.close()
        self._record_counted()
        try:
            await self._record(ProcessStopped(role=boot.role, reason=reason))
        except AuditUnavailable:
            reason = "audit_unavailable"
        self._journal.close()
        self._keeper.conclude()
        return 0 if reason in {"shutdown", "replaced"} else 1

    async def _record_policies(self, bundle: Bundle) -> None:
        await self._record(PolicyLoaded(digest=bundle.digest, files=bundle.files))

    async def _serve(self) -> list[web.AppRunner]:
        boot, listeners = self._boot, self._boot.config.listeners
        api = SessionsApi(
            ledger=self._ledger,
            verify_identity=self._verify_identity,
            session_tokens=SessionTokenVerifier(self._tokens.public_key, boot.config.name),
            providers={provider.name: provider for provider in providers_from(boot.config)},
            record=self._record,
            refusals=self._refusals,
            proxy_url=boot.addresses["proxy"],
            sessions_url=boot.addresses["sessions"],
            clock=self._clock,
            development=self._development,
            deposit_keys=self._deposit_keys,
            receipts=self._receipts,
            is_draining=self._is_ending,
        )
        operators = Operators(
            verify_identity=self._verify_identity,
            grants=(*boot.config.admin.grants, *(DEVELOPMENT_GRANTS if boot.is_dev else ())),
            step_up=boot.config.admin.step_up,
            record=self._record,
            refusals=self._refusals,
            clock=self._clock,
        )
        admin = admin_app(
            checks=self._checks,
            metrics=self._metrics,
            protections=self._protections,
            operators=operators,
            kills=self._kill_switch,
        )
        try:
            contexts = server_context(listeners.sessions), server_context(listeners.admin)
        except OSError as error:
            raise ConfigurationError((f"certificates: {error}",)) from None
        return [
            await serve(app, socket.socket(fileno=boot.listeners[name]), context)
            for name, app, context in (
                ("sessions", api.app(), contexts[0]),
                ("admin", admin, contexts[1]),
            )
        ]

    def _is_ending(self) -> bool:
        return self._stopped.done() and self._last_reason != "replaced"

    async def _wait_for_workers(self) -> None:
        try:
            async with asyncio.timeout(self._boot.config.timeouts.drain + ACK_SECONDS):
                await self._workers.wait_until_gone()
        except TimeoutError:
            log.error("workers.not_drained")

    async def _close_all(self, seconds: float | None) -> None:
        """Record that every session ended; they end with the gateway even where time runs out."""
        try:
            async with asyncio.timeout(seconds):
                for entry in self._store.held():
                    await self._close(entry.record.session_id, "shutdown")
        except TimeoutError:
            log.error("sessions.not_closed")

    # --- the leash ---

    def _on_order(self, order: Order, sockets: list[socket.socket]) -> None:
        match order:
            case NewRelay():
                for end in sockets:
                    self._start(self._meet_worker(end))
            case Retire():
                self._stop("replaced")
            case Restarts():
                self._restarts = order.counts
            case UsePolicies():
                self._policies_refused = False
                self._start(self._record_policies(order.bundle))
            case PoliciesRefused():
                self._policies_refused = True
                self._start(self._record(PolicyRefused(faults=order.faults)))

    def _on_supervisor_lost(self) -> None:
        self._stop("supervisor_lost")

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- taking over, and telling newcomers ---

    async def _meet_fleet(self) -> None:
        """Reach the shared store, where there is one, before anybody is served."""
        if self._member is None:
            return
        try:
            await self._member.start()
        except StoreRefused as refused:
            if self._boot.run == 1:
                raise ConfigurationError((f"store: {refused}",)) from None
        with suppress(StoreUnavailable):
            await self._close_killed()

    async def _close_killed(self) -> None:
        """End what a control process that died had stopped, and had not ended."""
        if len(self._kills):
            await self._ledger.close_killed(self._kills.standing())

    async def _meet_worker(self, end: socket.socket) -> None:
        link = await Link.open(end, self._on_message, self._on_worker_lost)
        self._relays += 1
        if not link.is_lost and not self._workers.has(link):
            self._newcomers.setdefault(link, _Newcomer())
        self._check_all_told()

    def _on_told(self, link: Link) -> None:
        self._newcomers[link].has_told = True
        if self._has_taken_over:
            self._enlist(link)
        else:
            self._check_all_told()

    def _check_all_told(self) -> None:
        is_complete = self._relays >= self._boot.relays and all(
            each.has_told for each in self._newcomers.values()
        )
        if is_complete and not self._all_told.done():
            self._all_told.set_result(None)

    async def _take_over(self) -> None:
        """Go on with what the workers hold, and let every worker serve."""
        if self._development is not None:
            self._on_keys(ISSUER, self._development.jwks())
        self._check_all_told()
        either: list[asyncio.Future[Any]] = [self._all_told, self._stopped]
        await asyncio.wait(either, timeout=TAKEOVER_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        told = {link: each for link, each in self._newcomers.items() if each.has_told}
        if not self._all_told.done():
            # A worker that says later what it holds is told then what of it is open.
            log.error("takeover.incomplete", workers=len(told))
        elders = [each for each in told.values() if each.hello and not each.hello.is_fresh]
        for elder in elders:
            if elder.hello is not None and elder.hello.kept is not None:
                self._workers.keep(elder.hello.kept)
        takeover = settle([elder.held for elder in elders])
        for link in told:
            self._workers.add(link)
        for held in takeover.half_open:
            self._adopt(held)
            if self._member is None:
                await self._close(held.record.session_id, "half_open")
        for held in takeover.adopted:
            self._adopt(held)
        if self._member is None:
            await self._close_killed()
        if elders:
            log.info("control.took_over", sessions=len(self._store.held()), workers=len(elders))
            await self._record(SessionsAdopted(sessions=len(self._store.held())))
        self._has_taken_over = True
        for link in [link for link, each in self._newcomers.items() if each.has_told]:
            self._enlist(link)

    def _adopt(self, held: Held) -> None:
        self._store.adopt(Entry(held.principal, held.record, held.label, held.used_at))

    def _enlist(self, link: Link) -> None:
        """Tell a worker everything, in one go: nothing can happen between two of these words.

        As much waits to be read as sessions may be open (`sessions.total`), about 1 KB for each.
        """
        newcomer = self._newcomers.pop(link)
        self._workers.add(link)
        link.send(SessionKey(public_key=self._tokens.public_key))
        entries = {entry.record.session_id: entry for entry in self._store.held()}
        holds = {held.record.session_id: held.record.revision for held in newcomer.held}
        link.send(LetStand(n=UNASKED, kills=self._kills.standing()))
        for session_id in holds.keys() - entries.keys():
            link.send(DropSession(n=UNASKED, session_id=session_id, reason="half_open"))
        for session_id, entry in entries.items():
            if holds.get(session_id) != entry.record.revision:
                link.send(
                    PutSession(
                        n=UNASKED,
                        principal=entry.principal,
                        record=entry.record,
                        label=entry.label,
                        used_at=entry.used_at,
                    )
                )
        if self._development is not None:
            link.send(IssuerKeys(issuer=ISSUER, jwks=self._development.jwks()))
        for issuer, jwks in self._jwks.known():
            link.send(IssuerKeys(issuer=issuer, jwks=jwks))
        link.send(self._workers.kept)
        link.send(Serve())
        if self._member is not None and self._member.lease is not None:
            link.send(self._member.lease)

    # --- evidence ---

    async def _record(self, event: Event) -> None:
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_durable(error: AuditUnavailable | None) -> None:
            if durable.done():
                return
            if error is None:
                durable.set_result(None)
            else:
                durable.set_exception(error)

        self._journal.append(event, on_durable)
        try:
            async with asyncio.timeout(self._boot.config.audit.wait):
                await durable
        except TimeoutError:
            raise AuditUnavailable("the disk is too slow") from None

    # --- identity ---

    async def _verify_identity(self, token: bytes) -> Principal:
        try:
            return self._identities.verify(token, self._clock.now()).principal
        except KeysNeeded as needed:
            has_answered = await self._answer_need(needed.issuer)
        try:
            return self._identities.verify(token, self._clock.now()).principal
        except KeysNeeded:
            if not has_answered:
                raise Refused(
                    "identity_unavailable",
                    "The issuer's keys cannot be had now.",
                    retry_after_seconds=5,
                ) from None
            raise Refused("invalid_token", "The token's key is not the issuer's.") from None

    def _on_keys(self, issuer: str, jwks: bytes | None) -> None:
        if jwks is None:
            self._identities.remove_keys(issuer)
        else:
            self._identities.install_keys(issuer, jwks)
        self._workers.tell(IssuerKeys(issuer=issuer, jwks=jwks))

    # --- the workers ---

    def _on_message(self, link: Link, message: Message) -> None:
        match message:
            case Hello():
                self._newcomers.setdefault(link, _Newcomer()).hello = message
            case Held():
                self._newcomers[link].held.append(message)
            case Told():
                self._on_told(link)
            case Ready():
                before = self._workers.ready
                self._workers.on_ready(link, message.worker)
                self._protections[f"worker-{message.worker}"] = message.protections
                if before < self._workers.ready == self._boot.config.workers:
                    self._on_complete()
            case Snapshot():
                self._workers.on_snapshot(link, message.data)
                self._workers.on_answer(link, message.n, message)
            case Ack():
                self._workers.on_answer(link, message.n, message)
            case Touched():
                self._store.touch(message.session_ids, self._clock.now())
            case SessionNeeded() if self._member is not None:
                self._member.need(message.session_id)
            case KeysNeededMessage():
                self._start(self._answer_need(message.issuer))
            case _:
                self._stop("relay_confused")

    def _on_complete(self) -> None:
        addresses = self._boot.addresses
        log.info(
            "workers.complete" if self._has_started else "gateway.started",
            proxy=addresses["proxy"],
            sessions=addresses["sessions"],
            admin=addresses["admin"],
            workers=self._workers.ready,
            version=gateway.__version__,
            boot=self._boot.boot_id,
        )
        self._has_started = True

    async def _answer_need(self, issuer: str) -> bool:
        if self._development is not None and issuer == ISSUER:
            self._on_keys(ISSUER, self._development.jwks())
            return True
        has_answered = await self._jwks.need(issuer)
        if not has_answered:
            self._workers.tell(IssuerAbsent(issuer=issuer))
        return has_answered

    def _on_worker_lost(self, link: Link) -> None:
        self._newcomers.pop(link, None)
        self._workers.lose(link)
        self._check_all_told()
        if link.is_broken:
            self._stop("relay_confused")

    # --- time, health, the end ---

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self._close_due()
            self._deposit_keys.forget_expired()
            self._journal.renew()
            self._record_counted()

    def _record_counted(self) -> None:
        with suppress(AuditUnavailable):
            self._refusals.flush(self._journal.append)

    async def _close_due(self) -> None:
        with suppress(StoreUnavailable):  # the member says so, and calls are refused meanwhile
            for fault in await self._ledger.close_due():
                log.error("session.close_failed", code=fault.code)

    def _vital_work(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        yield "sweeper_died", self._sweep()
        yield "keeper_died", self._keeper.run()
        if self._member is not None:
            yield "follower_died", self._member.follow()

    def _start_vital(self, work: tuple[str, Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        name, coroutine = work
        task = asyncio.get_running_loop().create_task(coroutine)

        def on_ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled():
                log.error("task.died", reason=name, error=type(task.exception()).__name__)
                self._stop(name)

        task.add_done_callback(on_ended)
        return task

    async def _close(self, session_id: str, reason: str) -> None:
        try:
            await self._ledger.close(session_id, reason)
        except (AuditUnavailable, Refused) as error:
            log.error("session.close_failed", code=error.code)

    async def _checks(self) -> dict[str, bool]:
        snapshots = await self._workers.snapshots()
        failed = sum(snapshot["gauges"].get("audit_failed", 0) for snapshot in snapshots)
        return {
            "workers": self._workers.ready == self._boot.config.workers,
            "audit": not failed and not self._journal.has_failed,
            "not_draining": not self._stopped.done(),
            **({} if self._member is None else {"store": self._member.is_live}),
        }

    async def _metrics(self) -> bytes:
        snapshots = await self._workers.snapshots()
        gauges = {
            "sessions_open": float(len(self._store.held())),
            "workers_ready": float(self._workers.ready),
            "policies_refused": float(self._policies_refused),
            "kills_standing": float(len(self._kills)),
            **({} if self._member is None else self._member.gauges),
        }
        counts = {} if self._member is None else self._member.counts
        return await asyncio.to_thread(
            render, snapshots, gauges, self._protections, self._restarts, counts
        )

    def _stop(self, reason: str) -> None:
        self._last_reason = reason
        if not self._stopped.done():
            self._stopped.set_result(reason)


async def _run(boot: Boot, protections: Protections) -> int:
    return await Control(boot, protections).run()


def main() -> int:
    """Run the control process."""
    # Not uvloop: it keeps the last read, a deposit perhaps, in a buffer of the loop's own.
    return run_child(
        _run,
        asyncio.run,
        writes_to=lambda config: [config.state_dir, config.audit.directory],
        wipes=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
