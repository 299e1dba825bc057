"""The kill switch: operators stop a session, a subject, a tenant, a key, a provider, or everything.

Laws of this file:
- a kill is on disk before it takes effect, and in effect before anybody is told so;
- what it stops, it stops at every worker, before its record is written: stopping never waits for the
  audit log;
- it stands, over restarts, until an operator lifts it;
- in a fleet it stands on every replica: what the shared store has says what stands, and a replica
  that was told something while the store did not answer tells it later.
"""

import asyncio
import os
import secrets
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import msgspec
from aiohttp import web

from gateway.api.ledger import Recorder, SessionLedger
from gateway.api.quiet import body_of
from gateway.audit.event import KillLifted, KillPlaced
from gateway.clock import Clock
from gateway.errors import Refused
from gateway.store.sessions import StoreUnavailable
from policies.kills import MAX_KILLS, MAX_REASON, MAX_VALUE, Kill, KillTable, Scope
from policies.request import Principal

FILE_NAME: Final = "kills.json"


class Fleet(Protocol):
    """The workers, as the kill switch needs them."""

    async def kill(self, kills: tuple[Kill, ...]) -> int:
        """Return, when every worker lets only these stand, how many live calls were cut."""

    def tell_kills(self, kills: tuple[Kill, ...]) -> None:
        """Have every worker let only these stand, without waiting."""


class Shared(Protocol):
    """The store that replicas share, as the kill switch needs it; both raise `StoreUnavailable`."""

    async def place_kill(self, kill_id: str, data: bytes) -> None:
        """Have every replica hear of a kill, now or when the store answers again."""

    async def lift_kill(self, kill_id: str) -> bool:
        """Have every replica hear that it is lifted, now or when the store answers again."""


class KillRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /admin/v1/kill`."""

    scope: Scope
    reason: str
    value: str = ""
    issuer: str = ""


class LiftRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `DELETE /admin/v1/kills/{kill_id}`."""

    reason: str


Body = TypeVar("Body", KillRequest, LiftRequest)

_kills = msgspec.json.Decoder(tuple[Kill, ...])
_kill = msgspec.json.Decoder(Kill)


def to_shared(kill: Kill) -> bytes:
    """Return a kill as replicas share it."""
    return msgspec.json.encode(kill)


def from_shared(data: bytes) -> Kill:
    """Return the kill that a replica shared."""
    return _kill.decode(data)


class KillFile:
    """The standing kills on disk, mode 0600."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> tuple[Kill, ...]:
        """Return the kills that stand.

        Raises:
            ValueError: The file is not what `write` made; nobody can say what is stopped.
            OSError: It cannot be read.
        """
        try:
            return _kills.decode(self._path.read_bytes())
        except FileNotFoundError:
            return ()
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise ValueError(
                f"{self._path} is damaged: restore it, or remove it to lift all"
            ) from None

    def write(self, kills: tuple[Kill, ...]) -> None:
        """Keep these, durably and whole: a crash leaves the file as before or as after."""
        beside = self._path.with_suffix(".new")
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(kills)) + b"\n")
            file.flush()
            os.fsync(fd)
        beside.replace(self._path)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class KillSwitch:
    """Places and lifts kills."""

    def __init__(  # noqa: PLR0913 - the composition root names every part once
        self,
        *,
        table: KillTable,
        file: KillFile,
        fleet: Fleet,
        ledger: SessionLedger,
        shared: Shared | None,
        record: Recorder,
        clock: Clock,
    ) -> None:
        self._shared = shared
        self._table = table
        self._file = file
        self._fleet = fleet
        self._ledger = ledger
        self._record = record
        self._clock = clock
        self._turn = asyncio.Lock()

    async def place(self, asked: KillRequest, by: Principal, client_address: str) -> dict[str, Any]:
        """Stop what is asked; return the kill, and what it ended.

        Raises:
            Refused: It is not well-formed, too many stand, the disk does not take it (nothing is
                stopped then), or a worker or the shared store does not answer: everything else is
                stopped then, and on record, and the kill is named.
            AuditUnavailable: It stands, but could not be recorded.
        """
        _check(asked)
        kill = Kill(
            kill_id=secrets.token_hex(8),
            scope=asked.scope,
            value=asked.value,
            issuer=asked.issuer,
            reason=asked.reason,
            placed_by=by.subject,
            placed_at=int(self._clock.now()),
        )
        async with self._turn:
            if len(self._table) >= MAX_KILLS:
                raise Refused(
                    "too_many_kills", f"At most {MAX_KILLS} kills stand at once; lift some."
                )
            await self._keep_and_use(placed=kill)
        cut, closed = 0, 0
        unheard: Refused | None = None
        try:
            cut = await self._fleet.kill(self._table.standing())
        except Refused as refused:  # what follows is not for that worker to hold up
            unheard = refused
        try:
            if self._shared is not None:
                await self._shared.place_kill(kill.kill_id, to_shared(kill))
            closed = await self._ledger.close_killed([kill])
        except StoreUnavailable as error:
            unheard = error
        await self._record(
            KillPlaced(
                kill=kill.kill_id,
                scope=kill.scope,
                value=kill.value,
                issuer=kill.issuer,
                reason=kill.reason,
                by=by.subject,
                by_issuer=by.issuer,
                closed_sessions=closed,
                cut_calls=cut,
                client_address=client_address,
            )
        )
        if unheard is not None:
            raise _not_everywhere(f"The kill {kill.kill_id} stands", unheard) from unheard
        return {**msgspec.to_builtins(kill), "closed_sessions": closed, "cut_calls": cut}

    async def lift(
        self, kill_id: str, asked: LiftRequest, by: Principal, client_address: str
    ) -> dict[str, Any]:
        """Let go on what the kill stopped; sessions that it ended stay ended.

        Raises:
            Refused: No such kill stands, or the disk or a worker does not take it.
            AuditUnavailable: It is lifted, but that could not be recorded.
        """
        _check_reason(asked.reason)
        async with self._turn:
            kill = self._table.get(kill_id)
            if kill is None:
                raise Refused("kill_not_found", "No such kill stands.")
            await self._keep_and_use(lifted=kill_id)
        unheard: Refused | None = None
        try:
            await self._fleet.kill(self._table.standing())
        except Refused as refused:
            unheard = refused
        try:
            if self._shared is not None:
                await self._shared.lift_kill(kill_id)
        except StoreUnavailable as error:
            unheard = error
        await self._record(
            KillLifted(
                kill=kill.kill_id,
                scope=kill.scope,
                value=kill.value,
                reason=asked.reason,
                by=by.subject,
                by_issuer=by.issuer,
                client_address=client_address,
            )
        )
        if unheard is not None:
            raise _not_everywhere("The kill is lifted", unheard) from unheard
        return dict(msgspec.to_builtins(kill))

    def hear(self, kill_id: str, data: bytes | None) -> None:
        """Let stand what another replica was told, or lift it where there is no data."""
        placed = None if data is None else from_shared(data)
        if self._table.get(kill_id) == placed:
            return
        kills = self._standing(placed, kill_id)
        self._table.replace(kills)
        self._fleet.tell_kills(kills)

    async def keep(self) -> None:
        """Write down what stands: what was heard from other replicas is on disk after it is in effect.

        Raises:
            OSError: The disk does not take it; the shared store still has it.
        """
        async with self._turn:
            await asyncio.to_thread(self._file.write, self._table.standing())

    def _standing(self, placed: Kill | None, lifted: str) -> tuple[Kill, ...]:
        rest = (kill for kill in self._table.standing() if kill.kill_id != lifted)
        return (*rest, placed) if placed is not None else tuple(rest)

    async def _keep_and_use(self, placed: Kill | None = None, lifted: str = "") -> None:
        """Write down what stands from now on, and let it stand in this process."""
        try:
            await asyncio.to_thread(self._file.write, self._standing(placed, lifted))
        except OSError:
            raise Refused(
                "overloaded", "The kill cannot be written to disk, and does not stand."
            ) from None
        kills = self._standing(placed, lifted)  # others may have been heard of meanwhile
        self._table.replace(kills)

    # --- the routes ---

    async def place_route(self, request: web.Request, by: Principal) -> web.Response:
        """`POST /admin/v1/kill`."""
        asked = _decode(await body_of(request), KillRequest)
        return web.json_response(await self.place(asked, by, request.remote or ""), status=201)

    async def list_route(self, _request: web.Request, _by: Principal) -> web.Response:
        """`GET /admin/v1/kills`."""
        return web.json_response({"kills": msgspec.to_builtins(self._table.standing())})

    async def lift_route(self, request: web.Request, by: Principal) -> web.Response:
        """`DELETE /admin/v1/kills/{kill_id}`."""
        asked = _decode(await body_of(request), LiftRequest)
        kill_id = request.match_info["kill_id"]
        return web.json_response(await self.lift(kill_id, asked, by, request.remote or ""))


def _not_everywhere(what: str, unheard: Refused) -> Refused:
    if isinstance(unheard, StoreUnavailable):
        who = "the other replicas hear of it when the store answers again"
    else:
        who = "a worker does not answer, and hears of it when it runs again"
    return Refused(unheard.code, f"{what} on this replica; {who}.")


def _decode(body: bytes, kind: type[Body]) -> Body:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refused("invalid_body", f"The body is not as it must be: {error}.") from None


def _check(asked: KillRequest) -> None:
    _check_reason(asked.reason)
    if (asked.scope is Scope.ALL) != (not asked.value):
        raise Refused(
            "invalid_body", "Send a value with every scope but `all`, and none with that."
        )
    if max(len(asked.value.encode()), len(asked.issuer.encode())) > MAX_VALUE:
        raise Refused("invalid_body", f"A value has at most {MAX_VALUE} bytes.")
    if asked.issuer and asked.scope not in {Scope.SUBJECT, Scope.TENANT}:
        raise Refused("invalid_body", "An issuer narrows a subject or a tenant, nothing else.")


def _check_reason(reason: str) -> None:
    if not reason.strip() or len(reason.encode()) > MAX_REASON:
        raise Refused("invalid_body", f"Give a reason, of at most {MAX_REASON} bytes.")
