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
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web

import gateway
from gateway.api.admin import admin_app
from gateway.api.deposit_keys import DepositKeys
from gateway.api.kills import FILE_NAME, KillFile, KillSwitch
from gateway.api.ledger import Entry, SessionLedger
from gateway.api.operators import Operators
from gateway.api.quiet import serve
from gateway.api.receipts import Receipts
from gateway.api.sessions import SessionsApi
from gateway.audit.event import (
    ConfigurationLoaded,
    Event,
    KillsStanding,
    PolicyLoaded,
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
    policy_set_of,
    protections_event,
    run_child,
    take_signals,
)
from gateway.clock import SystemClock
from gateway.config import ConfigurationError, providers_from
from gateway.errors import Refused
from gateway.identity.dev_issuer import DEVELOPMENT_GRANTS, ISSUER, DevelopmentIssuer
from gateway.identity.jwks import JwksCache
from gateway.identity.session_tokens import SessionTokenIssuer, SessionTokenVerifier
from gateway.identity.tokens import KeysNeeded, TokenVerifier
from gateway.leash import Leash, NewRelay, Order, Restarts, Retire
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
    Snapshot,
    Told,
    Touched,
)
from gateway.relay import (
    KeysNeeded as KeysNeededMessage,
)
from gateway.takeover import settle
from gateway.telemetry.logs import get_log
from gateway.telemetry.metrics import render
from gateway.tls import server_context
from gateway.workers import ACK_SECONDS, Workers
from keys.boot_secrets import BootSecrets
from keys.hpke import DepositKeyRing
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
        self._tokens = SessionTokenIssuer(boot.config.name, secrets.token_seed)
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
        self._ledger = SessionLedger(
            fleet=self._workers,
            tokens=self._tokens,
            record=self._record,
            fingerprint_key=load_or_create_seed(Path(boot.config.state_dir) / "fingerprint.key"),
            kills=self._kills,
            limits=boot.config.sessions,
            clock=self._clock,
        )
        self._tasks: set[asyncio.Task[object]] = set()
        self._relays = 0
        self._newcomers: dict[Link, _Newcomer] = {}
        self._has_taken_over = False
        self._has_started = boot.run > 1
        self._all_told: asyncio.Future[None] = loop.create_future()
        self._restarts: dict[str, int] = {}
        self._stopped: asyncio.Future[str] = loop.create_future()
        self._last_reason = ""
        self._leash = Leash(boot.leash, self._on_order, self._on_supervisor_lost)

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
        files = tuple(source.path for source in boot.policies)
        await self._record(PolicyLoaded(digest=policy_set_of(boot).digest, files=files))
        if len(self._kills):
            standing = tuple(kill.kill_id for kill in self._kills.standing())
            await self._record(KillsStanding(kills=standing))
        await self._take_over()
        await self._jwks.start()
        runners = await self._serve()
        sweeper = asyncio.get_running_loop().create_task(self._sweep())
        # Without the sweep sessions would outlive their time: its death is this process's.
        sweeper.add_done_callback(self._on_sweep_ended)
        keeping = asyncio.get_running_loop().create_task(self._keeper.run())
        # Without its keeper logs would go unnamed: its death is this process's.
        keeping.add_done_callback(self._on_sweep_ended)
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
        for task in (sweeper, keeping):
            task.cancel()
        await asyncio.gather(sweeper, keeping, return_exceptions=True)
        for runner in runners:
            await runner.cleanup()
        if reason in {"shutdown", "supervisor_lost"}:
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
        kill_switch = KillSwitch(
            table=self._kills,
            file=self._kill_file,
            fleet=self._workers,
            ledger=self._ledger,
            record=self._record,
            clock=self._clock,
        )
        admin = admin_app(
            checks=self._checks,
            metrics=self._metrics,
            protections=self._protections,
            operators=operators,
            kills=kill_switch,
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
                for entry in self._ledger.entries():
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

    def _on_supervisor_lost(self) -> None:
        self._stop("supervisor_lost")

    def _start(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- taking over, and telling newcomers ---

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
            await self._close(held.record.session_id, "half_open")
        for held in takeover.adopted:
            self._adopt(held)
        for kill in self._kills.standing():
            # Placed by a control process that died before it had ended all that the kill hits.
            await self._ledger.close_killed(kill)
        if elders:
            log.info("control.took_over", sessions=len(takeover.adopted), workers=len(elders))
            await self._record(SessionsAdopted(sessions=len(takeover.adopted)))
        self._has_taken_over = True
        for link in [link for link, each in self._newcomers.items() if each.has_told]:
            self._enlist(link)

    def _adopt(self, held: Held) -> None:
        self._ledger.adopt(Entry(held.principal, held.record, held.label, held.used_at))

    def _enlist(self, link: Link) -> None:
        """Tell a worker everything, in one go: nothing can happen between two of these words.

        As much waits to be read as sessions may be open (`sessions.total`), about 1 KB for each.
        """
        newcomer = self._newcomers.pop(link)
        self._workers.add(link)
        link.send(SessionKey(public_key=self._tokens.public_key))
        entries = {entry.record.session_id: entry for entry in self._ledger.entries()}
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
                self._ledger.touch(message.session_ids)
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
            for session_id, reason in self._ledger.due():
                await self._close(session_id, reason)
            self._deposit_keys.forget_expired()
            self._journal.renew()
            self._record_counted()

    def _record_counted(self) -> None:
        with suppress(AuditUnavailable):
            self._refusals.flush(self._journal.append)

    def _on_sweep_ended(self, sweeper: asyncio.Task[None]) -> None:
        if not sweeper.cancelled():
            log.error("sweep.died", error=type(sweeper.exception()).__name__)
            self._stop("sweeper_died")

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
        }

    async def _metrics(self) -> bytes:
        snapshots = await self._workers.snapshots()
        gauges = {
            "sessions_open": float(len(self._ledger)),
            "workers_ready": float(self._workers.ready),
            "kills_standing": float(len(self._kills)),
        }
        return await asyncio.to_thread(render, snapshots, gauges, self._protections, self._restarts)

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
