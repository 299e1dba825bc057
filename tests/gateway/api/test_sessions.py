"""The sessions listener over real sockets: what it grants, refuses, records, and never repeats."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.deposit_keys import DepositKeys
from gateway.api.deposits import (
    MAX_BODY_BYTES,
    from_base64url,
    read_open_request,
    to_base64url,
)
from gateway.api.ledger import SessionLedger
from gateway.api.quiet import serve
from gateway.api.receipts import Receipts
from gateway.api.sessions import SessionsApi
from gateway.audit.event import (
    Event,
    RefusalsCounted,
    SessionClosed,
    SessionOpened,
    SessionRefused,
    SessionRenewed,
    SessionRotated,
)
from gateway.audit.journal import AuditUnavailable
from gateway.audit.refusals import RefusalBudget
from gateway.config import Sessions
from gateway.errors import Refused
from gateway.identity.session_tokens import SessionTokenIssuer, SessionTokenVerifier, session_secret
from gateway.providers.provider import Provider
from gateway.store.memory import MemoryStore
from keys.hpke import DepositKeyRing, deposit_info
from keys.region import SecretRegion
from keys.secret import Secret
from keys.session import Deposit, SessionRecord
from keys.signing import Signer, Verifier
from keys.vault import SessionVault
from keys.wrapping import Wrapping
from policies.kills import Kill, KillTable, Scope
from policies.request import Principal

BOOT_KEY = b"b" * 32

KEY = "sk-planted-credential"
SIGNER = Signer("test", bytes(32))
OPEN = {"keys": {"openai": KEY}, "label": "laptop"}


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.time = 1_000_000.0

    def now(self) -> float:
        """Return the test's time."""
        return self.time

    monotonic = now


class Worker:
    """A fleet of one: a vault, as a worker has it."""

    def __init__(self) -> None:
        self.vault = SessionVault(SecretRegion.open(slots=2, slot_bytes=4096), Wrapping(BOOT_KEY))
        self.records: dict[str, SessionRecord] = {}
        self.answers = True

    def _check(self) -> None:
        if not self.answers:
            raise Refused("overloaded", "A worker does not answer.", retry_after_seconds=1)

    async def put(
        self,
        _principal: Principal,
        record: SessionRecord,
        *,
        label: str,  # noqa: ARG002 - the ledger's signature
        used_at: float,  # noqa: ARG002 - the ledger's signature
    ) -> None:
        """Serve, or fail to."""
        self._check()
        self.records[record.session_id] = record
        self.vault.put(record, 0.0)

    def use(self, session_id: str, secret: bytes) -> bytes:
        """Return the key, as a call would use it."""
        key = self.vault.find(session_id, "openai", "https://api.openai.com")
        slot = self.vault.compose_head(key, secret, b"", b"")
        try:
            return bytes(slot.view)
        finally:
            slot.release()

    def forget(self, session_id: str, _reason: str) -> None:
        """Forget."""
        self.vault.drop(session_id)

    async def drop(self, session_id: str, _reason: str) -> int:
        """Forget; three calls were live."""
        self._check()
        self.records.pop(session_id, None)
        self.vault.drop(session_id)
        return 3


class House:
    """Everything behind the listener, and a caller's way in."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.worker = Worker()
        self.events: list[Event] = []
        self.audit_works = True
        self.is_draining = False
        self.kills = KillTable()
        tokens = SessionTokenIssuer("test", bytes(range(32)))
        limits = Sessions(
            default_ttl=3600, max_ttl=7200, idle=600, overlap=60, per_subject=2, total=3
        )
        self.store = MemoryStore(limits)
        self.ledger = SessionLedger(
            store=self.store,
            fleet=self.worker,
            tokens=tokens,
            record=self.record,
            fingerprint_key=b"f" * 32,
            wrapping=Wrapping(b"b" * 32),
            kills=self.kills,
            limits=limits,
            clock=self.clock,
        )
        openai = Provider.from_url(
            "openai", "openai", "https://api.openai.com/v1", request_stream_usage=True
        )
        mistral = Provider.from_url(
            "mistral", "openai", "https://api.mistral.ai/v1", request_stream_usage=True
        )
        self.refusals = RefusalBudget(self.clock)
        self.api = SessionsApi(
            ledger=self.ledger,
            verify_identity=self.verify,
            session_tokens=SessionTokenVerifier(tokens.public_key, "test"),
            providers={"openai": openai, "mistral": mistral},
            record=self.record,
            refusals=self.refusals,
            proxy_url="http://proxy",
            sessions_url="http://sessions",
            clock=self.clock,
            deposit_keys=DepositKeys(DepositKeyRing("test"), SIGNER, self.clock),
            receipts=Receipts(Path("/nonexistent"), SIGNER, self.clock),
            development=None,
            is_draining=lambda: self.is_draining,
        )
        self.port = 0

    async def record(self, event: Event) -> None:
        """Keep an event, as the journal would."""
        await asyncio.sleep(0)  # as the journal, it never answers at once
        if not self.audit_works:
            raise AuditUnavailable("full")
        self.events.append(event)

    async def verify(self, token: bytes) -> Principal:
        """Believe `eyJ<subject>`."""
        return Principal(issuer="https://idp", subject=token[3:].decode(), tenant="acme")

    async def raw(self, request: bytes) -> bytes:
        """Return everything that is answered until the connection ends."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return answer

    async def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        who: str = "alice",
        session: str = "",
    ) -> tuple[int, Any, bytes]:
        """Return status, JSON and head of an answer."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: h\r\ncontent-length: {len(content)}\r\n"
        head += f"authorization: Bearer eyJ{who}\r\n" if who else ""
        head += f"x-veklom-session: {session}\r\n" if session else ""
        answer = await self.raw(head.encode() + b"connection: close\r\n\r\n" + content)
        head_bytes, _, tail = answer.partition(b"\r\n\r\n")
        return int(head_bytes[9:12]), json.loads(tail), head_bytes.lower()


@pytest.fixture
async def house() -> AsyncIterator[House]:
    """Serve the API on loopback."""
    house = House()
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    house.port = sock.getsockname()[1]
    runner = await serve(house.api.app(), sock, None)
    yield house
    await runner.cleanup()


async def test_opening_grants_a_token_that_opens_the_key(house: House) -> None:
    """The 201's token carries the half that, with the worker's record, gives the key back."""
    status, body, head = await house.ask("POST", "/v1/sessions", OPEN)
    assert status == 201
    assert b"connection: close" in head
    assert b"cache-control: no-store" in head
    assert body["providers"]["openai"]["base_url"] == "http://proxy/openai/v1"
    assert KEY not in json.dumps(body)
    secret = session_secret(body["token"].encode())
    assert house.worker.use(body["session_id"], secret) == KEY.encode()
    [opened] = house.events
    assert isinstance(opened, SessionOpened)
    assert opened.deposit == "plain"
    assert KEY not in repr(opened)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_body"),
        ([], 400, "invalid_body"),
        ({"keys": {}}, 400, "invalid_body"),
        ({"keys": {"openai": ""}}, 400, "invalid_body"),
        ({"keys": {"openai": f"{KEY}\r\nhost: evil"}}, 400, "invalid_body"),
        ({"keys": {"openai": f"{KEY}\u00e9"}}, 400, "invalid_body"),
        ({"keys": {"openai": KEY * 300}}, 400, "invalid_body"),
        ({"keys": {"openai": KEY}, "extra": 1}, 400, "invalid_body"),
        ({"keys": {"openai": KEY}, "ttl_seconds": 0}, 400, "invalid_body"),
        ({"keys": {"openai": KEY}, "ttl_seconds": 7201}, 400, "invalid_body"),
        ({"keys": {"openai": KEY}, "idle_seconds": -1}, 400, "invalid_body"),
        ({"keys": {"openai": KEY}, "ttl_seconds": KEY}, 400, "invalid_body"),
        ({"keys": {"openai": KEY, "nobody": KEY}}, 400, "unknown_provider"),
        ({"keys": {"openai": "x" * 17_000}}, 413, "body_too_large"),
    ],
)
async def test_bad_deposits_are_refused_recorded_and_not_repeated(
    house: House, body: object, status: int, code: str
) -> None:
    """A refusal is a problem with its code, is evidence, opens nothing and quotes no key."""
    answered, problem, head = await house.ask("POST", "/v1/sessions", body)
    assert answered == status
    assert b"application/problem+json" in head
    assert "planted" not in json.dumps(problem)
    assert [event.code for event in house.events if isinstance(event, SessionRefused)] == [code]
    assert not house.store.held()
    assert not house.worker.records


async def test_who_asks_must_say_who(house: House) -> None:
    """Without an identity there is a challenge and nothing else."""
    for method, path in [
        ("POST", "/v1/sessions"),
        ("GET", "/v1/sessions"),
        ("GET", "/v1/sessions/x"),
        ("POST", "/v1/sessions/x/renew"),
        ("DELETE", "/v1/sessions/x"),
    ]:
        status, _, head = await house.ask(method, path, OPEN, who="")
        assert status == 401
        assert b"www-authenticate: bearer" in head


async def test_nobodys_refusals_have_a_budget(house: House) -> None:
    """Beyond the budget a refusal of an unknown caller is counted; one of a known caller never is."""
    while house.refusals.spend():
        pass
    assert (await house.ask("POST", "/v1/sessions", OPEN, who=""))[0] == 401
    assert (await house.ask("POST", "/v1/sessions", {"keys": {}}))[0] == 400
    (refused,) = house.events
    assert isinstance(refused, SessionRefused)
    assert refused.subject == "alice"
    counted: list[RefusalsCounted] = []
    house.refusals.flush(counted.append)
    assert [(each.code, each.count) for each in counted[0].codes] == [("no_credentials", 1)]


async def test_another_callers_session_does_not_exist(house: House) -> None:
    """Nobody sees, renews or closes a session but who opened it."""
    _, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    path = f"/v1/sessions/{body['session_id']}"
    assert (await house.ask("GET", path, who="mallory"))[0] == 404
    assert (await house.ask("DELETE", path, who="mallory"))[0] == 404
    renewing = await house.ask("POST", f"{path}/renew", who="mallory", session=body["token"])
    assert renewing[0] == 404
    assert (await house.ask("GET", "/v1/sessions", who="mallory"))[1] == {"sessions": []}
    status, seen, _ = await house.ask("GET", path)
    assert status == 200
    assert "token" not in seen
    assert "token" not in (await house.ask("GET", "/v1/sessions"))[1]["sessions"][0]


async def test_renewing_replaces_the_token(house: House) -> None:
    """The new token opens the key, the old one cannot renew again; both are recorded."""
    _, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    path = f"/v1/sessions/{body['session_id']}/renew"
    house.clock.time += 100
    status, renewed, _ = await house.ask("POST", path, {"ttl_seconds": 7200}, session=body["token"])
    assert (status, renewed["generation"]) == (200, 2)
    assert renewed["expires_at"] == house.clock.time + 7200
    assert house.worker.records[body["session_id"]].generation == 2
    assert (await house.ask("POST", path, session=body["token"]))[0] == 403
    kinds = [type(event) for event in house.events]
    assert kinds == [SessionOpened, SessionRenewed, SessionRefused]


async def test_of_two_renewals_at_once_one_wins(house: House) -> None:
    """Two renewals with the same token do not both count."""
    _, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    path = f"/v1/sessions/{body['session_id']}/renew"
    answers = await asyncio.gather(
        *(house.ask("POST", path, session=body["token"]) for _ in range(4))
    )
    assert sorted(status for status, _, _ in answers) == [200, 403, 403, 403]
    assert house.worker.records[body["session_id"]].generation == 2


async def test_closing_destroys_and_says_what_it_cut(house: House) -> None:
    """After the answer no worker holds the session; a second time there is none."""
    _, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    path = f"/v1/sessions/{body['session_id']}"
    status, closed, _ = await house.ask("DELETE", path)
    assert (status, closed["cut_calls"]) == (200, 3)
    assert not house.worker.records
    assert isinstance(house.events[-1], SessionClosed)
    assert (await house.ask("DELETE", path))[0] == 404


ROTATE = {"keys": {"openai": "sk-second"}, "overlap_seconds": 5}


async def test_rotating_replaces_the_key_under_the_same_token(house: House) -> None:
    """Whoever has the token calls with the new key; the record names both, and neither in clear."""
    _, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    path, token = f"/v1/sessions/{body['session_id']}/rotate", body["token"]
    status, rotated, head = await house.ask("POST", path, ROTATE, session=token)
    assert (status, b"connection: close" in head) == (200, True)
    assert rotated["generation"] == body["generation"]
    assert "token" not in rotated
    assert house.worker.use(body["session_id"], session_secret(token.encode())) == b"sk-second"
    event = house.events[-1]
    assert isinstance(event, SessionRotated)
    old = body["providers"]["openai"]["fingerprint"]
    new = rotated["providers"]["openai"]["fingerprint"]
    assert (event.replaced, event.credentials[0].fingerprint) == ((old,), new)
    (sealed,) = house.worker.records[body["session_id"]].credentials
    assert event.overlap_seconds == sealed.overlap_seconds == 5
    renew = f"/v1/sessions/{body['session_id']}/renew"
    assert (await house.ask("POST", renew, session=token))[0] == 200


@pytest.mark.parametrize(
    ("asked", "who", "with_token", "status", "code"),
    [
        (ROTATE, "alice", False, 401, "session_required"),
        (ROTATE, "bob", True, 404, "session_not_found"),
        (ROTATE, "", True, 401, "no_credentials"),
        ({"keys": {"mistral": "sk-m"}}, "alice", True, 400, "invalid_body"),
        ({"keys": {"nobody": "sk-m"}}, "alice", True, 400, "unknown_provider"),
        ({"keys": {}}, "alice", True, 400, "invalid_body"),
        ({**ROTATE, "overlap_seconds": 3601}, "alice", True, 400, "invalid_body"),
        ({**ROTATE, "overlap_seconds": -1}, "alice", True, 400, "invalid_body"),
        ({**ROTATE, "label": "x"}, "alice", True, 400, "invalid_body"),
    ],
)
async def test_only_the_owner_with_the_token_rotates(
    house: House, *, asked: object, who: str, with_token: bool, status: int, code: str
) -> None:
    """Anything else is refused, on record, and the key stays."""
    _, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    path, token = f"/v1/sessions/{body['session_id']}/rotate", body["token"]
    seen, answer, _ = await house.ask(
        "POST", path, asked, who=who, session=token if with_token else ""
    )
    assert (seen, answer["code"]) == (status, code)
    assert house.worker.use(body["session_id"], session_secret(token.encode())) == KEY.encode()
    assert isinstance(house.events[-1], SessionRefused)


async def test_a_rotation_that_cannot_be_recorded_changes_nothing(house: House) -> None:
    """Without evidence the old key stays, here and with the workers."""
    _, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    path, token = f"/v1/sessions/{body['session_id']}/rotate", body["token"]
    house.audit_works = False
    assert (await house.ask("POST", path, ROTATE, session=token))[0] == 503
    house.audit_works = True
    assert house.worker.use(body["session_id"], session_secret(token.encode())) == KEY.encode()
    assert (await house.ask("POST", path, ROTATE, session=token))[0] == 200


async def test_a_key_that_a_kill_hits_does_not_come_in_by_rotation(house: House) -> None:
    """Neither a stopped key nor one for a stopped provider replaces another."""
    _, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    path, token = f"/v1/sessions/{body['session_id']}/rotate", body["token"]
    house.kills.replace(
        [
            Kill(
                kill_id="k",
                scope=Scope.PROVIDER,
                value="openai",
                reason="r",
                placed_by="o",
                placed_at=1,
            )
        ]
    )
    status, answer, _ = await house.ask("POST", path, ROTATE, session=token)
    assert (status, answer["code"]) == (403, "killed")


def deposit() -> Deposit:
    """Return a key as it came in."""
    return Deposit(
        provider="openai", origin="https://api.openai.com", credential=Secret(KEY.encode())
    )


async def opening(house: House, who: str, of: Deposit | None = None, ttl: int = 60) -> str:
    """Return how an opening at the ledger itself ended."""
    principal = Principal(issuer="https://idp", subject=who, tenant="acme")
    try:
        await house.ledger.open(
            principal,
            [of or deposit()],
            ttl_seconds=ttl,
            idle_seconds=None,
            label="",
            client_address="",
        )
    except Refused as refusal:
        return refusal.code
    return "opened"


async def test_a_subject_has_its_cap_under_concurrency(house: House) -> None:
    """Openings that are still being recorded count already."""
    outcomes = await asyncio.gather(*(opening(house, "alice") for _ in range(6)))
    assert sorted(outcomes) == ["opened"] * 2 + ["too_many_sessions"] * 4


async def test_the_gateway_has_its_cap_under_concurrency(house: House) -> None:
    """Many subjects at once do not get past the total, and a closed session makes room."""
    outcomes = await asyncio.gather(*(opening(house, f"user{n}") for n in range(6)))
    assert sorted(outcomes) == ["opened"] * 3 + ["overloaded"] * 3
    await house.ledger.close(house.store.held()[0].record.session_id, "closed")
    assert await opening(house, "late") == "opened"


@pytest.mark.parametrize(("ttl", "outcome"), [(60, "opened"), (99_999, "invalid_body")])
async def test_a_deposit_is_wiped_whatever_becomes_of_it(
    house: House, ttl: int, outcome: str
) -> None:
    """Once the ledger is done with a key, opened or refused, its plaintext is overwritten."""
    given = deposit()
    assert await opening(house, "alice", given, ttl) == outcome
    assert given.credential.reveal() == bytes(len(KEY))


async def test_a_renewal_that_was_not_recorded_may_be_tried_again(house: House) -> None:
    """When the audit log comes back the same token renews."""
    _, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    path = f"/v1/sessions/{body['session_id']}/renew"
    house.audit_works = False
    assert (await house.ask("POST", path, session=body["token"]))[0] == 503
    house.audit_works = True
    assert (await house.ask("POST", path, session=body["token"]))[1]["generation"] == 2


async def test_what_cannot_be_recorded_does_not_happen(house: House) -> None:
    """With the audit log gone nothing opens and nothing is renewed; closing still destroys."""
    _, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    house.audit_works = False
    assert (await house.ask("POST", "/v1/sessions", OPEN))[0] == 503
    assert len(house.store.held()) == 1
    path = f"/v1/sessions/{body['session_id']}"
    assert (await house.ask("POST", f"{path}/renew", session=body["token"]))[0] == 503
    assert house.worker.records[body["session_id"]].generation == 1
    assert (await house.ask("DELETE", path))[0] == 503
    assert not house.worker.records


async def test_a_session_that_not_every_worker_holds_is_destroyed(house: House) -> None:
    """If a worker does not answer no token is given, and the log says that it closed."""
    house.worker.answers = False
    assert (await house.ask("POST", "/v1/sessions", OPEN))[0] == 503
    assert not house.store.held()
    assert [type(event) for event in house.events] == [SessionOpened, SessionClosed, SessionRefused]


async def test_old_and_idle_sessions_are_closed(house: House) -> None:
    """Time closes a session that is old or unused, and use keeps it from being idle."""
    for who in ("alice", "bob"):
        await house.ask("POST", "/v1/sessions", {**OPEN, "idle_seconds": 7000}, who=who)
    status, body, _ = await house.ask("POST", "/v1/sessions", OPEN)
    assert status == 201
    house.clock.time += 599
    assert await house.ledger.close_due() == []
    house.store.touch([body["session_id"], "unknown"], house.clock.now())
    house.clock.time += 599
    assert await house.ledger.close_due() == []
    assert len(house.store.held()) == 3
    house.clock.time += 1
    assert await house.ledger.close_due() == []
    house.clock.time += 3600
    await house.ledger.close_due()
    closed = [event for event in house.events if isinstance(event, SessionClosed)]
    assert [event.reason for event in closed] == ["idle", "expired", "expired"]
    assert not house.worker.records


async def test_what_went_wrong_with_one_does_not_keep_the_others(house: House) -> None:
    """Each session whose time is over is closed, and each fault of that is told."""
    for who in ("alice", "bob"):
        await house.ask("POST", "/v1/sessions", OPEN, who=who)
    house.clock.time += 600
    house.audit_works = False
    faults = await house.ledger.close_due()
    assert [fault.code for fault in faults] == ["audit_unavailable"] * 2
    assert not house.worker.records


async def test_a_draining_gateway_opens_nothing(house: House) -> None:
    """During the drain openings are refused, to be tried elsewhere."""
    house.is_draining = True
    status, _, head = await house.ask("POST", "/v1/sessions", OPEN)
    assert status == 503
    assert b"retry-after: 5" in head


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET / HTTP/1.1\r\nhost: h\r\nauthorization: Bearer sk-planted\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: h\r\nauthorization: Bearer sk-planted"
        + b"x" * 20_000
        + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: h\r\nsk-planted bad: 1\r\n\r\n",
        b"sk-planted / HTTP/1.1\r\nhost: h\r\n\r\n",
        b"GET /?key=sk-planted HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nhost: h\r\nauthorization: Bearer eyJa\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\nsk-planted\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nhost: h\r\nauthorization: sk-planted\r\n"
        b"content-length: 0\r\n\r\n",
    ],
)
async def test_never_repeats_what_it_heard(
    house: House,
    request_bytes: bytes,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A malformed request is neither echoed in the answer nor logged, and ends the connection."""
    caplog.set_level(0)
    answer = await house.raw(request_bytes)
    printed = capfd.readouterr()
    assert answer[:7] == b"HTTP/1."  # aiohttp answers what it cannot parse as 1.0
    assert answer[9:10] == b"4"
    assert b"planted" not in answer
    assert "planted" not in printed.out + printed.err + caplog.text


async def test_says_where_to_go(house: House) -> None:
    """The well-known document names both listeners; every other path is a problem."""
    status, body, _ = await house.ask("GET", "/.well-known/veklom", who="")
    assert (status, body) == (
        200,
        {"sessions": "http://sessions/v1/sessions", "proxy": "http://proxy"},
    )
    assert (await house.ask("GET", "/nowhere"))[0] == 404
    assert (await house.ask("PUT", "/v1/sessions"))[0] == 405
    assert (await house.ask("POST", "/dev/token", {}))[0] == 404


# --- sealed deposits ---


async def published(house: House) -> dict[str, Any]:
    """Return the published keys, their signature checked."""
    status, body, head = await house.ask("GET", "/.well-known/veklom-hpke", who="")
    assert (status, b"cache-control: no-store" in head) == (200, True)
    text = Verifier.from_vkey(SIGNER.vkey).open_note(body["note"])
    context, _, content = text.partition("\n")
    assert context == "veklom.hpke.v1 test"
    document: dict[str, Any] = json.loads(content)
    return document


def sealed(key: dict[str, Any], who: str = "alice", plain: object = OPEN["keys"]) -> dict[str, Any]:
    """Return a deposit that is sealed for a caller."""
    public = X25519PublicKey.from_public_bytes(from_base64url(key["public_key"]))
    info = deposit_info("test", key["kid"], "https://idp", who)
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    content = plain if isinstance(plain, bytes) else json.dumps(plain).encode()
    ciphertext = suite.encrypt(content, public, info)
    return {"enc": {"kid": key["kid"], "kem": key["kem"], "ct": to_base64url(ciphertext)}}


async def test_a_sealed_deposit_opens_a_session(house: House) -> None:
    """Keys sealed to a published key are deposited as if sent in clear; the record says how."""
    document = await published(house)
    key = document["keys"][0]
    assert {each["kem"] for each in document["keys"]} == {"x25519", "mlkem768-x25519"}
    assert document["audience"] == "test"
    assert document["expires_at"] == key["expires_at"] == house.clock.now() + 600
    assert (key["kdf"], key["aead"]) == ("hkdf-sha256", "aes-256-gcm")
    status, body, _ = await house.ask("POST", "/v1/sessions", sealed(key))
    assert status == 201
    secret = session_secret(body["token"].encode())
    assert house.worker.use(body["session_id"], secret) == KEY.encode()
    [opened] = house.events
    assert isinstance(opened, SessionOpened)
    assert opened.deposit == "hpke"


async def test_a_replayed_deposit_is_refused(house: House) -> None:
    """Whoever recorded a deposit opens nothing with it, not even as the same caller."""
    body = sealed((await published(house))["keys"][0])
    assert (await house.ask("POST", "/v1/sessions", body))[0] == 201
    status, problem, _ = await house.ask("POST", "/v1/sessions", body)
    assert (status, problem["code"]) == (409, "deposit_replayed")
    assert isinstance(house.events[-1], SessionRefused)
    assert house.events[-1].code == "deposit_replayed"


async def test_a_deposit_of_another_caller_is_refused(house: House) -> None:
    """What was sealed for one caller opens no session of another's."""
    body = sealed((await published(house))["keys"][0], who="bob")
    status, problem, _ = await house.ask("POST", "/v1/sessions", body)
    assert (status, problem["code"]) == (400, "deposit_not_opened")
    assert (await house.ask("POST", "/v1/sessions", body, who="bob"))[0] == 201


async def test_an_expired_key_is_named_as_that(house: House) -> None:
    """After ten minutes the caller is told to seal to a fresh key, and that works."""
    body = sealed((await published(house))["keys"][0])
    house.clock.time += 600
    status, problem, _ = await house.ask("POST", "/v1/sessions", body)
    assert (status, problem["code"]) == (409, "unknown_kid")
    body = sealed((await published(house))["keys"][0])
    assert (await house.ask("POST", "/v1/sessions", body))[0] == 201


async def test_published_keys_change_and_are_signed_anew(house: House) -> None:
    """Within five minutes the document is the same, after them it holds other keys."""
    first = await published(house)
    house.clock.time += 299
    assert await published(house) == first
    house.clock.time += 1
    later = await published(house)
    assert later["expires_at"] == first["expires_at"] + 300
    assert later["keys"] != first["keys"]


@pytest.mark.parametrize(
    ("plain", "code"),
    [
        (b"", "invalid_body"),
        (b"junk " + KEY.encode(), "invalid_body"),
        ([KEY], "invalid_body"),
        ({}, "invalid_body"),
        ({"openai": 5}, "invalid_body"),
        ({"openai": KEY + "\n"}, "invalid_body"),
        ({KEY: KEY}, "unknown_provider"),
    ],
)
async def test_what_is_sealed_is_read_as_strictly(house: House, plain: object, code: str) -> None:
    """Sealing hides nothing from the checks, and no refusal repeats what was sealed."""
    body = sealed((await published(house))["keys"][0], plain=plain)
    status, problem, _ = await house.ask("POST", "/v1/sessions", body)
    assert (status, problem["code"]) == (400, code)
    assert KEY not in json.dumps(problem)


@pytest.mark.parametrize(
    "change",
    [
        {"keys": {"openai": KEY}},
        {"enc": None},
        {"enc": {"kid": "k", "kem": "x25519"}},
        {"enc": {"kid": "k", "kem": "x25519", "ct": "a+/="}},
        {"enc": {"kid": "k", "kem": "x25519", "ct": "YR"}},
        {"enc": {"kid": "k", "kem": "x25519", "ct": "é"}},
        {"enc": {"kid": "k", "kem": "x25519", "ct": "", "more": 1}},
    ],
)
async def test_malformed_sealed_deposits(house: House, change: dict[str, Any]) -> None:
    """Keys both sealed and in clear, missing parts and loose encodings are refused."""
    body = sealed((await published(house))["keys"][0])
    status, problem, _ = await house.ask("POST", "/v1/sessions", {**body, **change})
    assert (status, problem["code"]) == (400, "invalid_body")


async def test_an_oversize_sealed_deposit(house: House) -> None:
    """The limit of a body holds for sealed ones, too."""
    body = sealed((await published(house))["keys"][0], plain=b" " * MAX_BODY_BYTES)
    status, problem, _ = await house.ask("POST", "/v1/sessions", body)
    assert (status, problem["code"]) == (413, "body_too_large")


@given(st.binary(max_size=100))
def test_base64url_has_one_spelling(data: bytes) -> None:
    """What is encoded is decoded again."""
    assert from_base64url(to_base64url(data)) == data


@given(st.text(max_size=20) | st.text(alphabet="AQgw-_=+/ \n", max_size=20))
def test_other_spellings_are_refused(text: str) -> None:
    """Text that decodes is spelt in the one way in which it is encoded."""
    try:
        data = from_base64url(text)
    except ValueError:
        return
    assert to_base64url(data) == text


@given(st.text(alphabet=st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1))
def test_a_key_is_taken_byte_for_byte(key: str) -> None:
    """However JSON writes a key, plain or escaped, the deposit holds its bytes."""
    openai = Provider.from_url("openai", "openai", "https://h", request_stream_usage=True)
    spelt = "".join(f"\\u{ord(char):04x}" for char in key)
    for value in (json.dumps(key), f'"{spelt}"'):
        body = b'{"keys":{"openai":%b}}' % value.encode()
        _, [deposit] = read_open_request(body, {"openai": openai}, refuse_sealed)
        assert deposit.credential.reveal() == key.encode()


def refuse_sealed(_sealed: object) -> bytearray:
    """Open nothing."""
    raise Refused("deposit_not_opened", "")
