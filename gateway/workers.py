"""The workers, as the control process sees them over their relays: told, asked, and lost.

A request counts as done when every worker has confirmed it; one that stays silent past its time
refuses it. A worker that dies with a question open has nothing left that could contradict the
answer: its memory is gone, and its successor is told what is true then.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from gateway.errors import Refused
from gateway.relay import (
    UNASKED,
    DropSession,
    KeepCounts,
    LetStand,
    Link,
    Message,
    PutSession,
    SnapshotRequest,
)
from gateway.telemetry.metrics import merge
from keys.session import SessionRecord
from policies.kills import Kill
from policies.request import Principal

ACK_SECONDS = 5.0
"""How long a worker may take to confirm; workers answer in microseconds or are stuck."""


class Workers:
    """The workers, as seen over their relays."""

    def __init__(self) -> None:
        self._links: list[Link] = []
        self._ready: dict[Link, int] = {}
        self._waiting: dict[tuple[Link, int], asyncio.Future[Any]] = {}
        self._last: dict[Link, dict[str, Any]] = {}
        self._kept = KeepCounts(n=0, data=merge(()))
        self._n = 0
        self._all_gone: asyncio.Future[None] | None = None

    def add(self, link: Link) -> None:
        """Count one more worker: from now on it is told and asked like the others."""
        if link not in self._links:
            self._links.append(link)

    def has(self, link: Link) -> bool:
        """Return whether this worker counts among those that are told and asked."""
        return link in self._links

    def lose(self, link: Link) -> None:
        """Count one less; its counts are kept, and whoever waited for it waits no longer."""
        self._ready.pop(link, None)
        if link not in self._links:
            return
        self._links.remove(link)
        for key in [key for key in self._waiting if key[0] is link]:
            self.on_answer(link, key[1], None)
        last = self._last.pop(link, None)
        if last is not None:
            self.keep(KeepCounts(n=self._kept.n + 1, data=merge((self._kept.data, last))))
        if not self._links and self._all_gone is not None and not self._all_gone.done():
            self._all_gone.set_result(None)

    async def wait_until_gone(self) -> None:
        """Return when no worker is left."""
        if self._links:
            self._all_gone = asyncio.get_running_loop().create_future()
            await self._all_gone

    @property
    def ready(self) -> int:
        """Return how many workers serve; an outgoing one and its successor count as one."""
        return len(set(self._ready.values()))

    def on_ready(self, link: Link, worker: int) -> None:
        """Note that a worker serves."""
        self._ready[link] = worker

    def on_answer(self, link: Link, n: int, answer: object) -> None:
        """Hand an answer to whoever waits for it."""
        waiting = self._waiting.pop((link, n), None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    # --- counts of workers that are gone ---

    @property
    def kept(self) -> KeepCounts:
        """What workers that are gone had counted."""
        return self._kept

    def keep(self, counts: KeepCounts) -> None:
        """Take over counts, and have every worker keep them for the next control process."""
        if counts.n > self._kept.n:
            self._kept = counts
            self.tell(counts)

    def on_snapshot(self, link: Link, data: dict[str, Any]) -> None:
        """Note a worker's counts; if it dies, they are the last that are known."""
        self._last[link] = data

    # --- telling and asking ---

    def tell(self, message: Message) -> None:
        """Send to every worker without waiting."""
        for link in self._links:
            link.send(message)

    async def _ask(self, build: Callable[[int], Message]) -> list[Any]:
        loop = asyncio.get_running_loop()
        self._n += 1
        n, message = self._n, build(self._n)
        asked = {(link, n): loop.create_future() for link in self._links}
        self._waiting.update(asked)
        for link in self._links:
            link.send(message)
        try:
            async with asyncio.timeout(ACK_SECONDS):
                answers = await asyncio.gather(*asked.values())
        except TimeoutError:
            raise Refused(
                "overloaded", "A worker does not answer.", retry_after_seconds=1
            ) from None
        finally:
            for key in asked:
                self._waiting.pop(key, None)
        return [answer for answer in answers if answer is not None]

    async def put(
        self, principal: Principal, record: SessionRecord, *, label: str, used_at: float
    ) -> None:
        """Return when every worker serves the session."""
        await self._ask(
            lambda n: PutSession(
                n=n, principal=principal, record=record, label=label, used_at=used_at
            )
        )

    async def drop(self, session_id: str, reason: str) -> int:
        """Return, when every worker has forgotten the session, how many live calls were cut."""
        acks = await self._ask(lambda n: DropSession(n=n, session_id=session_id, reason=reason))
        return sum(ack.count for ack in acks)

    async def kill(self, kills: tuple[Kill, ...]) -> int:
        """Return, when every worker lets only these stand, how many live calls were cut."""
        acks = await self._ask(lambda n: LetStand(n=n, kills=kills))
        return sum(ack.count for ack in acks)

    def tell_kills(self, kills: tuple[Kill, ...]) -> None:
        """Have every worker let only these stand, without waiting."""
        self.tell(LetStand(n=UNASKED, kills=kills))

    def forget(self, session_id: str, reason: str) -> None:
        """Have every worker forget a session, without waiting."""
        self.tell(DropSession(n=UNASKED, session_id=session_id, reason=reason))

    async def snapshots(self) -> list[dict[str, Any]]:
        """Return every worker's counters, and first those of workers that are gone."""
        answers = await self._ask(lambda n: SnapshotRequest(n=n))
        return [self._kept.data, *(answer.data for answer in answers)]
