"""The story of one governed call, in the only order in which it may be told.

`Execution.run` is a generator: it yields what it needs from the world (a body, an issuer's keys, a
durable record, an exchange with the provider) and is resumed with the result. Nothing here waits,
reads a socket or knows of one, so that HTTP, tests and whatever comes later drive the same page.

    1 route   2 identify   3 read the call   4 decide   5 reserve   6 record the start, durably
    7 unseal  8 forward    9 settle          10 record the end, durably

Laws of this file:
- no step may be reached but through the one before it;
- a refusal is recorded too, and stays a refusal when the record fails; of callers whom nobody could
  identify so many are recorded one by one as the budget allows, and the others are counted;
- what was reserved is settled on every way out, and before the end is recorded;
- an end that cannot be recorded never looks like a clean end to the caller.

No I/O.
"""

import secrets
from collections.abc import Generator
from functools import partial
from typing import Any

import msgspec

from gateway.audit.event import CallDenied, CallEnd, CallStart, Facts, UsageRecord
from gateway.audit.journal import AuditUnavailable
from gateway.audit.refusals import RefusalBudget
from gateway.clock import Clock
from gateway.errors import Fault, Refused
from gateway.identity.declarations import declared_labels, declared_purpose
from gateway.identity.session_tokens import SessionTokenVerifier, session_secret
from gateway.identity.sessions import KeyLease, Session, SessionTable
from gateway.identity.slots import find_credentials, query_has_credential
from gateway.identity.tokens import KeysNeeded, TokenVerifier
from gateway.limits.estimates import expected_usage, priced, true_usage
from gateway.limits.headers import degraded_header, rate_limit_headers
from gateway.limits.reservation import Reservation
from gateway.problems import problem_from
from gateway.providers.bodies import MAX_NAME, checked_model
from gateway.providers.dialect import BodyKind, Dialect
from gateway.providers.headers import changed_fields, forwardable
from gateway.providers.multipart import MultipartScanner
from gateway.providers.provider import Provider
from gateway.providers.rewriting import rewrite
from gateway.providers.routes import Route, RouteTable, TargetRefused
from gateway.providers.stream_usage import request_usage
from gateway.response import Header, ResponseGuard
from gateway.story import (
    Admission,
    Admit,
    Answer,
    AwaitKeys,
    AwaitSession,
    Break,
    Command,
    Exchange,
    Finish,
    Forward,
    Limiter,
    PeekBody,
    ReadBody,
    Record,
    RequestHead,
    Story,
)
from gateway.telemetry.metrics import CallMetrics
from keys.region import Slot
from policies.decision import Decision, Verdict
from policies.engine import decide
from policies.facts import to_record
from policies.kills import KillTable
from policies.limits import demands
from policies.obligations import Obligations
from policies.prices import PriceTable
from policies.quota import NOTHING, QuotaStatus, Usage
from policies.request import AccessRequest, ModelCall, Principal
from policies.rules import PolicySet

# --- one call's facts ----------------------------------------------------------------------------


class _Call:
    """What is known of one call so far; each step of the story fills in its part."""

    __slots__ = (
        "asked", "began", "body", "call_id", "client_address", "decided_us", "decision", "dialect",
        "expected", "facts", "inspect", "position", "prices", "principal", "reservation", "route",
        "session", "statuses",
    )  # fmt: skip

    def __init__(self, call_id: str, began: float, client_address: str) -> None:
        self.call_id = call_id
        self.began = began
        self.client_address = client_address
        self.dialect: Dialect | None = None
        self.route: Route | None = None
        self.principal: Principal | None = None
        self.session: Session | None = None
        self.asked: ModelCall | None = None
        self.body: bytes | None = None
        self.inspect: MultipartScanner | None = None
        self.facts: Facts = {}
        self.decision: Decision | None = None
        self.decided_us = 0
        self.prices = PriceTable()
        self.expected = NOTHING
        self.reservation: Reservation | None = None
        self.statuses: tuple[QuotaStatus, ...] = ()
        self.position = ""

    def headers(self) -> list[Header]:
        """Return what every answer about this call says: which it is, and where it is on record."""
        fields = [(b"x-veklom-call", self.call_id.encode())]
        if self.position:
            fields.append((b"x-veklom-receipt", self.position.encode()))
        if self.reservation is not None:
            fields += degraded_header(self.reservation.notes)
        return [*fields, *rate_limit_headers(self.statuses)]


class _Granted(msgspec.Struct, frozen=True, kw_only=True):
    """A call that passed steps 1 to 5: everything that the rest of the story needs, and total."""

    route: Route
    dialect: Dialect
    principal: Principal
    session: Session
    asked: ModelCall
    decision: Decision
    lease: KeyLease


# --- the story -----------------------------------------------------------------------------------


class BodyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a body may be held (`buffered`) and how much streamed (`streamed`, 0: any)."""

    buffered: int
    streamed: int


class Execution:
    """Everything that the calls of one worker share, and the story that each of them is."""

    def __init__(  # noqa: PLR0913 - the composition root names every part once
        self,
        *,
        routes: RouteTable,
        identities: TokenVerifier,
        session_tokens: SessionTokenVerifier,
        sessions: SessionTable,
        policy_set: PolicySet,
        limiter: Limiter,
        kills: KillTable,
        limits: BodyLimits,
        metrics: CallMetrics,
        refusals: RefusalBudget,
        clock: Clock,
    ) -> None:
        self._routes = routes
        self._identities = identities
        self._session_tokens = session_tokens
        self._sessions = sessions
        self._policy_set = policy_set
        self._limiter = limiter
        self._kills = kills
        self._limits = limits
        self._metrics = metrics
        self._refusals = refusals
        self._clock = clock

    def use(self, policy_set: PolicySet) -> None:
        """Decide by another policy set from now on; calls that were decided go on as they were."""
        self._policy_set = policy_set

    def run(self, head: RequestHead) -> Story:
        """Tell the story of one call, from its head to its last recorded word."""
        call = _Call(self._new_call_id(), self._clock.monotonic(), head.client_address)
        try:
            granted = yield from self._admit(call, head)
            start = self._start_event(call, granted)
            # From here on a crash leaves a call without an end: `unclosed`.
            call.position = yield Record(start)
        except Refused as refusal:
            yield from self._refuse(call, refusal)
            return
        except AuditUnavailable:
            self._settle(call)
            unrecorded = Refused("audit_unavailable", "The audit log cannot be written.")
            yield self._answer(call, unrecorded)
            return
        except GeneratorExit:
            self._settle(call)
            raise
        try:
            guard = self._guard(call, granted)
            exchange: Exchange = yield self._forward(call, granted, head, guard)
            said = self._usage(call, granted, exchange, guard)
        except BaseException:
            self._settle(call, call.expected)  # nobody saw what it took
            raise
        usage = self._settle(call, _taken(said, exchange))
        said = msgspec.structs.replace(said, cost_micro_usd=usage.input_cost + usage.output_cost)
        yield from self._conclude(call, granted, exchange, said)

    # 1 to 5

    def _admit(self, call: _Call, head: RequestHead) -> Generator[Command, Any, _Granted]:
        route = self._find_route(call, head)
        session, secret = yield from self._identify(call, head)
        asked_of, lease = route.provider, None
        if not self._policy_set.reroutes:
            # Then a call without a key is refused before its body is read.
            lease = self._lease(session, asked_of, secret)
        asked = yield from self._read(call, head, route)
        principal = call.principal or session.principal
        request = AccessRequest(
            principal=principal,
            call=asked,
            provider=route.provider.facts,
            client_address=head.client_address,
            session_id=session.record.session_id,
            user_agent=head.header(b"user-agent").decode(errors="replace")[:MAX_NAME],
            labels=declared_labels(head.headers),
            purpose=declared_purpose(head.headers),
            now=self._clock.now(),
        )
        policy_set = self._policy_set  # a reload may replace it; this call goes on with this one
        decision = self._decide(call, policy_set, request)
        if decision.verdict is not Verdict.ALLOW:
            code = "policy_error" if decision.verdict is Verdict.ERROR else "policy_denied"
            raise Refused(code, decision.message, rules=decision.rules)
        if decision.obligations is not None:
            route = self._change(call, head, route, decision)
            asked = decision.judged.call
        if lease is None or route.provider is not asked_of:
            lease = self._lease(session, route.provider, secret)
        yield from self._reserve(call, policy_set, decision.judged)
        return _Granted(
            route=route,
            dialect=route.provider.dialect,
            principal=principal,
            session=session,
            asked=asked,
            decision=decision,
            lease=lease,
        )

    def _decide(self, call: _Call, policy_set: PolicySet, request: AccessRequest) -> Decision:
        call.facts = to_record(request)
        began = self._clock.monotonic()
        decision = call.decision = decide(policy_set, request)
        call.decided_us = int((self._clock.monotonic() - began) * 1e6)
        if decision.would is not None:
            self._metrics.observe_would(decision.would.verdict, decision.would.rules)
        return decision

    def _change(self, call: _Call, head: RequestHead, route: Route, decision: Decision) -> Route:
        """Change the call as the policy obliges; return the route that it takes then."""
        obligations, judged = decision.obligations, decision.judged.call
        assert obligations is not None  # noqa: S101 - asked for by who has some
        route = call.route = self._routes.changed(
            route, head.method, head.target, provider=obligations.provider, model=obligations.model
        )
        if obligations.touch_body and call.body:
            call.body = rewrite(route, call.body, obligations, judged)
            judged = msgspec.structs.replace(judged, body_bytes=len(call.body))
        call.asked = judged
        return route

    def _reserve(
        self, call: _Call, policy_set: PolicySet, request: AccessRequest
    ) -> Generator[Command, Any, None]:
        asked, call.prices = request.call, policy_set.prices
        if policy_set.reckons:
            call.expected = expected_usage(asked, call.body, policy_set.prices)
        else:
            call.expected = Usage(request_bytes=max(0, asked.body_bytes))
        wanted = demands(policy_set.limits, request, call.expected, self._clock.now())
        admission: Admission
        if isinstance(wanted, QuotaStatus):
            admission = wanted
        elif self._limiter.waits and wanted:
            admission = yield Admit(partial(self._limiter.begin, wanted, call.call_id))
        else:
            admission = self._limiter.admit(wanted, call.call_id)
        if not isinstance(admission, Reservation):
            call.statuses = (admission,) if admission.code in _REACHED else ()
            raise Refused(
                admission.code,
                _SENTENCES[admission.code].format(admission.name),
                retry_after_seconds=admission.retry_after_seconds,
                limit=admission.name,
            )
        call.reservation = admission
        call.statuses = admission.statuses

    def _find_route(self, call: _Call, head: RequestHead) -> Route:
        try:
            route = self._routes.find(head.method, head.target)
        except TargetRefused as refused:
            call.dialect = refused.dialect
            if head.is_upgrade and refused.dialect is not None:
                # 426 makes agents fall back to plain requests at once; 404 makes them try again.
                raise Refused("websocket_not_supported", "Use plain HTTP requests.") from None
            raise
        call.route = route
        call.dialect = route.provider.dialect
        if head.is_upgrade:
            raise Refused("websocket_not_supported", "Use plain HTTP requests.")
        if b"?" in head.target and query_has_credential(head.target.partition(b"?")[2]):
            raise Refused("credential_in_url", "Send the session token in a header, not the URL.")
        return route

    def _lease(self, session: Session, provider: Provider, secret: bytes) -> KeyLease:
        """Return the right to use the session's key for a provider, unless an operator stopped it."""
        lease = self._sessions.lease(session, provider.name, provider.origin, secret)
        self._refuse_killed(session, lease, provider)
        return lease

    def _refuse_killed(self, session: Session, lease: KeyLease, provider: Provider) -> None:
        kill = self._kills.find(
            session.principal, session.record.session_id, lease.fingerprint, provider.name
        )
        if kill is not None:
            raise Refused("killed", f"An operator stopped this (kill {kill.kill_id}).")

    def _identify(
        self, call: _Call, head: RequestHead
    ) -> Generator[Command, Any, tuple[Session, bytes]]:
        presented = find_credentials(head.headers)
        now = self._clock.now()
        if presented.identity_token is not None:
            call.principal = yield from self._verify_identity(presented.identity_token, now)
        if presented.session_token is None:
            raise Refused(
                "session_required",
                "Open a session with your provider key; see /.well-known/veklom.",
            )
        claims = self._session_tokens.verify(presented.session_token, now)
        session = call.session = self._sessions.find(claims.session_id)
        if self._sessions.must_ask(claims.session_id, claims.generation):
            yield AwaitSession(claims.session_id)
            session = call.session = self._sessions.find(claims.session_id)
        if session is None or session.record.generation != claims.generation:
            raise Refused("session_unknown", "The session is closed or was renewed elsewhere.")
        if session.record.expires_at <= now:
            raise Refused("session_expired", "The session has expired.")
        if call.principal is not None and not _is_same_caller(call.principal, session.principal):
            raise Refused("session_mismatch", "The session belongs to another caller.")
        self._sessions.touch(claims.session_id)
        return session, session_secret(presented.session_token)

    def _verify_identity(self, token: bytes, now: float) -> Generator[Command, Any, Principal]:
        try:
            return self._identities.verify(token, now).principal
        except KeysNeeded as needed:
            yield AwaitKeys(needed.issuer, needed.kid)
        try:
            return self._identities.verify(token, now).principal
        except KeysNeeded:
            raise Refused("invalid_token", "The token's key is not the issuer's.") from None

    def _read(
        self, call: _Call, head: RequestHead, route: Route
    ) -> Generator[Command, Any, ModelCall]:
        if sum(name == b"content-type" for name, _ in head.headers) > 1:
            # Both would go upstream, and which of them counts is not ours to guess.
            raise Refused("invalid_request", "The request has more than one Content-Type.")
        length = head.content_length
        dialect = route.provider.dialect
        if route.body in {BodyKind.JSON, BodyKind.ACTION}:
            if length > self._limits.buffered:
                raise Refused("body_too_large", "The body is larger than may be held.")
            call.body = yield ReadBody(self._limits.buffered)
            asked = dialect.read_call(route, call.body, len(call.body))
        elif route.body is BodyKind.NONE:
            if length:
                raise Refused("invalid_request", "This operation takes no body.")
            call.body = b""
            asked = dialect.read_call(route, None, 0)
        else:
            if self._limits.streamed and length > self._limits.streamed:
                raise Refused("body_too_large", "The body is larger than may be streamed.")
            content_type = head.header(b"content-type")
            model = ""
            if route.body is BodyKind.MULTIPART:
                model = checked_model((yield from self._peek_model(content_type)))
            # The rest is watched as it streams: another model in it breaks the call off.
            call.inspect = MultipartScanner(content_type, expected=model)
            asked = msgspec.structs.replace(dialect.read_call(route, None, length), model=model)
        call.asked = asked
        return asked

    def _peek_model(self, content_type: bytes) -> Generator[Command, Any, str]:
        """Hold the body until its model is known: some SDKs, and curl, send the file first."""
        scanner = MultipartScanner(content_type)

        def is_decided(data: bytes) -> bool:
            scanner.feed(data)
            return scanner.is_decided

        too_much = Refused(
            "body_too_large",
            f"No model in the first {self._limits.buffered} bytes; send `model` before the file.",
        )
        yield PeekBody(self._limits.buffered, is_decided, too_much)
        if not scanner.is_decided:
            scanner.finish()
        return scanner.model

    # 6 to 8

    def _guard(self, call: _Call, granted: _Granted) -> ResponseGuard:
        """Ask the provider for usage where the caller did not, and note to take it out again."""
        asks = False
        if granted.asked.stream and granted.route.provider.request_stream_usage and call.body:
            rewritten = request_usage(granted.route, call.body)
            if rewritten is not None:
                call.body = rewritten
                asks = True
        return ResponseGuard(
            route=granted.route,
            asked=granted.asked,
            credential_bytes=granted.lease.credential_bytes,
            extra_headers=call.headers(),
            blot=granted.lease.blot,
            removes_usage_event=asks,
        )

    def _forward(
        self, call: _Call, granted: _Granted, head: RequestHead, guard: ResponseGuard
    ) -> Forward:
        provider, session, lease = granted.route.provider, granted.session, granted.lease
        before, after = _upstream_head(head, granted.route, call.body, granted.decision.obligations)

        def compose() -> Slot:
            # Once more: a kill may have come while the call waited for its body or its record.
            self._refuse_killed(session, lease, provider)
            return lease.compose_head(before, after)

        return Forward(
            provider=provider,
            session_id=session.record.session_id,
            lease=lease,
            compose=compose,
            body=call.body,
            response=guard,
            inspect=call.inspect,
            is_head=head.method == b"HEAD",
        )

    # 9 and 10

    def _usage(
        self, call: _Call, granted: _Granted, exchange: Exchange, guard: ResponseGuard
    ) -> UsageRecord:
        return true_usage(
            granted.asked,
            call.body,
            guard.usage(),
            status=exchange.upstream_status,
            was_sent=exchange.request_bytes > 0,
            is_whole=exchange.outcome == "complete",
            passed=guard.tokens_passed,
        )

    def _settle(self, call: _Call, usage: Usage = NOTHING) -> Usage:
        """Count what the call took, nothing where it went nowhere; return it with what it cost."""
        if call.asked is not None:
            usage = priced(usage, call.asked, call.prices)
        if call.reservation is not None:
            self._limiter.settle(call.reservation, usage)
        return usage

    def _conclude(
        self, call: _Call, granted: _Granted, exchange: Exchange, usage: UsageRecord
    ) -> Story:
        try:
            yield Record(self._end_event(call, granted, exchange, usage))
        except AuditUnavailable:
            # The caller must not take an unrecorded call for a finished one.
            exchange.outcome, exchange.fault = "audit_unavailable", Fault.GATEWAY
            if exchange.refusal is None:
                self._observe(call, granted, exchange, usage)
                yield Break()
                return
        self._observe(call, granted, exchange, usage)
        if exchange.refusal is not None:
            yield self._answer(call, exchange.refusal)
        elif exchange.outcome == "complete":
            yield Finish()
        else:
            yield Break()

    def _refuse(self, call: _Call, refusal: Refused) -> Story:
        self._settle(call)
        problem = problem_from(refusal)
        self._metrics.observe_denied(refusal.code)
        event = self._denied_event(call, refusal, problem.status)
        try:
            if event.is_anonymous and not self._refusals.spend():
                self._refusals.count(problem.code)
            else:
                call.position = yield Record(event)
        except AuditUnavailable:
            # A denial stays a denial; what cannot be recorded on its own may yet be counted.
            self._metrics.observe_unrecorded_denial()
            if event.is_anonymous:
                self._refusals.count(problem.code)
        yield self._answer(call, refusal)

    def _answer(self, call: _Call, refusal: Refused) -> Answer:
        problem = problem_from(refusal, decision_id=call.call_id)
        return Answer(problem, call.dialect, call.headers())

    # what is written down

    def _new_call_id(self) -> str:
        return f"{int(self._clock.now() * 1000):012x}{secrets.token_hex(10)}"

    def _start_event(self, call: _Call, granted: _Granted) -> CallStart:
        asked, route = granted.asked, granted.route
        return CallStart(
            call=call.call_id,
            tenant=granted.principal.tenant,
            issuer=granted.principal.issuer,
            subject=granted.principal.subject,
            session=granted.session.record.session_id,
            provider=route.provider.name,
            operation=route.operation,
            dialect=granted.dialect.name,
            model=asked.model,
            stream=asked.stream,
            max_tokens=asked.max_tokens,
            request_bytes=asked.body_bytes,
            client_address=call.client_address,
            rules=granted.decision.rules,
            policy=granted.decision.policy_digest,
            credential=granted.lease.fingerprint,
            upstream=route.provider.origin,
            limits=call.reservation.notes if call.reservation else (),
            facts=call.facts,
            changes=granted.decision.changes,
            decided_us=call.decided_us,
            **_would(granted.decision),
        )

    def _end_event(
        self, call: _Call, granted: _Granted, exchange: Exchange, usage: UsageRecord
    ) -> CallEnd:
        return CallEnd(
            call=call.call_id,
            tenant=granted.principal.tenant,
            outcome=exchange.outcome,
            fault=exchange.fault,
            code=exchange.refusal.code if exchange.refusal else "",
            status=problem_from(exchange.refusal).status if exchange.refusal else exchange.status,
            upstream_status=exchange.upstream_status,
            request_bytes=exchange.request_bytes,
            response_bytes=exchange.response_bytes,
            usage=usage,
            first_byte_us=int(exchange.first_byte_seconds * 1e6),
            total_us=int((self._clock.monotonic() - call.began) * 1e6),
        )

    def _denied_event(self, call: _Call, refusal: Refused, status: int) -> CallDenied:
        principal = call.principal or (call.session.principal if call.session else None)
        route, asked, decision = call.route, call.asked, call.decision
        return CallDenied(
            call=call.call_id,
            tenant=principal.tenant if principal else "",
            issuer=principal.issuer if principal else "",
            subject=principal.subject if principal else "",
            session=call.session.record.session_id if call.session else "",
            provider=route.provider.name if route else "",
            operation=route.operation if route else "",
            model=asked.model if asked else "",
            code=refusal.code,
            status=status,
            rules=refusal.rules,
            policy=decision.policy_digest if decision else "",
            client_address=call.client_address,
            reasons=decision.reasons if decision else (),
            limit=refusal.limit,
            facts=call.facts,
            decided_us=call.decided_us,
            **_would(decision),
        )

    def _observe(
        self, call: _Call, granted: _Granted, exchange: Exchange, usage: UsageRecord
    ) -> None:
        self._metrics.observe_call(
            provider=granted.route.provider.name,
            operation=granted.route.operation,
            outcome=exchange.outcome,
            status=exchange.status,
            seconds=self._clock.monotonic() - call.began,
            first_byte_seconds=exchange.first_byte_seconds,
            input_tokens=usage.input if usage.source == "provider" else 0,
            output_tokens=usage.output if usage.source == "provider" else 0,
        )


def _taken(said: UsageRecord, exchange: Exchange) -> Usage:
    return Usage(
        input=said.input,
        output=said.output,
        cache_read=said.cache_read,
        cache_write=said.cache_write,
        request_bytes=exchange.request_bytes,
        response_bytes=exchange.response_bytes,
    )


_REACHED = frozenset({"rate_limit_exceeded", "concurrency_limit_exceeded", "budget_exceeded"})
_SENTENCES = {
    **dict.fromkeys(_REACHED, "The limit {!r} is reached."),
    "call_exceeds_limit": "This call may take more than the limit {!r} ever allows at once.",
    "price_unknown": "The budget {!r} cannot tell what this model costs.",
    "limits_unavailable": "The limit {!r} cannot be counted now.",
}


def _would(decision: Decision | None) -> dict[str, Any]:
    """Return what an event says of rules in shadow."""
    if decision is None or decision.would is None:
        return {}
    would = decision.would
    return {
        "would": would.verdict.value,
        "would_rules": would.rules,
        "would_reasons": would.reasons + would.changes,
    }


def _is_same_caller(one: Principal, other: Principal) -> bool:
    return (
        one.issuer == other.issuer and one.subject == other.subject and one.tenant == other.tenant
    )


def _upstream_head(
    head: RequestHead, route: Route, body: bytes | None, obligations: Obligations | None
) -> tuple[bytes, bytes]:
    """Return the upstream head up to the credential, and from there on."""
    provider = route.provider
    lines = [
        b"%b %b HTTP/1.1\r\nhost: %b" % (head.method, route.upstream_target, provider.authority)
    ]
    fields = forwardable(provider.dialect, head.headers)
    if obligations is not None:
        fields = changed_fields(fields, obligations)
    lines += [b"%b: %b" % field for field in fields]
    if body is None:
        length = head.content_length
        framing = b"content-length: %d" % length if length >= 0 else b"transfer-encoding: chunked"
        lines.append(framing)
    elif body or head.method not in {b"GET", b"HEAD", b"DELETE"}:
        lines.append(b"content-length: %d" % len(body))
    lines.append(b"%b: %b" % (provider.auth_header, provider.auth_prefix))
    return b"\r\n".join(lines), b"\r\n\r\n"
