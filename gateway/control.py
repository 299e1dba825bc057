"""The control process: the composition root of everything that people and their tools talk to.

It opens and closes sessions, fetches issuers' keys, answers health and metrics, and tells the
workers what they need to know. It carries no calls.
"""

import asyncio
import socket
from contextlib import suppress
from pathlib import Path

import gateway
from gateway.api.admin import admin_app
from gateway.api.ledger import SessionLedger
from gateway.api.quiet import serve
from gateway.api.sessions import SessionsApi
from gateway.audit.event import (
    ConfigurationLoaded,
    Event,
    PolicyLoaded,
    ProcessStarted,
    ProcessStopped,
)
from gateway.audit.journal import AuditUnavailable, Journal
from gateway.audit.keyfile import load_or_create_seed
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
from gateway.config import providers_from
from gateway.errors import Refused
from gateway.hardening import ProtectionMissing
from gateway.identity.dev_issuer import ISSUER, DevelopmentIssuer
from gateway.identity.jwks import JwksCache
from gateway.identity.session_tokens import SessionTokenIssuer, SessionTokenVerifier
from gateway.identity.tokens import KeysNeeded, TokenVerifier
from gateway.relay import (
    Ack,
    IssuerKeys,
    Link,
    Message,
    Ready,
    SessionKey,
    Snapshot,
    Touched,
)
from gateway.relay import (
    KeysNeeded as KeysNeededMessage,
)
from gateway.telemetry.logs import configure_logs, get_log
from gateway.telemetry.metrics import render
from gateway.tls import server_context
from gateway.workers import ACK_SECONDS, Workers
from policies.request import Principal

SWEEP_SECONDS = 1.0
"""How often sessions are checked for expiry."""

log = get_log()


class Control:
    """The control process's parts."""

    def __init__(self, boot: Boot, protections: dict[str, str]) -> None:
        self._boot = boot
        self._protections = {"supervisor": boot.supervisor_protections, boot.role: protections}
        self._clock = SystemClock()
        self._workers = Workers()
        self._refusals = RefusalBudget(self._clock)
        self._tokens = SessionTokenIssuer(boot.config.name)
        self._development = DevelopmentIssuer() if boot.is_dev else None
        self._identities = TokenVerifier(issuers_of(boot))
        self._jwks = JwksCache(boot.config.jwks, self._clock, self._on_keys)
        self._journal: Journal | None = None
        self._ledger: SessionLedger | None = None
        self._asked: set[asyncio.Task[None]] = set()
        self._stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        boot, config = self._boot, self._boot.config
        watch_over(boot, self._stop)
        loop = asyncio.get_running_loop()
        journal = self._journal = open_journal(boot, self._clock, loop)
        policy_set = policy_set_of(boot)
        await self._record(ProcessStarted(role=boot.role, version=gateway.__version__))
        await self._record(ConfigurationLoaded(digest=boot.config_digest, path=boot.config_path))
        for role, protections in self._protections.items():
            await self._record(protections_event(role, protections))
        files = tuple(source.path for source in boot.policies)
        await self._record(PolicyLoaded(digest=policy_set.digest, files=files))
        fingerprint_key = load_or_create_seed(Path(config.state_dir) / "fingerprint.key")
        ledger = self._ledger = SessionLedger(
            fleet=self._workers,
            tokens=self._tokens,
            record=self._record,
            fingerprint_key=fingerprint_key,
            limits=config.sessions,
            clock=self._clock,
        )
        for fd in boot.relays:
            link = await Link.open(socket.socket(fileno=fd), self._on_message, self._on_worker_lost)
            self._workers.add(link)
        self._workers.tell(SessionKey(public_key=self._tokens.public_key))
        await self._jwks.start()
        if self._development is not None:
            self._on_keys(ISSUER, self._development.jwks())
        api = SessionsApi(
            ledger=ledger,
            verify_identity=self._verify_identity,
            session_tokens=SessionTokenVerifier(self._tokens.public_key, config.name),
            providers={provider.name: provider for provider in providers_from(config)},
            record=self._record,
            refusals=self._refusals,
            proxy_url=boot.addresses["proxy"],
            sessions_url=boot.addresses["sessions"],
            clock=self._clock,
            development=self._development,
            is_draining=self._stopped.done,
        )
        listeners = config.listeners
        runners = [
            await serve(
                api.app(),
                socket.socket(fileno=boot.listeners["sessions"]),
                server_context(listeners.sessions),
            ),
            await serve(
                admin_app(self._checks, self._metrics, self._protections),
                socket.socket(fileno=boot.listeners["admin"]),
                server_context(listeners.admin),
            ),
        ]
        sweeper = loop.create_task(self._sweep())
        # Without the sweep sessions would outlive their time: its death is the gateway's.
        sweeper.add_done_callback(self._on_sweep_ended)
        reason = await self._stopped
        # Workers drain on the same signal; what they still ask for is answered until they are gone.
        await self._wait_for_workers()
        sweeper.cancel()
        await asyncio.gather(sweeper, return_exceptions=True)
        for session_id in ledger.all_ids():
            await self._close(session_id, "shutdown")
        for runner in runners:
            await runner.cleanup()
        await self._jwks.close()
        self._record_counted()
        try:
            await self._record(ProcessStopped(role=boot.role, reason=reason))
        except AuditUnavailable:
            reason = "audit_unavailable"
        journal.close()
        return 0 if reason == "shutdown" else 1

    async def _wait_for_workers(self) -> None:
        try:
            async with asyncio.timeout(self._boot.config.timeouts.drain + ACK_SECONDS):
                await self._workers.all_gone
        except TimeoutError:
            log.error("workers.not_drained")

    # --- evidence ---

    async def _record(self, event: Event) -> None:
        assert self._journal is not None  # noqa: S101 - opened before anything is recorded
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_durable(error: AuditUnavailable | None) -> None:
            if durable.done():
                return
            if error is None:
                durable.set_result(None)
            else:
                durable.set_exception(error)

        self._journal.append(event, on_durable)
        await durable

    # --- identity ---

    async def _verify_identity(self, token: bytes) -> Principal:
        try:
            return self._identities.verify(token, self._clock.now()).principal
        except KeysNeeded as needed:
            await self._answer_need(needed.issuer)
        try:
            return self._identities.verify(token, self._clock.now()).principal
        except KeysNeeded as needed:
            if not self._identities.has_keys(needed.issuer):
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
            case Ready():
                self._workers.on_ready(message.worker)
                self._protections[f"worker-{message.worker}"] = message.protections
                if self._workers.ready == self._boot.config.workers:
                    addresses = self._boot.addresses
                    log.info(
                        "gateway.started",
                        proxy=addresses["proxy"],
                        sessions=addresses["sessions"],
                        admin=addresses["admin"],
                        workers=self._workers.ready,
                        version=gateway.__version__,
                        boot=self._boot.boot_id,
                    )
            case Ack() | Snapshot():
                self._workers.on_answer(link, message.n, message)
            case Touched():
                if self._ledger is not None:
                    self._ledger.touch(message.session_ids)
            case KeysNeededMessage():
                task = asyncio.get_running_loop().create_task(self._answer_need(message.issuer))
                self._asked.add(task)
                task.add_done_callback(self._asked.discard)
            case _:
                self._stop("relay_confused")

    async def _answer_need(self, issuer: str) -> None:
        if self._development is not None and issuer == ISSUER:
            self._on_keys(ISSUER, self._development.jwks())
        else:
            await self._jwks.need(issuer)

    def _on_worker_lost(self, link: Link) -> None:
        self._workers.lose(link)
        self._stop("worker_lost")

    # --- time, health, the end ---

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            if self._ledger is not None:
                for session_id, reason in self._ledger.due():
                    await self._close(session_id, reason)
            self._record_counted()

    def _record_counted(self) -> None:
        if self._journal is not None:
            with suppress(AuditUnavailable):
                self._refusals.flush(self._journal.append)

    def _on_sweep_ended(self, sweeper: asyncio.Task[None]) -> None:
        if not sweeper.cancelled():
            log.error("sweep.died", error=type(sweeper.exception()).__name__)
            self._stop("sweeper_died")

    async def _close(self, session_id: str, reason: str) -> None:
        try:
            if self._ledger is not None:
                await self._ledger.close(session_id, reason)
        except (AuditUnavailable, Refused) as error:
            log.error("session.close_failed", code=error.code)

    async def _checks(self) -> dict[str, bool]:
        snapshots = await self._workers.snapshots()
        failed = sum(snapshot["gauges"]["audit_failed"] for snapshot in snapshots)
        journal = self._journal
        return {
            "workers": self._workers.ready == self._boot.config.workers,
            "audit": not failed and journal is not None and not journal.has_failed,
            "not_draining": not self._stopped.done(),
        }

    async def _metrics(self) -> bytes:
        snapshots = await self._workers.snapshots()
        gauges = {
            "sessions_open": float(len(self._ledger or ())),
            "workers_ready": float(self._workers.ready),
        }
        return await asyncio.to_thread(render, snapshots, gauges, self._protections)

    def _stop(self, reason: str) -> None:
        if not self._stopped.done():
            self._stopped.set_result(reason)


async def _run(boot: Boot, protections: dict[str, str]) -> int:
    return await Control(boot, protections).run()


def main() -> int:
    """Run the control process; its boot message's descriptor is the only argument."""
    boot = boot_argument()
    configure_logs(boot.config.logs.format, boot.config.logs.level, boot.role)
    config = boot.config
    try:
        protections = protect(boot, [config.state_dir, config.audit.directory], wipes=True)
    except ProtectionMissing as missing:
        log.error("process.not_protected", reason=str(missing))
        return 1
    # Not uvloop: it keeps the last read, a deposit perhaps, in a buffer of the loop's own.
    return asyncio.run(_run(boot, protections))


if __name__ == "__main__":
    raise SystemExit(main())
