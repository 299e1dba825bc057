"""What stands between a call and its record: how long it waits, and for what (`Durability`).

Laws of this file:
- no wait is longer than its bound; a call that was refused because its start came too late gets an
  end behind it, so that the log tells the truth should the start still reach the disk;
- events of one call are all recorded or all counted as lost: an end without its start would look like
  a forgery.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from gateway.audit.durability import Durability
from gateway.audit.event import CallDenied, CallEnd, CallStart, LogGap, UsageRecord
from gateway.audit.journal import AuditUnavailable, Journal
from gateway.clock import Clock

Waiter = Callable[[AuditUnavailable | None], None]
CallEvent = CallStart | CallEnd | CallDenied


class _Wait:
    """Somebody who waits for a record, and hears of it once."""

    __slots__ = ("_waiter", "deadline", "event", "is_told")

    def __init__(self, event: CallEvent, waiter: Waiter, deadline: float) -> None:
        self.event = event
        self.deadline = deadline
        self.is_told = False
        self._waiter = waiter

    def tell(self, error: AuditUnavailable | None) -> None:
        if not self.is_told:
            self.is_told = True
            self._waiter(error)

    async def heard(self) -> None:
        """Return once whoever waits has been told."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiter = self._waiter

        def tell_both(error: AuditUnavailable | None) -> None:
            waiter(error)
            told.set_result(None)

        self._waiter = tell_both
        await told


class Recorder:
    """Records the events of calls, as the operator chose. Belongs to the event loop's thread."""

    def __init__(
        self, journal: Journal, durability: Durability, wait_seconds: float, clock: Clock
    ) -> None:
        self.lost = 0
        self._journal = journal
        self._durability = durability
        self._wait_seconds = wait_seconds
        self._now = clock.monotonic
        self._loop = asyncio.get_running_loop()
        self._waits: deque[_Wait] = deque()
        self._lost_calls: set[str] = set()

    def append(self, event: CallEvent, on_durable: Waiter) -> str:
        """Record an event; return its position in the log, or nothing for one that is lost.

        `on_durable` runs on the loop, later.

        Raises:
            AuditUnavailable: It cannot be recorded, and may not be lost.
        """
        if self._durability is Durability.STRICT:
            return self._wait_for(event, on_durable)
        position = ""
        try:
            if event.call in self._lost_calls:
                raise AuditUnavailable("the call's start is lost")
            position = f"{self._journal.origin}#{self._journal.append(event)}"
        except AuditUnavailable:
            if self._durability is Durability.BOUNDED:
                raise
            self._lose(event)
        self._loop.call_soon(on_durable, None)
        return position

    def _wait_for(self, event: CallEvent, on_durable: Waiter) -> str:
        waits = self._waits
        while waits and waits[0].is_told:
            waits.popleft()
        wait = _Wait(event, on_durable, self._now() + self._wait_seconds)
        index = self._journal.append(event, wait.tell)
        waits.append(wait)
        return f"{self._journal.origin}#{index}"

    async def settle(self) -> None:
        """Return once nobody waits for a record, so that the log may be closed.

        A caller who left while its start was on the way to the disk has no connection that would be
        waited for, and yet an end to record.
        """
        await asyncio.sleep(0)  # those who need not wait hear in the next turn
        while waits := [wait for wait in self._waits if not wait.is_told]:
            await waits[-1].heard()

    def _lose(self, event: CallEvent) -> None:
        self.lost += 1
        if isinstance(event, CallStart):
            self._lost_calls.add(event.call)
        else:
            self._lost_calls.discard(event.call)

    def tick(self) -> None:
        """End waits that are too long, follow a log that failed, and own up to what was lost."""
        now = self._now()
        while self._waits and (self._waits[0].is_told or self._waits[0].deadline <= now):
            wait = self._waits.popleft()
            if not wait.is_told:
                wait.tell(AuditUnavailable("the disk is too slow"))
                if isinstance(wait.event, CallStart):
                    self._take_back(wait.event)
        if self._journal.renew() and self.lost:
            origin = self._journal.origin
            gap = LogGap(log=origin, durable=0, lost=self.lost, reason="calls went on unrecorded")
            try:
                self._journal.append(gap)
            except AuditUnavailable:
                return
            self.lost = 0

    def _take_back(self, start: CallStart) -> None:
        """Say behind a start that came too late that the call was refused."""
        refused = CallEnd(
            call=start.call, tenant=start.tenant, outcome="gateway_error", fault="gateway",
            code="audit_unavailable", status=503, upstream_status=0, request_bytes=0,
            response_bytes=0, usage=UsageRecord(), first_byte_us=0, total_us=0,
        )  # fmt: skip
        try:
            self._journal.append(refused)
        except AuditUnavailable:
            pass  # the log has failed: the start is lost with it, or found without an end
