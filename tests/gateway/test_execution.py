"""The story of one call, told without any I/O: its order, its ends, and what it never forgets."""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from gateway.audit.event import CallDenied, CallEnd, CallStart, RefusalsCounted
from gateway.audit.journal import MAX_EVENT_BYTES, AuditUnavailable
from gateway.audit.refusals import REFUSALS_AT_ONCE, REFUSALS_PER_SECOND, RefusalBudget
from gateway.errors import Refused
from gateway.execution import BodyLimits, Execution
from gateway.identity.dev_issuer import DEVELOPMENT, ISSUER, DevelopmentIssuer
from gateway.identity.session_tokens import SessionTokenIssuer, SessionTokenVerifier
from gateway.identity.sessions import SessionTable
from gateway.identity.tokens import TokenVerifier
from gateway.limits.estimates import estimate_tokens
from gateway.limits.memory_store import MemoryLimiter
from gateway.limits.reservation import Warned
from gateway.providers.provider import Provider
from gateway.providers.routes import RouteTable
from gateway.story import (
    Admit,
    Answer,
    AwaitKeys,
    AwaitSession,
    Break,
    Command,
    Exchange,
    Finish,
    Forward,
    PeekBody,
    ReadBody,
    Record,
    RequestHead,
)
from gateway.telemetry.metrics import CallMetrics
from keys.region import SecretRegion
from keys.secret import Secret
from keys.session import Deposit, SessionRecord, seal_session
from keys.vault import SessionVault
from keys.wrapping import Wrapping
from policies.engine import decide
from policies.facts import from_record
from policies.kills import Kill, KillTable, Scope
from policies.known import Known
from policies.request import Principal, ProviderFacts
from policies.rules import load_policy_set

BOOT_KEY = b"b" * 32

KEY = b"sk-planted-key"
DIALECT = ProviderFacts(dialect="openai")
NOW = 1_800_000_000
POLICY = """\
rules:
  - {id: acme, effect: allow, match: {tenant: acme}}
  - {id: no-forbidden, effect: deny, match: {model: forbidden}}
  - {id: no-eu, effect: deny, match: {provider: eu}, mode: shadow}
  - id: short
    effect: transform
    match: {model: long}
    change: {max_tokens: {max: 5}, headers: {set: {openai-project: p}}}
  - {id: home, effect: transform, match: {model: far}, change: {provider: eu}}
limits:
  - {name: one, key: [tenant], concurrent: {max: 1}}
"""
BODY = b'{"model":"gpt-x","messages":[]}'
ALICE = Principal(issuer=ISSUER, subject="alice", tenant="acme")


class StoppedClock:
    """Stands at one instant until it is moved."""

    def __init__(self) -> None:
        self.at = float(NOW)

    def now(self) -> float:
        """Return the instant."""
        return self.at

    def monotonic(self) -> float:
        """Return the same."""
        return self.at


class House:
    """Every real part of a worker's governed path, and none of its sockets."""

    def __init__(self, policy: str = POLICY, *, is_shared: bool = False) -> None:
        self.clock = StoppedClock()
        self.warnings: list[Warned] = []
        self.provider = Provider.from_url(
            "openai", "openai", "https://api.openai.com/v1", request_stream_usage=True
        )
        self.elsewhere = Provider.from_url(
            "eu", "openai", "https://eu.example.com/llm", request_stream_usage=True
        )
        self.region = SecretRegion.open(slots=2)
        vault = SessionVault(self.region, Wrapping(BOOT_KEY))
        self.sessions = SessionTable(vault, self.clock, is_shared=is_shared)
        self.kills = KillTable()
        self.tokens = SessionTokenIssuer("test", secrets.token_bytes(32))
        self.issuer = DevelopmentIssuer()
        self.identities = TokenVerifier((DEVELOPMENT,))
        self.refusals = RefusalBudget(self.clock)
        self.metrics = CallMetrics()
        self.policy_set = load_policy_set(
            [("p.yaml", policy)], Known.of({"openai": DIALECT, "eu": DIALECT})
        )
        self.use(MemoryLimiter(self.clock, self.warnings.append))
        self.record = SessionRecord(
            session_id="ab" * 16, tenant=ALICE.tenant, issuer=ALICE.issuer, subject=ALICE.subject,
            generation=1, revision=1, created_at=NOW, expires_at=NOW + 100, idle_seconds=100,
            credentials=(),
        )  # fmt: skip
        self.token = self.open()

    def use(self, limiter: MemoryLimiter) -> None:
        """Tell stories whose limits are counted there."""
        self.execution = Execution(
            routes=RouteTable([self.provider, self.elsewhere]),
            identities=self.identities,
            session_tokens=SessionTokenVerifier(self.tokens.public_key, "test"),
            sessions=self.sessions,
            policy_set=self.policy_set,
            limiter=limiter,
            kills=self.kills,
            limits=BodyLimits(buffered=1000, streamed=0),
            metrics=self.metrics,
            refusals=self.refusals,
            clock=self.clock,
        )

    def open(self, name: str = "openai") -> str:
        """Serve a session that holds a key for one provider; return its token."""
        provider = self.provider if name == "openai" else self.elsewhere
        deposit = Deposit(provider=name, origin=provider.origin, credential=Secret(bytearray(KEY)))
        self.record, secret = seal_session(
            replace(self.record, credentials=()), [deposit], bytes(32)
        )
        self.sessions.put(ALICE, Wrapping(BOOT_KEY).wrap(self.record))
        return self.tokens.mint(
            session_id=self.record.session_id, generation=self.record.generation,
            subject=ALICE.subject, tenant=ALICE.tenant, secret=secret, now=NOW,
            expires_at=self.record.expires_at,
        )  # fmt: skip

    def head(self, token: str | None = None, **fields: str) -> RequestHead:
        """Return the head of a chat call."""
        headers = [(b"host", b"g"), (b"authorization", b"Bearer " + (token or self.token).encode())]
        headers += [(name.replace("_", "-").encode(), v.encode()) for name, v in fields.items()]
        return RequestHead(
            method=b"POST", target=b"/openai/v1/chat/completions", headers=headers,
            content_length=len(BODY), client_address="127.0.0.1",
        )  # fmt: skip

    def tell(
        self, head: RequestHead | None = None, answers: Mapping[Any, Any] | None = None
    ) -> list[Command]:
        """Tell a story to its end; `answers` are sent, or thrown where they are exceptions."""
        given: dict[Any, Any] = {ReadBody: BODY, Forward: Exchange(status=200, upstream_status=200)}
        given.update(answers or {})
        story = self.execution.run(head or self.head())
        told: list[Command] = []
        try:
            command = next(story)
            while True:
                told.append(command)
                answer: Any = given.get(type(command))
                if callable(answer):
                    answer = answer(command)
                failed = isinstance(answer, Exception)
                command = story.throw(answer) if failed else story.send(answer)
        except StopIteration:
            return told


@pytest.fixture
def house() -> House:
    """A fresh one."""
    return House()


def kinds(told: list[Command]) -> list[str]:
    """Return what was asked for, records by their event."""
    return [type(c.event if isinstance(c, Record) else c).__name__ for c in told]


def code_of(told: list[Command]) -> str:
    """Return the code of the answer that ends a story."""
    answer = told[-1]
    assert isinstance(answer, Answer)
    return answer.problem.code


def test_a_good_call(house: House) -> None:
    """Body, durable start, exchange, durable end, finish: in this order and nothing else."""
    told = house.tell()
    assert kinds(told) == ["ReadBody", "CallStart", "Forward", "CallEnd", "Finish"]
    start, end = told[1].event, told[3].event  # type: ignore[union-attr]
    assert isinstance(start, CallStart)
    assert isinstance(end, CallEnd)
    assert (start.call, start.rules, start.model) == (end.call, ("acme",), "gpt-x")


def test_an_obligation_is_met_and_recorded(house: House) -> None:
    """The body, the head and the record say what a transform made of the call."""
    told = house.tell(answers={ReadBody: b'{"model":"long","max_tokens": 50}'})
    start, forward = told[1].event, told[2]  # type: ignore[union-attr]
    assert isinstance(start, CallStart)
    assert isinstance(forward, Forward)
    assert forward.body == b'{"model":"long","max_tokens": 5}'
    slot = forward.compose()
    head = bytes(slot.view)
    slot.release()
    assert b"\r\nopenai-project: p\r\n" in head
    assert b"\r\ncontent-length: %d\r\n" % len(forward.body) in head
    assert start.changes == ("short: max_tokens = 5, asked 50", "short: header openai-project set")
    assert (start.max_tokens, start.facts["max_tokens"]) == (5, 50)


def test_a_call_is_routed_where_the_session_has_a_key(house: House) -> None:
    """A transform sends the call to another provider, with that provider's key, or not at all."""
    far = {ReadBody: b'{"model":"far"}'}
    assert code_of(house.tell(answers=far)) == "no_key_for_provider"
    house.token = house.open("eu")
    told = house.tell(answers=far)
    start, forward = told[1].event, told[2]  # type: ignore[union-attr]
    assert isinstance(start, CallStart)
    assert isinstance(forward, Forward)
    assert (start.provider, start.upstream) == ("eu", "https://eu.example.com")
    slot = forward.compose()
    assert bytes(slot.view).startswith(
        b"POST /llm/chat/completions HTTP/1.1\r\nhost: eu.example.com\r\n"
    )
    slot.release()


def test_a_shadow_verdict_is_recorded_and_counted(house: House) -> None:
    """What a rule in shadow would have decided stands in the record and the metric; the call passes."""
    house.token = house.open("eu")
    told = house.tell(answers={ReadBody: b'{"model":"far"}'})
    start = told[1].event  # type: ignore[union-attr]
    assert isinstance(start, CallStart)
    assert (start.would, start.would_rules) == ("deny", ("no-eu",))
    assert start.would_reasons == ("deny 'no-eu' matched",)
    assert kinds(told)[-1] == "Finish"
    assert house.metrics.snapshot({})["would"] == {"deny no-eu": 1}


def test_what_a_caller_declares_is_asked_and_stays_here(house: House) -> None:
    """Labels and purpose are facts of the question; the provider does not see them."""
    head = house.head(x_veklom_labels="Contract, draft", x_veklom_purpose="review")
    told = house.tell(head)
    start, forward = told[1].event, told[2]  # type: ignore[union-attr]
    assert isinstance(start, CallStart)
    assert isinstance(forward, Forward)
    assert (start.facts["labels"], start.facts["purpose"]) == (["contract", "draft"], "review")
    slot = forward.compose()
    assert b"x-veklom" not in bytes(slot.view)
    slot.release()


@pytest.mark.parametrize(
    "fields", [{"x_veklom_labels": "a b"}, {"x_veklom_labels": "a,,b"}, {"x_veklom_purpose": "für"},
               {"x_veklom_labels": ",".join(f"l{n}" for n in range(17))}],
)  # fmt: skip
def test_a_declaration_is_plain_or_refused(house: House, fields: dict[str, str]) -> None:
    """What is no label, no purpose or too much is refused instead of being guessed at."""
    assert code_of(house.tell(house.head(**fields))) == "invalid_request"


def test_what_was_asked_can_be_asked_again(house: House) -> None:
    """From the recorded facts another policy set decides as it would have decided the call."""
    told = house.tell(answers={ReadBody: b'{"model":"forbidden"}'})
    denied = told[1].event  # type: ignore[union-attr]
    assert isinstance(denied, CallDenied)
    again = decide(house.policy_set, from_record(denied.facts))
    assert (again.verdict, again.rules) == ("deny", denied.rules)
    assert again.reasons == denied.reasons


@pytest.mark.parametrize("effect", ["deny", "transform"])
def test_no_call_is_too_odd_to_be_recorded(house: House, effect: str) -> None:
    """However many and long the names of tools, and however many rules refuse, the event fits the log."""
    change = ", change: {tools: {only: [x]}, system: y}" if effect == "transform" else ""
    rules = "".join(
        f"  - {{id: r{n:03}-{'x' * 50}, effect: {effect}, match: {{tools: '*', stream: false}}{change}}}\n"
        for n in range(200)
    )
    allow = "rules:\n  - {id: a, effect: allow, match: {tenant: acme}}\n"
    house.execution.use(load_policy_set([("p", allow + rules)], Known.of({"openai": DIALECT})))
    tools = [{"type": "function", "function": {"name": f"{n}" + "\x01" * 250}} for n in range(1000)]
    body = json.dumps({"model": "m", "messages": [], "tools": tools}).encode()
    (event,) = [
        each.event for each in house.tell(answers={ReadBody: body})
        if isinstance(each, Record) and isinstance(each.event, CallStart | CallDenied)
    ]  # fmt: skip
    assert len(msgspec.json.encode(event)) < MAX_EVENT_BYTES - 1024
    assert event.facts["truncated"] == ["tools"]


def test_another_policy_set_decides_from_then_on(house: House) -> None:
    """A set that is put in decides the next call; one that was decided goes on to its end."""
    story = house.execution.run(house.head())
    told = [story.send(answer) for answer in (None, BODY, None)]
    assert isinstance(told[-1], Forward)
    house.execution.use(load_policy_set([("n.yaml", "rules: []")], Known.of(["openai"])))
    assert code_of(house.tell()) == "policy_denied"
    ended = story.send(Exchange(status=200))
    assert isinstance(ended, Record)
    assert isinstance(story.send(None), Finish)


def test_the_key_is_only_in_the_slot(house: House) -> None:
    """The composed head carries the session's key for its provider, in a slot that is wiped."""
    free = house.region.free
    forward = house.tell()[2]
    assert isinstance(forward, Forward)
    slot = forward.compose()
    head, memory = bytes(slot.view), slot.whole
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\nhost: api.openai.com\r\n")
    assert head.endswith(b"authorization: Bearer " + KEY + b"\r\n\r\n")
    assert head.count(b"authorization") == 1
    slot.release()
    assert KEY not in bytes(memory)
    assert house.region.free == free


def test_no_record_no_call(house: House) -> None:
    """Where the start cannot be recorded nothing is forwarded, and nothing stays reserved."""

    def fail(command: Record) -> object:
        return AuditUnavailable("full") if isinstance(command.event, CallStart) else None

    told = house.tell(answers={Record: fail})
    assert kinds(told) == ["ReadBody", "CallStart", "Answer"]
    assert code_of(told) == "audit_unavailable"
    assert kinds(house.tell())[-1] == "Finish"


def test_an_unrecorded_end_is_no_clean_end(house: House) -> None:
    """Where the end cannot be recorded the caller never sees a finished answer."""

    def fail(command: Record) -> object:
        return AuditUnavailable("full") if isinstance(command.event, CallEnd) else None

    assert kinds(house.tell(answers={Record: fail}))[-1] == "Break"
    assert kinds(house.tell())[-1] == "Finish"


def test_a_denial_stays_a_denial(house: House) -> None:
    """A refusal is recorded before it is told, and told as itself when it cannot be recorded."""
    forbidden: dict[Any, Any] = {ReadBody: b'{"model":"forbidden"}'}
    told = house.tell(answers=forbidden)
    assert kinds(told) == ["ReadBody", "CallDenied", "Answer"]
    denied = told[1].event  # type: ignore[union-attr]
    assert isinstance(denied, CallDenied)
    assert (denied.code, denied.rules, denied.tenant) == (
        "policy_denied",
        ("no-forbidden",),
        "acme",
    )
    told = house.tell(answers={**forbidden, Record: AuditUnavailable("full")})
    assert code_of(told) == "policy_denied"


def test_nobodys_refusals_have_a_budget(house: House) -> None:
    """Beyond the budget refusals of unknown callers are counted, not recorded; all are answered alike."""
    nobody = house.head("sk-a-raw-key")
    refused = REFUSALS_AT_ONCE + 50
    stories = [house.tell(nobody) for _ in range(refused)]
    assert {code_of(told) for told in stories} == {"credential_not_accepted"}
    assert sum("CallDenied" in kinds(told) for told in stories) == REFUSALS_AT_ONCE
    counted: list[RefusalsCounted] = []
    house.refusals.flush(counted.append)
    assert [(each.code, each.count) for each in counted[0].codes] == [
        ("credential_not_accepted", 50)
    ]
    house.clock.at += 1
    again = [house.tell(nobody) for _ in range(50)]
    assert sum("CallDenied" in kinds(told) for told in again) == REFUSALS_PER_SECOND


def test_who_is_known_is_always_on_record(house: House) -> None:
    """However many unknown callers were refused, a refusal of a known one has its own record."""
    for _ in range(REFUSALS_AT_ONCE + 1):
        house.tell(house.head("sk-a-raw-key"))
    forbidden = {ReadBody: b'{"model":"forbidden"}'}
    for _ in range(REFUSALS_AT_ONCE + 1):
        assert kinds(house.tell(answers=forbidden)) == ["ReadBody", "CallDenied", "Answer"]


def test_what_cannot_be_recorded_is_counted(house: House) -> None:
    """A refusal of an unknown caller that the log does not take is not lost: it is counted."""
    house.tell(house.head("sk-a-raw-key"), {Record: AuditUnavailable("full")})
    counted: list[RefusalsCounted] = []
    house.refusals.flush(counted.append)
    assert counted[0].total == 1


ENDS = [
    (Exchange(outcome="client_abort", fault="downstream"), Break),
    (Exchange(outcome="upstream_abort", fault="upstream", status=200), Break),
    (Exchange(outcome="timeout", refusal=Refused("upstream_timeout", "")), Answer),
    (Exchange(outcome="upstream_error", refusal=Refused("upstream_unreachable", "")), Answer),
    (Exchange(status=500, upstream_status=500), Finish),
]


@pytest.mark.parametrize(("exchange", "last"), ENDS, ids=lambda each: getattr(each, "outcome", ""))
def test_every_end_is_recorded_and_settled(house: House, exchange: Exchange, last: type) -> None:
    """However an exchange ends, its end is on record once, and the next call finds its place free."""
    told = house.tell(answers={Forward: exchange})
    assert kinds(told).count("CallEnd") == 1
    assert isinstance(told[-1], last)
    assert kinds(house.tell())[-1] == "Finish"


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_story_dropped_anywhere_leaves_nothing_behind(house: House, steps: int) -> None:
    """Wherever the telling stops, the reservation is free again for the next call."""
    story = house.execution.run(house.head())
    answers = iter([None, BODY, None, Exchange(status=200), None])
    for _ in range(steps):
        story.send(next(answers))
    story.close()
    assert kinds(house.tell())[-1] == "Finish"


def test_a_reservation_is_held_while_the_call_runs(house: House) -> None:
    """Between start and end the place is taken: a second call is refused, with its limit's name."""
    story = house.execution.run(house.head())
    told = [story.send(answer) for answer in (None, BODY, None)]
    assert isinstance(told[-1], Forward)
    assert code_of(house.tell()) == "concurrency_limit_exceeded"
    story.send(Exchange(status=200))
    assert kinds(house.tell())[-1] == "Finish"


def test_a_session_closed_meanwhile_opens_nothing(house: House) -> None:
    """Between the verdict and the connection a session may close: then there is no key to compose."""
    free = house.region.free
    forward = house.tell()[2]
    assert isinstance(forward, Forward)
    house.sessions.drop(house.record.session_id)
    with pytest.raises(Refused):
        forward.compose()
    assert house.region.free == free


def kill(scope: Scope, value: str = "") -> Kill:
    """Return a kill."""
    return Kill(kill_id="k1", scope=scope, value=value, reason="r", placed_by="o", placed_at=1)


@pytest.mark.parametrize(
    ("scope", "value"),
    [(Scope.ALL, ""), (Scope.TENANT, "acme"), (Scope.PROVIDER, "openai"), (Scope.SUBJECT, "alice")],
)
def test_what_a_kill_hits_is_refused(house: House, scope: Scope, value: str) -> None:
    """The caller reads which kill it was; the provider hears nothing."""
    house.kills.replace([kill(scope, value)])
    assert code_of(house.tell()) == "killed"
    house.kills.replace([])
    assert kinds(house.tell())[-1] == "Finish"


def test_a_kill_that_comes_late_composes_no_head(house: House) -> None:
    """Between the verdict and the connection an operator may stop the provider: nothing leaves."""
    free = house.region.free
    forward = house.tell()[2]
    assert isinstance(forward, Forward)
    house.kills.replace([kill(Scope.PROVIDER, "openai")])
    with pytest.raises(Refused, match="k1"):
        forward.compose()
    assert house.region.free == free


def test_a_good_answer_needs_no_key(house: House) -> None:
    """With every slot taken, heads and bodies of good answers pass as they came; errors do not."""
    while house.region.free:
        house.region.lease()
    headers = [(b"content-type", b"text/plain"), (b"x-request-id", b"r" * (len(KEY) - 1))]
    body = b'{"quoted":"' + KEY + b'"}'
    forward = house.tell()[2]
    assert isinstance(forward, Forward)
    assert forward.response.begin(200, headers)[:2] == headers
    assert forward.response.feed(body) is body
    assert forward.response.end() == b""
    forward.response.begin(401, headers)
    with pytest.raises(Refused):
        forward.response.feed(body)


def test_an_error_that_quotes_the_key(house: House) -> None:
    """The key is blotted out of header fields and body, and is in no slot afterwards."""
    free = house.region.free
    forward = house.tell()[2]
    assert isinstance(forward, Forward)
    stars = b"*" * len(KEY)
    head = forward.response.begin(401, [(b"x-echo", KEY)])
    assert head[0] == (b"x-echo", stars)
    assert not forward.response.changes_length
    assert forward.response.feed(b"<" + KEY + b">" + KEY[:4]) == b"<" + stars + b">"
    assert forward.response.end() == KEY[:4]
    assert house.region.free == free
    slots = [house.region.lease() for _ in range(free)]
    assert not any(KEY in bytes(slot.whole) for slot in slots)


def renewed(house: House) -> str:
    """Return the old token of a session that has a new generation."""
    old = house.token
    house.record = replace(house.record, generation=2)
    house.open()
    return old


def expired(house: House) -> str:
    """Return a token whose time is over."""
    house.clock.at += 101
    return house.token


def dropped(house: House) -> str:
    """Return the token of a session that was closed."""
    house.sessions.drop(house.record.session_id)
    return house.token


def foreign(_house: House) -> str:
    """Return a token of another gateway."""
    return House().token


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (renewed, "session_unknown"),
        (expired, "session_expired"),
        (dropped, "session_unknown"),
        (foreign, "invalid_session_token"),
        (lambda _: "sk-a-raw-key", "credential_not_accepted"),
    ],
)
def test_tokens_that_open_nothing(house: House, spoil: Callable[[House], str], code: str) -> None:
    """A stale, expired, closed, foreign or raw credential is refused before the body is read."""
    told = house.tell(house.head(spoil(house)))
    assert kinds(told) == ["CallDenied", "Answer"]
    assert code_of(told) == code


def test_an_identity_beside_the_session(house: House) -> None:
    """With `X-Veklom-Session` the identity provider's token is verified, and must be the owner's."""

    def beside(subject: str) -> RequestHead:
        identity = house.issuer.mint(
            subject=subject, tenant="acme", roles=(), now=NOW, ttl_seconds=60
        )
        return house.head(identity, x_veklom_session=house.token)

    def install(command: AwaitKeys) -> None:
        house.identities.install_keys(command.issuer, house.issuer.jwks())

    told = house.tell(beside("alice"), {AwaitKeys: install})
    assert kinds(told)[0] == "AwaitKeys"
    assert kinds(told)[-1] == "Finish"
    assert kinds(house.tell(beside("alice")))[0] == "ReadBody"
    assert code_of(house.tell(beside("mallory"))) == "session_mismatch"


def test_keys_that_do_not_come(house: House) -> None:
    """Where an issuer's keys cannot be had the call is refused, and says that it is not the caller."""
    identity = house.issuer.mint(subject="alice", tenant="acme", roles=(), now=NOW, ttl_seconds=60)
    head = house.head(identity, x_veklom_session=house.token)
    told = house.tell(head, {AwaitKeys: Refused("identity_unavailable", "")})
    assert code_of(told) == "identity_unavailable"
    told = house.tell(head)  # they came, and this one is not among them
    assert code_of(told) == "invalid_token"


def test_usage_is_asked_for_only_where_the_caller_did_not(house: House) -> None:
    """A chat stream's body is changed to ask for usage; a caller's own wish is left as it is."""
    plain, asking = (
        b'{"model":"m","stream":true}',
        b'{"model":"m","stream":true,"stream_options":{"include_usage":true}}',
    )
    forwards = [house.tell(answers={ReadBody: body})[2] for body in (plain, asking, BODY)]
    bodies = [each.body for each in forwards if isinstance(each, Forward)]
    assert json.loads(bodies[0] or b"")["stream_options"] == {"include_usage": True}
    assert bodies[1:] == [asking, BODY]


def test_a_peek_is_told_each_byte_once(house: House) -> None:
    """An upload's model is read from the pieces as they come, none of them again."""
    pieces = [
        b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n',
        b"\r\n--c" * 20 + b"x" * 5000,
        b'\r\n--b\r\nContent-Disposition: form-data; name="mod',
        b'el"\r\n\r\nforbidden\r\n--b',
        b"--\r\n",
    ]

    def peek(command: PeekBody) -> None:
        assert command.limit == 1000
        assert [command.is_enough(piece) for piece in pieces] == [False] * 4 + [True]

    head = house.head(content_type="multipart/form-data; boundary=b")
    head.target = b"/openai/v1/audio/transcriptions"
    told = house.tell(head, {PeekBody: peek})
    assert kinds(told) == ["PeekBody", "CallDenied", "Answer"]
    assert told[1].event.rules == ("no-forbidden",)  # type: ignore[union-attr]


def test_a_body_of_two_types_is_refused(house: House) -> None:
    """Two Content-Type fields, even equal ones, end the story before a byte of the body is read."""
    head = house.head(content_type="application/json")
    head.headers.append((b"content-type", b"application/json"))
    told = house.tell(head)
    assert kinds(told) == ["CallDenied", "Answer"]
    assert code_of(told) == "invalid_request"


@pytest.mark.parametrize(
    ("passed", "speaks"),
    [
        (b"", True),
        (b"data: 1\n\n", True),
        (b"data: 1\r\n\r\n", True),
        (b"data: 1\r\r", True),
        (b": a comment\n\n", True),
        (b"data: 1", False),
        (b"data: 1\n", False),
        (b"data: 1\r\n", False),
        (b"data: 1\n\ndata: {", False),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_last_words_stand_between_events_only(
    house: House, passed: bytes, speaks: object, size: int
) -> None:
    """In the middle of an event nothing is said: it would complete what was never whole."""
    forward = house.tell()[2]
    assert isinstance(forward, Forward)
    forward.response.begin(200, [(b"Content-Type", b"text/event-stream; charset=utf-8")])
    for position in range(0, len(passed), size):
        forward.response.feed(passed[position : position + size])
    words = forward.response.interrupt("draining", "The gateway is shutting down.")
    assert words.startswith(b'data: {"error":') is bool(speaks)
    assert bool(words) is bool(speaks)


def test_what_is_no_stream_has_no_last_words(house: House) -> None:
    """An event in the middle of a JSON body would be part of it."""
    forward = house.tell()[2]
    assert isinstance(forward, Forward)
    forward.response.begin(200, [(b"content-type", b"application/json")])
    forward.response.feed(b"{}\n\n")
    assert forward.response.interrupt("draining", "x") == b""


# --- a fleet ---


@pytest.fixture
def fleet_house() -> House:
    """A worker of a fleet that holds no session, and has a lease."""
    house = House(is_shared=True)
    house.sessions.drop(house.record.session_id)
    house.sessions.resume()
    return house


def test_a_session_that_is_not_held_is_asked_for(fleet_house: House) -> None:
    """The shared store is asked once, and the call goes on with what it knows."""

    def arrive(command: AwaitSession) -> None:
        assert command.session_id == fleet_house.record.session_id
        fleet_house.sessions.put(ALICE, fleet_house.record)

    told = fleet_house.tell(answers={AwaitSession: arrive})
    assert kinds(told) == [
        "AwaitSession", "ReadBody", "CallStart", "Forward", "CallEnd", "Finish",
    ]  # fmt: skip
    assert kinds(fleet_house.tell())[0] == "ReadBody"


def test_an_older_generation_is_not_all_there_is(fleet_house: House) -> None:
    """A token of a later generation than is held makes the store be asked, an earlier one does not."""
    session = fleet_house.record
    fleet_house.sessions.put(ALICE, replace(session, generation=0))
    told = fleet_house.tell(
        answers={AwaitSession: lambda _: fleet_house.sessions.put(ALICE, session)}
    )
    assert kinds(told)[0] == "AwaitSession"
    assert kinds(told)[-1] == "Finish"
    fleet_house.sessions.put(ALICE, replace(session, generation=2))
    assert kinds(fleet_house.tell()) == ["CallDenied", "Answer"]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (None, "session_unknown"),
        (Refused("store_unavailable", "no"), "store_unavailable"),
    ],
)
def test_a_session_that_nobody_knows_is_refused(
    fleet_house: House, answer: Refused | None, code: str
) -> None:
    """What the store does not have, or cannot be asked for, is a refusal with its own code."""
    told = fleet_house.tell(answers={AwaitSession: answer})
    assert kinds(told) == ["AwaitSession", "CallDenied", "Answer"]
    assert code_of(told) == code


def test_without_a_lease_nobody_is_asked(fleet_house: House) -> None:
    """While nobody vouches for the fleet's sessions a call is refused at once."""
    fleet_house.sessions.suspend()
    told = fleet_house.tell()
    assert kinds(told) == ["CallDenied", "Answer"]
    assert code_of(told) == "control_unavailable"


METERED = """\
rules:
  - {id: acme, effect: allow, match: {tenant: acme}}
limits:
  - {name: tokens, key: tenant, tokens: {rate: 1000/d}}
  - {name: money, key: tenant, budget: {max: 1 USD, per: month, warn_at: [1]}}
  - {name: watch, key: tenant, requests: {rate: 1/d}, mode: shadow}
prices:
  - {provider: openai, model: gpt-x, input: "10", output: "20"}
"""


@pytest.fixture
def metered() -> House:
    """A house whose policy counts tokens and money."""
    return House(METERED)


def answering(*pieces: bytes, outcome: str = "complete") -> Callable[[Forward], Exchange]:
    """Return a provider that streams these pieces."""

    def answer(forward: Forward) -> Exchange:
        forward.response.begin(200, [(b"content-type", b"text/event-stream")])
        for piece in pieces:
            forward.response.feed(piece)
        return Exchange(status=200, upstream_status=200, request_bytes=9, outcome=outcome)

    return answer


def remaining(told: list[Command]) -> dict[str, int]:
    """Return what a call was told is left of each limit."""
    forward = next(command for command in told if isinstance(command, Forward))
    fields = dict(forward.response.begin(200, []))
    items = [item.split(";") for item in fields[b"ratelimit"].decode().split(", ")]
    return {item[0].strip('"'): int(item[1].removeprefix("r=")) for item in items}


USED = b'data: {"usage":{"prompt_tokens":40,"completion_tokens":10}}\n\n'
SMALL: dict[Any, Any] = {ReadBody: b'{"model":"gpt-x","max_tokens":5,"messages":[]}'}


def test_what_the_provider_counted_is_what_counts(metered: House) -> None:
    """A call is settled to the token and to the millionth of a dollar, and its record says both."""
    told = metered.tell(answers=SMALL | {Forward: answering(USED)})
    end = next(each.event for each in told if isinstance(each, Record) and isinstance(each.event, CallEnd))  # fmt: skip  # noqa: E501 - one search
    assert (end.usage.source, end.usage.cost_micro_usd) == ("provider", 40 * 10 + 10 * 20)
    held = estimate_tokens(SMALL[ReadBody])
    left = remaining(metered.tell(answers=SMALL | {Forward: answering(USED)}))
    assert left == {"tokens": 1000 - 50 - held - 5, "money": 1_000_000 - 600 - held * 10 - 100}
    assert [word.percent for word in metered.warnings] == []


def test_a_stream_that_breaks_off_counts_what_came(metered: House) -> None:
    """Without the provider's word the estimate counts, and is marked as one."""
    events = [b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'] * 3
    told = metered.tell(answers=SMALL | {Forward: answering(*events, outcome="client_abort")})
    assert kinds(told)[-1] == "Break"
    end = next(each.event for each in told if isinstance(each, Record) and isinstance(each.event, CallEnd))  # fmt: skip  # noqa: E501 - one search
    assert (end.usage.source, end.usage.output) == ("estimate", 3)
    assert end.usage.input == estimate_tokens(SMALL[ReadBody])


def test_a_call_that_went_nowhere_takes_nothing(metered: House) -> None:
    """Where the provider was not reached, nothing stays reserved and nothing is spent."""
    lost = Exchange(outcome="upstream_error", refusal=Refused("upstream_unreachable", "x"))
    first = remaining(metered.tell(answers=SMALL | {Forward: lost}))
    assert remaining(metered.tell(answers=SMALL | {Forward: lost})) == first


def test_a_story_that_is_dropped_counts_what_it_had_reserved(metered: House) -> None:
    """Whoever drops a call that is with its provider cannot make it free."""
    story = metered.execution.run(metered.head())
    next(story)
    story.send(SMALL[ReadBody])
    assert isinstance(story.send(None), Forward)
    story.close()
    cost = estimate_tokens(SMALL[ReadBody]) + 5
    assert remaining(metered.tell(answers=SMALL))["tokens"] == 1000 - 2 * cost


def test_a_limit_that_refuses_is_named(metered: House) -> None:
    """The record, the answer and its headers name the limit, and say that waiting does not help."""
    told = metered.tell(answers={ReadBody: b'{"model":"gpt-x","max_tokens":5000}'})
    denied, answer = told[-2], told[-1]
    assert isinstance(denied, Record)
    assert isinstance(denied.event, CallDenied)
    assert (denied.event.code, denied.event.limit) == ("call_exceeds_limit", "tokens")
    assert isinstance(answer, Answer)
    assert answer.problem.retry_after_seconds is None


def test_a_model_without_a_price_meets_no_budget(metered: House) -> None:
    """What a budget cannot price does not pass it."""
    assert code_of(metered.tell(answers={ReadBody: b'{"model":"gpt-y"}'})) == "price_unknown"


def test_what_a_limit_in_shadow_would_refuse_is_recorded(metered: House) -> None:
    """The call passes, untold; its record says what would have been."""
    starts = [
        each.event
        for _ in range(2)
        for each in metered.tell(answers=SMALL)
        if isinstance(each, Record) and isinstance(each.event, CallStart)
    ]
    assert [start.limits for start in starts] == [(), ("watch:shadow",)]


class WaitingLimiter(MemoryLimiter):
    """Answers later, as a store does."""

    waits = True


def test_a_store_that_answers_later_is_waited_for(house: House) -> None:
    """Where limits are counted elsewhere the story asks for them, and goes on with the answer."""
    house.use(WaitingLimiter(house.clock))

    def admit(command: Admit) -> object:
        answers: list[object] = []
        command.begin(answers.append)
        return answers[0]

    assert kinds(house.tell(answers={Admit: admit})) == [
        "ReadBody", "Admit", "CallStart", "Forward", "CallEnd", "Finish",
    ]  # fmt: skip
