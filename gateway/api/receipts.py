"""Receipts: what callers may keep to prove what was recorded of their calls and sessions.

`GET /v1/receipts/{call_id}` answers with a C2SP tlog-proof of the call's last event, to the caller who
made the call and to nobody else. Whoever closes a session gets a note of it, signed by the deployment.
"""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from aiohttp import web

from gateway.audit.files import Damaged
from gateway.audit.proof import MEDIA_TYPE
from gateway.audit.reading import CALL_ID, Entry, find_call, prove
from gateway.clock import Clock
from gateway.errors import Refused
from gateway.providers.dialect import to_json
from keys.signing import Signer
from policies.request import Principal

SESSION_CONTEXT: Final = "veklom.session.v1"
"""First word of a session's receipt; with the space behind it no checkpoint begins so."""

MAX_SEARCHES: Final = 4
"""At once; each reads what was recorded since the call, about a gigabyte a second."""

_NOT_FOUND: Final = "There is no such call of yours."


class Receipts:
    """Finds and signs receipts."""

    def __init__(self, audit: Path, signer: Signer, clock: Clock) -> None:
        self._audit = audit
        self._signer = signer
        self._clock = clock
        self._searches = 0

    def routes(self, caller: Callable[[web.Request], Awaitable[Principal]]) -> list[web.RouteDef]:
        """Return the routes; `caller` says who asks, or refuses."""

        async def show(request: web.Request) -> web.Response:
            principal = await caller(request)
            text = await self._find(request.match_info["call_id"], principal)
            return web.Response(text=text, content_type=MEDIA_TYPE)

        return [web.get("/v1/receipts/{call_id}", show)]

    async def _find(self, call: str, principal: Principal) -> str:
        if not CALL_ID.fullmatch(call):
            raise Refused("receipt_not_found", _NOT_FOUND)
        if self._searches >= MAX_SEARCHES:
            raise Refused("overloaded", "Too many receipts are sought.", retry_after_seconds=1)
        self._searches += 1
        try:
            proof = await asyncio.to_thread(self._prove, call, principal)
        except (Damaged, OSError, ValueError):
            raise Refused("audit_unavailable", "The audit log cannot be read.") from None
        finally:
            self._searches -= 1
        if proof is None:
            raise Refused("receipt_not_signed", "Ask again.", retry_after_seconds=1)
        return proof

    def _prove(self, call: str, principal: Principal) -> str | None:
        found = find_call(self._audit, call)
        if not any(_is_of(entry, principal) for _, entry in found):
            raise Refused("receipt_not_found", _NOT_FOUND)
        proof = prove(*found[-1])
        return None if proof is None else proof.to_text()

    def of_session(self, session_id: str, principal: Principal, cut_calls: int) -> str:
        """Return the signed note that a caller's session was closed."""
        said = {
            "session_id": session_id,
            "tenant": principal.tenant,
            "issuer": principal.issuer,
            "subject": principal.subject,
            "closed_at": int(self._clock.now()),
            "cut_calls": cut_calls,
        }
        text = f"{SESSION_CONTEXT} {self._signer.name}\n{to_json(said).decode()}\n"
        return self._signer.sign_note(text)


def _is_of(entry: Entry, principal: Principal) -> bool:
    fields = entry.fields
    return (fields.get("tenant"), fields.get("issuer"), fields.get("subject")) == (
        principal.tenant,
        principal.issuer,
        principal.subject,
    )
