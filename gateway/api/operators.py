"""Who may operate the gateway: an identity, a permission for each route, and a fresh proof to change."""

from collections.abc import Awaitable, Callable, Iterable

from aiohttp import web

from gateway.api.ledger import Recorder
from gateway.api.quiet import presented
from gateway.audit.event import AdminRefused
from gateway.audit.journal import AuditUnavailable
from gateway.audit.refusals import RefusalBudget
from gateway.clock import Clock
from gateway.errors import Refused
from policies.request import Principal
from policies.roles import CHANGING, Grant, Permission, StepUp, permissions_of

Action = Callable[[web.Request, Principal], Awaitable[web.Response]]
Handler = Callable[[web.Request], Awaitable[web.Response]]


class Operators:
    """Lets operators through to what they may do; everybody else is refused, on record."""

    def __init__(  # noqa: PLR0913 - the composition root names every part once
        self,
        *,
        verify_identity: Callable[[bytes], Awaitable[Principal]],
        grants: Iterable[Grant],
        step_up: StepUp,
        record: Recorder,
        refusals: RefusalBudget,
        clock: Clock,
    ) -> None:
        self._verify_identity = verify_identity
        self._grants = tuple(grants)
        self._step_up = step_up
        self._record = record
        self._refusals = refusals
        self._clock = clock

    def only(
        self, permission: Permission, action: Action
    ) -> Callable[[web.Request], Awaitable[web.Response]]:
        """Return a handler that runs `action` for whoever holds `permission`."""

        async def handler(request: web.Request) -> web.Response:
            principal: Principal | None = None
            try:
                principal = await self._identify(request)
                self._authorise(principal, permission)
                return await action(request, principal)
            except AuditUnavailable:
                raise Refused(
                    "audit_unavailable", "It is done, but could not be recorded."
                ) from None
            except Refused as refusal:
                await self._record_refusal(request, permission, principal, refusal)
                raise

        return handler

    async def _identify(self, request: web.Request) -> Principal:
        token = presented(request).identity_token
        if token is None:
            raise Refused("no_credentials", "Send your identity provider's token as Bearer.")
        return await self._verify_identity(token)

    def _authorise(self, principal: Principal, permission: Permission) -> None:
        if permission not in permissions_of(principal, self._grants):
            raise Refused("permission_denied", f"This needs the permission {permission}.")
        if permission in CHANGING and not self._step_up.is_met(principal, self._clock.now()):
            raise Refused(
                "step_up_required",
                "Sign in again with a second factor.",
                challenge=self._step_up.to_challenge(),
            )

    async def _record_refusal(
        self,
        request: web.Request,
        permission: Permission,
        principal: Principal | None,
        refusal: Refused,
    ) -> None:
        event = AdminRefused(
            action=permission,
            issuer=principal.issuer if principal else "",
            subject=principal.subject if principal else "",
            code=refusal.code,
            client_address=request.remote or "",
        )
        if event.is_anonymous and not self._refusals.spend():
            self._refusals.count(event.code)
            return
        try:
            await self._record(event)
        except AuditUnavailable:
            # A refusal stays a refusal, even if it cannot be recorded.
            if event.is_anonymous:
                self._refusals.count(event.code)
