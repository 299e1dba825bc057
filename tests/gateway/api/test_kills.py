"""The kill switch over real sockets: who may use it, what it stops, and that it stands."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.api.admin import admin_app
from gateway.api.kills import KillFile, KillSwitch
from gateway.api.ledger import SessionLedger
from gateway.api.operators import Operators
from gateway.api.quiet import serve
from gateway.audit.event import AdminRefused, Event, KillLifted, KillPlaced, SessionClosed
from gateway.audit.journal import AuditUnavailable
from gateway.audit.refusals import RefusalBudget
from gateway.config import Sessions
from gateway.errors import Refused
from gateway.identity.session_tokens import SessionTokenIssuer
from gateway.store.memory import MemoryStore
from keys.secret import Secret
from keys.session import Deposit, SessionRecord
from keys.wrapping import Wrapping
from policies.kills import MAX_KILLS, Kill, KillTable, Scope
from policies.request import Principal
from policies.roles import Grant, StepUp

NOW = 1_000_000.0
TENANT = {"scope": "tenant", "value": "acme", "reason": "a key was posted"}


class Clock:
    """A stopped clock."""

    def now(self) -> float:
        """Return the instant."""
        return NOW

    monotonic = now


class Workers:
    """A fleet that does as it is told, or does not answer."""

    def __init__(self) -> None:
        self.kills: tuple[Kill, ...] = ()
        self.answers = True

    async def put(self, *_: object, **__: object) -> None:
        """Serve whatever it is."""

    async def drop(self, _session_id: str, _reason: str) -> int:
        """Forget it."""
        return 0

    def forget(self, _session_id: str, _reason: str) -> None:
        """Forget it."""

    async def kill(self, kills: tuple[Kill, ...]) -> int:
        """Let these stand; two calls were live."""
        if not self.answers:
            raise Refused("overloaded", "A worker does not answer.", retry_after_seconds=1)
        self.kills = kills
        return 2

    def tell_kills(self, kills: tuple[Kill, ...]) -> None:
        """Let these stand."""
        self.kills = kills


class House:
    """The admin listener and what is behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.workers = Workers()
        self.events: list[Event] = []
        self.audit_works = True
        self.file = KillFile(folder / "kills.json")
        self.table = KillTable(self.file.read())
        limits = Sessions(
            default_ttl=3600, max_ttl=7200, idle=600, overlap=60, per_subject=9, total=9
        )
        self.store = MemoryStore(limits)
        self.ledger = SessionLedger(
            store=self.store,
            fleet=self.workers,
            tokens=SessionTokenIssuer("test", bytes(range(32))),
            record=self.record,
            fingerprint_key=b"f" * 32,
            wrapping=Wrapping(b"b" * 32),
            kills=self.table,
            limits=limits,
            clock=Clock(),
        )
        switch = KillSwitch(
            table=self.table,
            file=self.file,
            fleet=self.workers,
            ledger=self.ledger,
            shared=None,
            record=self.record,
            clock=Clock(),
        )
        self.refusals = RefusalBudget(Clock())
        operators = Operators(
            verify_identity=self.verify,
            grants=[
                Grant(issuer="https://idp", role="ops", grants="operator"),
                Grant(issuer="https://idp", role="see", grants="viewer"),
            ],
            step_up=StepUp(max_age_seconds=900),
            record=self.record,
            refusals=self.refusals,
            clock=Clock(),
        )

        async def checks() -> dict[str, bool]:
            return {}

        async def metrics() -> bytes:
            return b""

        self.app = admin_app(
            checks=checks, metrics=metrics, protections={}, operators=operators, kills=switch
        )
        self.port = 0

    async def record(self, event: Event) -> None:
        """Keep an event, as the journal would."""
        await asyncio.sleep(0)  # as the journal, it never answers at once
        if not self.audit_works:
            raise AuditUnavailable("full")
        self.events.append(event)

    async def verify(self, token: bytes) -> Principal:
        """Believe `eyJ<role>` and `eyJ<role>-mfa`."""
        role, _, factor = token[3:].decode().partition("-")
        return Principal(
            issuer="https://idp",
            subject="olga",
            tenant="operations",
            roles=frozenset({role}),
            amr=frozenset({factor} if factor else ()),
            authenticated_at=int(NOW) - 60,
        )

    async def open(self, tenant: str = "acme", key: bytes = b"sk-1") -> SessionRecord:
        """Open a session at the ledger; return its record."""
        entry, _ = await self.ledger.open(
            Principal(issuer="https://idp", subject="alice", tenant=tenant),
            [Deposit(provider="openai", origin="https://h", credential=Secret(bytearray(key)))],
            ttl_seconds=None,
            idle_seconds=None,
            label="",
            client_address="",
        )
        return entry.record

    async def ask(
        self, method: str, path: str, body: object = None, who: str = "ops-mfa"
    ) -> tuple[int, Any, bytes]:
        """Return status, JSON and head of an answer."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: h\r\ncontent-length: {len(content)}\r\n"
        head += f"authorization: Bearer eyJ{who}\r\n" if who else ""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.encode() + b"connection: close\r\n\r\n" + content)
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        fields, _, tail = answer.partition(b"\r\n\r\n")
        return int(fields[9:12]), json.loads(tail), fields.lower()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    """Serve the admin API on loopback."""
    house = House(tmp_path)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    house.port = sock.getsockname()[1]
    runner = await serve(house.app, sock, None)
    yield house
    await runner.cleanup()


async def test_a_kill_ends_what_it_hits_and_stands(house: House) -> None:
    """The answer comes when workers, ledger, disk and log have it; others' sessions stay open."""
    await house.open()
    other = await house.open(tenant="globex")
    status, body, _ = await house.ask("POST", "/admin/v1/kill", TENANT)
    assert (status, body["closed_sessions"], body["cut_calls"]) == (201, 1, 2)
    assert [entry.record for entry in house.store.held()] == [other]
    assert [kill.kill_id for kill in house.workers.kills] == [body["kill_id"]]
    assert [kill.kill_id for kill in House(house.folder).table.standing()] == [body["kill_id"]]
    *_, closed, placed = house.events
    assert isinstance(closed, SessionClosed)
    assert closed.reason == "killed"
    assert isinstance(placed, KillPlaced)
    assert (placed.by, placed.reason, placed.closed_sessions) == ("olga", TENANT["reason"], 1)
    status, listed, _ = await house.ask("GET", "/admin/v1/kills", who="see")
    assert (status, [each["kill_id"] for each in listed["kills"]]) == (200, [body["kill_id"]])


@pytest.mark.parametrize("scope", ["tenant", "subject", "fingerprint", "provider", "all"])
async def test_nothing_opens_that_a_kill_hits_until_it_is_lifted(house: House, scope: str) -> None:
    """A new session is refused with the kill's id, on record; lifted, it opens."""
    value = {"tenant": "acme", "subject": "alice", "provider": "openai", "all": ""}
    value["fingerprint"] = (await house.open()).credentials[0].fingerprint
    asked = {"scope": scope, "value": value[scope], "reason": "r"}
    _, body, _ = await house.ask("POST", "/admin/v1/kill", asked)
    assert len(house.store.held()) == (scope == "provider")
    with pytest.raises(Refused, match=body["kill_id"]) as refused:
        await house.open()
    assert refused.value.code == "killed"
    path = f"/admin/v1/kills/{body['kill_id']}"
    assert (await house.ask("DELETE", path, {"reason": "all clear"}))[0] == 200
    assert (house.workers.kills, House(house.folder).table.standing()) == ((), ())
    lifted = house.events[-1]
    assert isinstance(lifted, KillLifted)
    assert (lifted.kill, lifted.reason) == (body["kill_id"], "all clear")
    await house.open()
    assert (await house.ask("DELETE", path, {"reason": "again"}))[0] == 404


async def test_a_session_that_is_being_opened_is_hit_too(house: House) -> None:
    """A kill that comes while an opening is recorded ends it: nobody gets a token."""
    opening = asyncio.create_task(house.open())
    await asyncio.sleep(0)
    house.table.replace([
        Kill(kill_id="k", scope=Scope.ALL, reason="r", placed_by="o", placed_at=1)
    ])  # fmt: skip
    with pytest.raises(Refused, match="killed"):
        await opening
    assert len(house.store.held()) == 0
    assert isinstance(house.events[-1], SessionClosed)


@pytest.mark.parametrize(
    ("who", "status", "code"),
    [
        ("", 401, "no_credentials"),
        ("dev-mfa", 403, "permission_denied"),
        ("see-mfa", 403, "permission_denied"),
        ("ops", 401, "step_up_required"),
    ],
)
async def test_only_operators_with_a_second_factor_place_one(
    house: House, who: str, status: int, code: str
) -> None:
    """Everybody else is refused, told how to come back, and on record."""
    seen, body, head = await house.ask("POST", "/admin/v1/kill", TENANT, who=who)
    assert (seen, body["code"]) == (status, code)
    assert (b"insufficient_user_authentication" in head) == (code == "step_up_required")
    assert len(house.table) == 0
    [refused] = house.events
    assert isinstance(refused, AdminRefused)
    assert (refused.action, refused.code) == ("kills:write", code)


@pytest.mark.parametrize(
    "body",
    [
        None,
        {},
        {"scope": "tenant", "value": "acme"},
        {"scope": "tenant", "value": "acme", "reason": " "},
        {"scope": "tenant", "value": "acme", "reason": "r" * 513},
        {"scope": "tenant", "reason": "r"},
        {"scope": "tenant", "value": "v" * 513, "reason": "r"},
        {"scope": "all", "value": "acme", "reason": "r"},
        {"scope": "everything", "reason": "r"},
        {"scope": "provider", "value": "openai", "issuer": "i", "reason": "r"},
        {"scope": "all", "reason": "r", "until": "tomorrow"},
    ],
)
async def test_what_is_not_well_formed_stops_nothing(house: House, body: object) -> None:
    """It gets a 400 that says why."""
    status, answer, _ = await house.ask("POST", "/admin/v1/kill", body)
    assert (status, answer["code"], len(house.table)) == (400, "invalid_body", 0)


async def test_what_the_disk_does_not_take_does_not_stand(house: House) -> None:
    """A kill that a restart would forget is refused, and nothing of it takes effect."""
    await house.open()
    (house.folder / "kills.new").mkdir()
    assert (await house.ask("POST", "/admin/v1/kill", TENANT))[0] == 503
    assert (len(house.table), len(house.store.held()), house.workers.kills) == (0, 1, ())


async def test_it_stops_even_where_it_cannot_be_recorded(house: House) -> None:
    """Without the audit log the operator is told so, and it stands all the same."""
    house.audit_works = False
    status, body, _ = await house.ask("POST", "/admin/v1/kill", TENANT)
    assert (status, body["code"]) == (503, "audit_unavailable")
    assert len(house.workers.kills) == 1


async def test_it_stands_where_a_worker_does_not_answer(house: House) -> None:
    """The operator hears of it and of the kill's id; it stands, and everything else is done."""
    await house.open()
    house.workers.answers = False
    status, body, _ = await house.ask("POST", "/admin/v1/kill", TENANT)
    (kill,) = house.table.standing()
    assert (status, kill.kill_id in body["detail"]) == (503, True)
    placed = next(event for event in house.events if isinstance(event, KillPlaced))
    assert (placed.kill, placed.closed_sessions) == (kill.kill_id, 1)
    assert len(House(house.folder).table) == 1
    with pytest.raises(Refused, match="killed"):
        await house.open()


async def test_there_is_room_for_so_many(house: House) -> None:
    """One more than that is refused."""
    house.table.replace(
        Kill(
            kill_id=str(n),
            scope=Scope.SESSION,
            value=str(n),
            reason="r",
            placed_by="o",
            placed_at=1,
        )
        for n in range(MAX_KILLS)
    )
    assert (await house.ask("POST", "/admin/v1/kill", TENANT))[0] == 429


def test_the_file_is_the_owners_alone_and_refused_when_damaged(tmp_path: Path) -> None:
    """Nobody else reads it; a file that says nothing certain is no empty one."""
    file = KillFile(tmp_path / "kills.json")
    assert file.read() == ()
    kills = (Kill(kill_id="k", scope=Scope.ALL, reason="r", placed_by="o", placed_at=1),)
    file.write(kills)
    assert file.read() == kills
    assert (tmp_path / "kills.json").stat().st_mode & 0o077 == 0
    (tmp_path / "kills.json").write_bytes((tmp_path / "kills.json").read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged"):
        file.read()
