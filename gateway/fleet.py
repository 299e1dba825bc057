"""This gateway among the replicas that share a store: what its workers hold, kept true to the store.

Laws of this file:
- workers serve sessions on a lease, which runs from the moment at which the store was asked something
  that it answered, and only once every end that it told was passed on;
- whoever may have missed an event compares everything that workers hold before granting a lease: a gap
  in the numbers of events, a store that began anew, a control process that did;
- an end that the store did not confirm is told again before a lease is granted;
- what was being read while something was said of it is read again: a session that ended cannot come
  back through an answer that was on its way.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Final

from gateway.audit.event import Event as AuditEvent
from gateway.audit.event import StoreConnected, StoreLost
from gateway.audit.journal import AuditUnavailable
from gateway.clock import Clock
from gateway.errors import GatewayError, Refused
from gateway.relay import UNASKED, DropSession, Lease, PutSession, SessionAbsent
from gateway.store.connection import StoreRefused
from gateway.store.redis_store import (
    EVENTS_AT_ONCE,
    LIFTED,
    EventsMissed,
    Meeting,
    Owed,
    RedisStore,
)
from gateway.store.sessions import Entry, StoreUnavailable
from gateway.store.words import Changed, Dropped, Event, KillLifted, KillPlaced
from gateway.tasks import end_tasks
from gateway.telemetry.logs import get_log
from gateway.workers import Workers
from keys.session import SessionRecord
from policies.request import Principal

RETRY_SECONDS: Final = 0.25
"""Between two attempts to reach a store that does not answer, or must not be used."""

LOOK_AGAIN_SECONDS: Final = 10.0
"""How long a store that began to write to its disk may be used before that is noticed."""

FETCH_TRIES: Final = 3
"""How often a session is read anew because something was said of it meanwhile."""

MAX_FETCHES: Final = 1024
"""Sessions that are read at once; more than that are refused with 503."""

OnKill = Callable[[str, bytes | None], None]
"""Hears in order of every kill: its data, or None where it was lifted."""

log = get_log()


class FleetMember:
    """One replica: its workers on one side, the shared store on the other."""

    def __init__(  # noqa: PLR0913 - the composition root names every part once
        self,
        *,
        store: RedisStore,
        workers: Workers,
        record: Callable[[AuditEvent], Awaitable[None]],
        close: Callable[[Owed], Awaitable[None]],
        kills: Mapping[str, bytes],
        on_kill: OnKill,
        end_killed: Callable[[bytes], Awaitable[None]],
        persistence_reason: str,
        staleness_seconds: float,
        clock: Clock,
    ) -> None:
        """Take the parts.

        `close` tells the store of an end once more, and records it; `kills` are those that stood when
        this gateway last ran; `end_killed` closes the sessions that a kill hits.
        """
        self._store = store
        self._workers = workers
        self._record = record
        self._close = close
        self._on_kill = on_kill
        self._end_killed = end_killed
        self._persistence_reason = persistence_reason
        self._staleness = staleness_seconds
        self._clock = clock
        self._fetches: dict[str, bool] = {}  # what is being read: whether that is still good
        self._tasks: set[asyncio.Task[None]] = set()
        self._kills = dict(kills)
        self._epoch = b""
        self._heard = 0  # the number of the last event
        self._may_have_missed = True
        self._heard_at = self._looked_at = clock.monotonic()
        self._has_met = False
        self._is_lost = False
        self._lapse: asyncio.TimerHandle | None = None
        self._trouble = ""
        self.lease: Lease | None = None

    @property
    def is_live(self) -> bool:
        """Whether workers serve sessions."""
        return self.lease is not None and self._clock.monotonic() < self.lease.until

    @property
    def gauges(self) -> dict[str, float]:
        """What operators may want to see of the store."""
        return {
            "store_up": float(self.is_live),
            "store_silent_seconds": self._clock.monotonic() - self._heard_at,
        }

    @property
    def counts(self) -> dict[str, float]:
        """What went wrong so far."""
        return {
            "store_errors": float(self._store.errors),
            "store_forged": float(self._store.forged),
        }

    # --- the workers, as the ledger needs them ---

    async def put(
        self, principal: Principal, record: SessionRecord, *, label: str, used_at: float
    ) -> None:
        """Return when every worker here serves the session."""
        self._spoil_fetch(record.session_id)
        self._store.hold(Entry(principal, record, label, used_at))
        await self._workers.put(principal, record, label=label, used_at=used_at)

    async def drop(self, session_id: str, reason: str) -> int:
        """Return, when every worker here has forgotten the session, how many live calls were cut."""
        self._spoil_fetch(session_id)
        self._store.let_go(session_id)
        return await self._workers.drop(session_id, reason)

    def forget(self, session_id: str, reason: str) -> None:
        """Have every worker here forget a session, without waiting."""
        self._drop_here(session_id, reason)

    def _put_here(self, entry: Entry) -> None:
        self._store.hold(entry)
        put = PutSession(
            n=UNASKED,
            principal=entry.principal,
            record=entry.record,
            label=entry.label,
            used_at=entry.used_at,
        )
        self._workers.tell(put)

    def _drop_here(self, session_id: str, reason: str) -> None:
        """Have workers forget a session whose end is, or was, another replica's to record."""
        self._spoil_fetch(session_id)
        if self._store.let_go(session_id):
            self._workers.tell(DropSession(n=UNASKED, session_id=session_id, reason=reason))

    # --- reading sessions ---

    def need(self, session_id: str) -> None:
        """Have workers learn of a session that one of them was asked for; one answer serves all."""
        if session_id in self._fetches:
            return
        if len(self._fetches) < MAX_FETCHES:
            self._start_fetch(session_id)
        else:
            self._workers.tell(SessionAbsent(session_id=session_id, is_known=False))

    def _read_again(self, session_id: str) -> None:
        """Have workers learn of a session's other revision."""
        if session_id in self._fetches:
            self._spoil_fetch(session_id)
        elif len(self._fetches) < MAX_FETCHES:
            self._start_fetch(session_id)
        else:
            self._may_have_missed = True

    def _spoil_fetch(self, session_id: str) -> None:
        if session_id in self._fetches:
            self._fetches[session_id] = False

    def _start_fetch(self, session_id: str) -> None:
        self._fetches[session_id] = True
        self._start(self._fetch(session_id))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _fetch(self, session_id: str) -> None:
        try:
            entry = await self._read(session_id)
        except StoreUnavailable:
            if self._store.recall(session_id):
                self._may_have_missed = True  # another revision may be out
            self._workers.tell(SessionAbsent(session_id=session_id, is_known=False))
            return
        finally:
            del self._fetches[session_id]
        if entry is not None:
            self._put_here(entry)
        else:
            self._drop_here(session_id, "closed")
            self._workers.tell(SessionAbsent(session_id=session_id, is_known=True))

    async def _read(self, session_id: str) -> Entry | None:
        for _ in range(FETCH_TRIES):
            self._fetches[session_id] = True
            entry = await self._store.find(session_id)
            if self._fetches[session_id] and not self._store.owes(session_id):
                return entry
        raise StoreUnavailable

    async def _compare(self) -> int:
        """Compare all that workers hold with the store; return how many sessions are no more."""
        for session_id in self._fetches:
            self._spoil_fetch(session_id)
        held = self._store.held()
        kept = await self._store.find_all(entry.record.session_id for entry in held)
        gone = 0
        for entry in held:
            session_id = entry.record.session_id
            now = kept.get(session_id)
            if now is None:
                self._drop_here(session_id, "closed")
                gone += 1
            elif now.record.revision != entry.record.revision:
                self._read_again(session_id)
        if self._tasks:
            await asyncio.wait(self._tasks)
        return gone

    # --- following the store ---

    async def start(self) -> None:
        """Reach the store for the first time; where it does not answer, `follow` goes on trying.

        Raises:
            StoreRefused: It must not be used as it is, or is not this deployment's.
        """
        try:
            await self._meet()
        except EventsMissed:
            self._may_have_missed = True
        except StoreUnavailable as error:
            self._note_trouble(error)

    async def follow(self) -> None:
        """Pass on what the other replicas say, and reach the store again whenever it is lost."""
        while True:
            try:
                if not self._has_met:
                    await self._meet()
                asked_at = await self._hear(waits=True)
                await self._tell_owed()
                await self._look_again()
                self._grant(asked_at)
            except EventsMissed:
                self._has_met, self._may_have_missed = False, True
            except (StoreUnavailable, StoreRefused) as error:
                self._has_met = False
                self._note_trouble(error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _look_again(self) -> None:
        """Ask now and then whether the store may still be used: its settings change without us."""
        now = self._clock.monotonic()
        if now - self._looked_at >= LOOK_AGAIN_SECONDS:
            self._looked_at = now
            await self._store.check()

    async def _meet(self) -> None:
        """Reach the store, make good what was missed, and grant a lease."""
        meeting = await self._store.meet()
        has_forgotten = self._epoch not in {b"", meeting.epoch}
        gone = 0
        if self._may_have_missed or meeting.epoch != self._epoch:
            gone = await self._make_good(meeting)
        await self._tell_owed()
        asked_at = await self._hear(waits=False)
        await self._record_met(meeting, has_forgotten=has_forgotten, gone=gone)
        self._has_met = True
        self._grant(asked_at)

    async def _make_good(self, meeting: Meeting) -> int:
        """Learn all anew, events apart that are still to be heard; return how many sessions are gone."""
        self._may_have_missed = False  # what goes wrong from here on says so again
        try:
            gone = await self._compare()
            await self._take_kills()
        except StoreUnavailable:
            self._may_have_missed = True
            raise
        self._epoch, self._heard = meeting.epoch, meeting.last
        return gone

    async def _tell_owed(self) -> None:
        """Tell the store what was stopped, and what ended, while it could not be told."""
        for kill_id, data in self._store.owed_kills():
            if data is None:
                await self._store.lift_kill(kill_id)
            else:
                await self._store.place_kill(kill_id, data)
                await self._told(self._end_killed(data))
        for owed in self._store.owed():
            await self._told(self._close(owed))

    @staticmethod
    async def _told(ending: Awaitable[None]) -> None:
        """Wait for an ending to be told; what the store did hear of is not told again."""
        try:
            await ending
        except StoreUnavailable:
            raise
        except (Refused, AuditUnavailable) as error:
            log.error("session.close_failed", code=error.code)

    async def _hear(self, *, waits: bool) -> float:
        """Pass on every event there is; return when the store was asked for what came last.

        Raises:
            EventsMissed: Some may have been missed.
            StoreUnavailable: The store does not answer.
        """
        while True:
            asked_at = self._clock.monotonic()
            events = await self._store.read_events(self._epoch, self._heard, waits=waits)
            self._heard_at = self._clock.monotonic()
            for number, event in events:
                self._heard = number
                if event is not None:
                    self._pass_on(event)
            if self._may_have_missed:
                raise EventsMissed
            if len(events) < EVENTS_AT_ONCE:
                return asked_at
            waits = False

    def _pass_on(self, event: Event) -> None:
        match event:
            case KillPlaced():
                self._set_kill(event.kill_id, event.data)
            case KillLifted():
                self._set_kill(event.kill_id, None)
            case _ if event.by == self._store.replica:
                pass  # the ledger tells workers itself, and counts what that cuts
            case Dropped():
                self._drop_here(event.session_id, event.reason)
            case Changed():
                if self._store.recall(event.session_id) or event.session_id in self._fetches:
                    self._read_again(event.session_id)

    def _grant(self, asked_at: float) -> None:
        """Let workers serve until the store has been silent for too long."""
        self.lease = Lease(until=asked_at + self._staleness)
        self._workers.tell(self.lease)
        self._trouble, self._is_lost = "", False
        if self._lapse is not None:
            self._lapse.cancel()
        remaining = self.lease.until - self._clock.monotonic()
        self._lapse = asyncio.get_running_loop().call_later(remaining, self._on_lapse)

    def _on_lapse(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            self._start(self._record_lost(self._trouble or "it is silent"))

    # --- kills ---

    def _set_kill(self, kill_id: str, data: bytes | None) -> None:
        if self._kills.get(kill_id) == data:
            return
        if data is None:
            del self._kills[kill_id]
        else:
            self._kills[kill_id] = data
        self._on_kill(kill_id, data)

    async def _take_kills(self) -> None:
        """Learn what stands, and tell of what stands here and was never heard of, or is forgotten.

        Only the word that a kill was lifted lifts it: whoever empties the store lifts nothing.
        """
        known = await self._store.known_kills()
        for kill_id, data in list(self._kills.items()):
            if kill_id not in known:
                await self._store.place_kill(kill_id, data)
                await self._told(self._end_killed(data))
        for kill_id, data in known.items():
            self._set_kill(kill_id, None if data == LIFTED else data)

    # --- evidence ---

    async def _record_met(self, meeting: Meeting, *, has_forgotten: bool, gone: int) -> None:
        writes = meeting.persistence != "off"
        await self._note(
            StoreConnected(
                address=self._store.address,
                persistence=meeting.persistence,
                reason=self._persistence_reason if writes else "",
                has_forgotten=has_forgotten,
                gone=gone,
            )
        )
        log.info("store.connected", reason=f"persistence {meeting.persistence}")

    def _note_trouble(self, error: GatewayError) -> None:
        """Say once what is wrong; a store that must not be used ends service at once."""
        reason = str(error) if isinstance(error, StoreRefused) else _why(error)
        if reason != self._trouble:
            self._trouble = reason
            log.warning("store.trouble", reason=reason)
        if isinstance(error, StoreRefused):
            self.lease = Lease(until=0.0)
            self._workers.tell(self.lease)
        if not self.is_live:
            self._on_lapse()

    async def _record_lost(self, reason: str) -> None:
        log.error("store.lost", reason=reason)
        await self._note(StoreLost(address=self._store.address, reason=reason))

    async def _note(self, event: AuditEvent) -> None:
        try:
            await self._record(event)
        except AuditUnavailable as error:
            log.error("store.unrecorded", code=error.code)

    async def aclose(self) -> None:
        """End what is under way, and every connection."""
        if self._lapse is not None:
            self._lapse.cancel()
        await end_tasks(self._tasks)
        await self._store.aclose()


def _why(error: GatewayError) -> str:
    """Return what the client said, in one short line: it names addresses, and no credentials."""
    cause = error.__cause__
    return f"{type(cause).__name__}: {cause}"[:200] if cause is not None else error.code
