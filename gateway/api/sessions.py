"""`/v1/sessions`: callers open, renew, rotate and close sessions. The only listener that hears keys."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

import msgspec
from aiohttp import web

from gateway.api.deposit_keys import DepositKeys
from gateway.api.deposits import MAX_BODY_BYTES, read_open_request, read_rotate_request
from gateway.api.ledger import Recorder, SessionLedger, wipe
from gateway.api.quiet import body_of, presented, problems
from gateway.api.receipts import Receipts
from gateway.audit.event import SessionRefused
from gateway.audit.journal import AuditUnavailable
from gateway.audit.refusals import RefusalBudget
from gateway.clock import Clock
from gateway.errors import Refused
from gateway.identity.dev_issuer import DevelopmentIssuer
from gateway.identity.session_tokens import SessionTokenVerifier, session_secret
from gateway.providers.provider import Provider
from gateway.store.sessions import Entry
from policies.request import Principal

VerifyIdentity = Callable[[bytes], Awaitable[Principal]]

_PRINCIPAL: Final = web.RequestKey("principal", Principal)


class _RenewRequest(msgspec.Struct, forbid_unknown_fields=True):
    ttl_seconds: int | None = None


class _DevelopmentTokenRequest(msgspec.Struct, forbid_unknown_fields=True):
    subject: str = "dev"
    tenant: str = "dev"
    roles: tuple[str, ...] = ()
    amr: tuple[str, ...] = ()
    ttl_seconds: int = 3600


class SessionsApi:
    """The handlers of the sessions listener."""

    def __init__(  # noqa: PLR0913 - the composition root names every part once
        self,
        *,
        ledger: SessionLedger,
        verify_identity: VerifyIdentity,
        session_tokens: SessionTokenVerifier,
        providers: Mapping[str, Provider],
        record: Recorder,
        refusals: RefusalBudget,
        proxy_url: str,
        sessions_url: str,
        clock: Clock,
        deposit_keys: DepositKeys,
        receipts: Receipts,
        development: DevelopmentIssuer | None,
        is_draining: Callable[[], bool],
    ) -> None:
        self._ledger = ledger
        self._verify_identity = verify_identity
        self._session_tokens = session_tokens
        self._providers = providers
        self._record = record
        self._refusals = refusals
        self._proxy_url = proxy_url
        self._sessions_url = sessions_url
        self._clock = clock
        self._deposit_keys = deposit_keys
        self._receipts = receipts
        self._development = development
        self._is_draining = is_draining

    def app(self) -> web.Application:
        """Return the application with every route of this listener."""
        app = web.Application(middlewares=[problems], client_max_size=MAX_BODY_BYTES)
        app.add_routes(
            [
                web.post("/v1/sessions", self.open),
                web.get("/v1/sessions", self.list),
                web.get("/v1/sessions/{session_id}", self.show),
                web.post("/v1/sessions/{session_id}/renew", self.renew),
                web.post("/v1/sessions/{session_id}/rotate", self.rotate),
                web.delete("/v1/sessions/{session_id}", self.close),
                web.get("/.well-known/veklom", self.well_known),
                web.get("/.well-known/veklom-hpke", self.published_keys),
            ]
        )
        app.add_routes(self._receipts.routes(self._caller))
        if self._development is not None:
            app.add_routes([web.post("/dev/token", self.development_token)])
        return app

    async def well_known(self, _request: web.Request) -> web.Response:
        """Say where sessions are opened and calls are sent."""
        return web.json_response(
            {"sessions": f"{self._sessions_url}/v1/sessions", "proxy": self._proxy_url}
        )

    async def published_keys(self, _request: web.Request) -> web.Response:
        """Publish the keys to which deposits may be sealed."""
        return web.Response(
            body=self._deposit_keys.document(),
            content_type="application/json",
            headers={"cache-control": "no-store"},
        )

    async def open(self, request: web.Request) -> web.Response:
        """Seal the deposited keys and answer with the session token."""
        return await self._audited(request, self._open)

    async def _open(self, request: web.Request) -> web.Response:
        self._refuse_when_draining()
        principal = await self._caller(request)
        asked, deposits = read_open_request(
            await body_of(request),
            self._providers,
            lambda sealed: self._deposit_keys.open(sealed, principal),
        )
        entry, token = await self._ledger.open(
            principal,
            deposits,
            ttl_seconds=asked.ttl_seconds,
            idle_seconds=asked.idle_seconds,
            label=asked.label,
            form=asked.form,
            client_address=request.remote or "",
        )
        return self._with_token(entry, token, status=201)

    async def list(self, request: web.Request) -> web.Response:
        """List the caller's own sessions."""
        principal = await self._caller(request)
        sessions = [entry.to_public() for entry in await self._ledger.list_of(principal)]
        return web.json_response({"sessions": sessions})

    async def show(self, request: web.Request) -> web.Response:
        """Show one of the caller's own sessions."""
        principal = await self._caller(request)
        entry = await self._ledger.find(request.match_info["session_id"], principal)
        return web.json_response(entry.to_public())

    async def renew(self, request: web.Request) -> web.Response:
        """Let a session live longer, under a new token; needs both halves of who may."""
        return await self._audited(request, self._renew)

    async def _renew(self, request: web.Request) -> web.Response:
        self._refuse_when_draining()
        principal = await self._caller(request)
        try:
            asked = msgspec.json.decode(await body_of(request) or b"{}", type=_RenewRequest)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Refused("invalid_body", 'Send {"ttl_seconds": …}, or nothing.') from None
        entry, secret = await self._holder(request, principal)
        entry, renewed = await self._ledger.renew(entry, secret, asked.ttl_seconds)
        return self._with_token(entry, renewed, status=200)

    async def rotate(self, request: web.Request) -> web.Response:
        """Replace keys of a session, which keeps its token; needs both halves of who may."""
        return await self._audited(request, self._rotate)

    async def _rotate(self, request: web.Request) -> web.Response:
        self._refuse_when_draining()
        principal = await self._caller(request)
        asked, deposits = read_rotate_request(
            await body_of(request),
            self._providers,
            lambda sealed: self._deposit_keys.open(sealed, principal),
        )
        try:
            entry, secret = await self._holder(request, principal)
        except Refused:
            wipe(deposits)
            raise
        entry = await self._ledger.rotate(
            entry,
            secret,
            deposits,
            overlap_seconds=asked.overlap_seconds,
            client_address=request.remote or "",
            form=asked.form,
        )
        response = web.json_response(entry.to_public())
        response.force_close()  # as after an opening: the request held a key
        return response

    async def _holder(self, request: web.Request, principal: Principal) -> tuple[Entry, bytes]:
        """Return the session, and the secret of whoever may change it: its caller with its token.

        Whether it is still as it was read, the store says when it is changed.
        """
        entry = await self._ledger.find(request.match_info["session_id"], principal)
        token = presented(request).session_token
        if token is None:
            raise Refused("session_required", "Send the session token in X-Veklom-Session.")
        claims = self._session_tokens.verify(token, self._clock.now())
        record = entry.record
        if (claims.session_id, claims.generation) != (record.session_id, record.generation):
            raise Refused("session_mismatch", "The token is not this session's latest.")
        return entry, session_secret(token)

    async def close(self, request: web.Request) -> web.Response:
        """Destroy one of the caller's own sessions and cut its live calls."""
        principal = await self._caller(request)
        session_id = request.match_info["session_id"]
        try:
            cut = await self._ledger.close_own(session_id, principal)
        except AuditUnavailable:
            raise Refused(
                "audit_unavailable", "The session is closed, but that could not be recorded."
            ) from None
        receipt = self._receipts.of_session(session_id, principal, cut)
        return web.json_response({"session_id": session_id, "cut_calls": cut, "receipt": receipt})

    async def development_token(self, request: web.Request) -> web.Response:
        """Mint a development identity."""
        # A name that resolves to loopback may be a web page's (DNS rebinding); an address is not.
        if self._development is None or request.url.host not in {"127.0.0.1", "::1", "localhost"}:
            raise Refused("unknown_route", "There is nothing here.")
        try:
            asked = msgspec.json.decode(await body_of(request), type=_DevelopmentTokenRequest)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Refused(
                "invalid_body", "Send subject, tenant, roles, amr and ttl_seconds."
            ) from None
        token = self._development.mint(
            subject=asked.subject,
            tenant=asked.tenant,
            roles=asked.roles,
            amr=asked.amr,
            now=int(self._clock.now()),
            ttl_seconds=asked.ttl_seconds,
        )
        return web.json_response({"token": token})

    async def _caller(self, request: web.Request) -> Principal:
        token = presented(request).identity_token
        if token is None:
            raise Refused("no_credentials", "Send your identity provider's token as Bearer.")
        principal = request[_PRINCIPAL] = await self._verify_identity(token)
        return principal

    def _refuse_when_draining(self) -> None:
        if self._is_draining():
            raise Refused("draining", "The gateway is shutting down.", retry_after_seconds=5)

    async def _audited(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.Response]]
    ) -> web.Response:
        """Run a handler whose refusals are evidence too; without evidence nothing is granted."""
        try:
            return await handler(request)
        except AuditUnavailable:
            raise Refused("audit_unavailable", "The audit log cannot be written.") from None
        except Refused as refusal:
            await self._record_refusal(_refused(refusal, request))
            raise

    async def _record_refusal(self, event: SessionRefused) -> None:
        """Record a refusal, or count it where nobody can be identified and the budget is spent."""
        if event.is_anonymous and not self._refusals.spend():
            self._refusals.count(event.code)
            return
        try:
            await self._record(event)
        except AuditUnavailable:
            # A refusal stays a refusal, even if it cannot be recorded.
            if event.is_anonymous:
                self._refusals.count(event.code)

    def _with_token(self, entry: Entry, token: str, *, status: int) -> web.Response:
        public = entry.to_public()
        providers = {
            each.provider: {
                "base_url": f"{self._proxy_url}/{each.provider}"
                + ("/v1" if self._providers[each.provider].dialect.name == "openai" else ""),
                "fingerprint": each.fingerprint,
            }
            for each in entry.record.credentials
            if each.provider in self._providers  # a reload may have taken it out
        }
        response = web.json_response(
            {**public, "token": token, "providers": providers},
            status=status,
            headers={"cache-control": "no-store"},
        )
        # An idle keep-alive connection would keep the last request, and the key in it, alive.
        response.force_close()
        return response


def _refused(refusal: Refused, request: web.Request) -> SessionRefused:
    principal = request.get(_PRINCIPAL)
    return SessionRefused(
        tenant=principal.tenant if principal else "",
        issuer=principal.issuer if principal else "",
        subject=principal.subject if principal else "",
        code=refusal.code,
        client_address=request.remote or "",
    )
